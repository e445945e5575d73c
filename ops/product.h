// What the paths of rbe_linear, rbe_linear_backward and rbe_decode share: checks, threads, and the way in and out of float32.
#ifndef RBE_PRODUCT_H
#define RBE_PRODUCT_H

#include <stdatomic.h>

#include "../kernels/kernels.h"
#include "plan.h"
#include "rbe.h"
#include "scratch.h"

// ---- checks (check.c) -------------------------------------------------------------------------------------------------------
rbe_status rbe_check_weight(const rbe_weight *w, rbe_error *err);  // shapes, pointers, codes, gain, residual
// x-like (T x cols) or y-like (T x rows) argument of a product with w; `tokens` < 0: any number
rbe_status rbe_check_matrix(const rbe_weight *w, const char *name, const rbe_matrix *a, int64_t tokens, int64_t cols, rbe_error *err);
rbe_status rbe_check_gain(const rbe_weight *w, rbe_error *err);   // finite
rbe_status rbe_check_shape(const rbe_weight *w, rbe_error *err);  // layout, m, n, K and place against each other (codes.c)
rbe_status rbe_out_of_memory(rbe_error *err);

// Element of a basis, gain or amplitude.
static inline double rbe_real_at(const void *data, rbe_dtype real, int64_t i) {
    return real == RBE_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

// ---- threads ----------------------------------------------------------------------------------------------------------------
static inline void rbe_run(const rbe_parallel *threads, int64_t count, int64_t grain, rbe_body body, void *context) {
    if (count <= 0) return;
    if (threads && threads->threads > 1 && count > grain)
        threads->run(threads->pool, 0, count, grain, body, context);
    else
        body(0, count, context);
}
static inline int rbe_thread_count(const rbe_parallel *threads) { return threads && threads->threads > 1 ? threads->threads : 1; }
static inline int64_t rbe_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t rbe_max(int64_t a, int64_t b) { return a > b ? a : b; }
// a share of the work for each thread, in whole steps
static inline int64_t rbe_share(const rbe_parallel *threads, int64_t count, int64_t step) {
    const int64_t shares = rbe_thread_count(threads), each = (count + shares - 1) / shares;
    return rbe_max(step, (each + step - 1) / step * step);
}

// ---- codes of a weight (weight.c) -------------------------------------------------------------------------------------------
static inline int64_t rbe_codes_a_row(const rbe_weight *w) { return w->groups * w->layout.stages; }
rbe_code_row rbe_code_row_at(const rbe_weight *w, int64_t row);

// The weight with interleaved codes laid out as packed ones in scratch, for paths that read rows; any other weight as it is.
rbe_status rbe_as_packed(const rbe_kernels *kernels, const rbe_weight *w, const rbe_parallel *threads, rbe_weight *out, rbe_error *err);
// `count` bytes of at most 64 packed rows laid out as a tile of interleaved ones, [count][64].
void rbe_interleave_tile(const rbe_kernels *kernels, const uint8_t *packed, int64_t stride, int64_t rows, int64_t count, uint8_t *out);

// All codes, unpacked in blocks of `block` codes: code q0 + c of row i, q0 = b * block, lies at idx + b*step + i*row + c. Within a block rows
// follow each other, so that a kernel that passes over a block reads memory in order. scale NULL: 1.
typedef struct rbe_codes {
    const uint8_t *idx;
    const float *scale;
    const uint16_t *half;  // the scale in float16 instead, where asked for
    int64_t row, step;
} rbe_codes;
rbe_status rbe_unpack_codes(const rbe_kernels *kernels, const rbe_weight *w, int64_t block, bool half, const rbe_parallel *threads, rbe_codes *out,
                            rbe_error *err);

// Buffers to decode one row, or a stretch of its groups, of W.
typedef struct rbe_row_buffers {
    uint8_t *idx, *signs;
    float *scale;
} rbe_row_buffers;
bool rbe_take_row_buffers(const rbe_weight *w, int64_t groups, rbe_row_buffers *out);
// Columns of groups k0 .. k0+groups-1 of a row, residual included. Leaves the codes' idx, scale and signs in the buffers.
void rbe_decode_row(const rbe_kernels *kernels, const rbe_weight *w, int64_t row, int64_t k0, int64_t groups, rbe_row_buffers b, float *out);

// The rows sorted by code (sorted.c): code j of q has the places start[q][j] .. start[q][j+1], a place its row and gain * scale. Either row and factor, or half.
enum { RBE_SORTED_TOGETHER = 16 };  // codes of a row, so that a line of unpacked codes is read once
enum { RBE_SORTED_ROWS = 1 << 16 };     // at most, in one word with a float16
typedef struct rbe_sorted {
    int32_t *start, *row;  // [K*M][257], [K*M][m] and RBE_PLACES_AHEAD more
    float *factor;         // [K*M][m]
    uint32_t *half;        // both in one: the row, and gain * scale / 2^unit in float16 in the high half
    int unit;
    float *d;  // [K*M][m]: D of a place, with row and factor cleared
} rbe_sorted;
rbe_status rbe_sort_codes(const rbe_kernels *kernels, const rbe_weight *w, bool half, const rbe_parallel *threads, rbe_sorted *out, rbe_error *err);

// ---- matrix unit (weight.c) -------------------------------------------------------------------------------------------------
// Whether a product gains by it: its depth comes in units of 32, rows and columns in units of 16, and what is padded is lost.
static inline bool rbe_wants_split(const rbe_kernels *kernels, int64_t size, int64_t unit) {
    return kernels->gemm_split && 2 * size >= (size + unit - 1) / unit * unit;
}
// bfloat16 pieces of a float32 and of an activation: as many as hold the value exactly. In the fast class at most two, an error of 2^-17.
enum { RBE_WHOLE = 3 };
static inline int rbe_float_pieces(bool fast) { return fast ? 2 : RBE_WHOLE; }
static inline int rbe_pieces(rbe_dtype dtype, bool fast) { return dtype == RBE_BF16 ? 1 : dtype == RBE_F16 ? 2 : rbe_float_pieces(fast); }
// The basis as split rows, [M][rbe_split_size(256, g)] in scratch, or turned: [M][rbe_split_size(g, 256)]; NULL when out of memory.
const uint16_t *rbe_split_basis(const rbe_kernels *kernels, const rbe_weight *w);
const uint16_t *rbe_split_basis_turned(const rbe_kernels *kernels, const rbe_weight *w);

// ---- half precision (half.c) -------------------------------------------------------------------------------------------------
// 2^this bounds the sum of |basis[s, j]| over a vector; 0 for a basis that is not finite.
int rbe_basis_exponent(const rbe_weight *w);
// bfloat16 pieces of an activation there: two hold a float16, one is all that a bfloat16 has and all that a float32 gets.
static inline int rbe_half_pieces(rbe_dtype dtype) { return dtype == RBE_F16 ? 2 : 1; }
enum { RBE_HALF_RANGE = 126 };  // powers of two whose inverse is a normal float32 too
// The power of two, within that range, by which `most` times 2^exponent stays below 2^bound; 0 where most is 0 or not finite.
int rbe_half_power(float most, int exponent, int bound);
// The basis for the matrix unit in scratch, [M][rbe_half_size(256, g)], or turned: [M][rbe_half_size(g in whole 32, 256)]; NULL when out of memory.
const uint16_t *rbe_half_basis(const rbe_kernels *kernels, const rbe_weight *w);
const uint16_t *rbe_half_basis_turned(const rbe_kernels *kernels, const rbe_weight *w);

// ---- activations <-> float32 (tiles.c) --------------------------------------------------------------------------------------
// out[t*out_row + j] = a[t0+t, j0+j]
void rbe_load_rows(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, float *out,
                   int64_t out_row);
void rbe_store_rows(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, const float *in,
                    int64_t in_row);
// out[j*width + t] = a[t0+t, j0+j], zero for tokens <= t < width; and back
void rbe_load_tile(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, float *out,
                   int64_t width);
void rbe_store_tile(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, const float *in,
                    int64_t width);
enum { RBE_TILE_MAX = 64 };  // widest tile: 4 vectors of 16
// whether the matrix can be read as float32 rows where it lies
static inline bool rbe_is_rows(const rbe_matrix *a) { return a->dtype == RBE_F32 && (a->col_stride == 1 || a->cols <= 1); }

// ---- paths ------------------------------------------------------------------------------------------------------------------
typedef struct rbe_job {
    const rbe_kernels *kernels;
    const rbe_weight *w;
    const rbe_matrix *x, *y;
    const float *bias;
    const rbe_parallel *threads;
    bool fast;           // the accuracy class
    atomic_bool failed;  // out of memory in a thread
} rbe_job;

// bfloat16 pieces where W itself is multiplied on the matrix unit. In the fast class W is rounded to bfloat16, as a dense bfloat16 layer's would be: a root
// mean square error of 1.1e-3.
static inline int rbe_weight_pieces(const rbe_job *job) { return job->fast ? 1 : RBE_WHOLE; }
static inline int rbe_activation_pieces(const rbe_job *job) { return job->fast && job->x->dtype == RBE_F32 ? 1 : rbe_pieces(job->x->dtype, job->fast); }

// One tile of `width` tokens from t0 on; threads NULL: all on this thread. False: out of memory.
typedef bool (*rbe_tile_body)(const void *pass, int64_t t0, const rbe_parallel *threads);
rbe_status rbe_run_token_tiles(rbe_job *job, int64_t width, rbe_tile_body tile, const void *pass, rbe_error *err);  // token_tiles.c
// y = gain sums + bias of a tile of weight rows from `first` on, whose sums [rows][width] it overwrites (token_tiles.c)
void rbe_finish_tile(const rbe_job *job, int64_t t0, int64_t tokens, int64_t first, int64_t rows, float *sums, int64_t width);

rbe_status rbe_linear_table(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_half(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_token(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_floats(rbe_job *job, rbe_error *err);  // the path without integers that the plan says
rbe_status rbe_linear_lut8(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_few(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_lookup(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_lookup_split(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_digits(rbe_job *job, rbe_error *err);
rbe_status rbe_linear_decode(rbe_job *job, bool dot, rbe_error *err);

// job->x is x, job->y is dy. dbasis, d (raw D, [m, K*M]) and gain (sum over the row's codes of scale D) are cleared buffers to add to, or NULL
// where not wanted; by table gain comes from d alone.
typedef struct rbe_backward_job {
    rbe_job job;
    const rbe_matrix *dx;
    float *dbasis, *d, *gain;
} rbe_backward_job;
void rbe_unsort(rbe_backward_job *job, const rbe_sorted *sorted);  // D of places to job->d
rbe_status rbe_backward_table(rbe_backward_job *job, rbe_error *err);
rbe_status rbe_backward_half(rbe_backward_job *job, rbe_error *err);
rbe_status rbe_backward_decode(rbe_backward_job *job, rbe_error *err);

#endif
