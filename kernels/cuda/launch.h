// The CUDA kernels as C functions: each launches on a stream and returns CUDA's error code, 0 where the launch was accepted.
//
// Everything pointed to lies on the device. Nothing waits for the device, allocates, or keeps state, so a call can be captured in a graph;
// the exception is named. Results do not depend on the number of blocks that run at once, and two runs give the same bits: no atomic adds.
// Memory is safe whatever the values of codes are: idx is 8 bits, a curve 5, an amplitude 8, and a sparse column outside the row is left
// out.
//
// Letters: m rows, n columns, g group, K groups, M stages, Q = K*M codes a row, q = k*M + s, T tokens. Unpacked codes lie q after q: [Q,
// pitch] with pitch >= m, so that a kernel that passes over rows reads memory in order.
#ifndef RBE_CUDA_LAUNCH_H
#define RBE_CUDA_LAUNCH_H

#include "../../ops/rbe.h"

#ifdef __cplusplus
extern "C" {
#endif

// The codes of a weight, or of a run of its rows (then the pointers are moved and `first` with them).
typedef struct rbe_cu_codes {
    const int32_t *words;   // interchange [m, Q], or
    const uint8_t *packed;  // rows of packed_stride bytes
    int64_t packed_stride;
    const void *amplitude;  // [m, Q] of type real, or NULL
    int64_t rows, cols, groups;
    int32_t stages, group, bits;
    rbe_field field;
    bool seeded, scaled;
    int32_t unstored;                // bits of amp that are not stored, for layouts ending in r
    uint32_t constant;               // bits that every word has
    uint32_t seed, first, row_step;  // seeded layouts: c of code q of row i is first + i*row_step + q (kernels/format.h)
    rbe_dtype real;                  // of amplitude, basis and gain: RBE_F32 or RBE_F64
    bool rounded;
} rbe_cu_codes;

typedef struct rbe_cu_residual {
    rbe_residual_kind kind;
    rbe_residual at;  // rows as those of the codes
    int64_t count;    // rank, or sparse entries a row
} rbe_cu_residual;

// A matrix [rows, cols] whose columns are neighbours; stride between rows in elements.
typedef struct rbe_cu_matrix {
    void *data;
    rbe_dtype dtype;
    int64_t rows, cols, stride;
} rbe_cu_matrix;

// ---- codes (codes.cu, repack.cu) ----
// idx [Q, pitch]; scale [Q, pitch] of type codes.real; mixed [Q, pitch]: the float32 scale with idx in its lowest 8 bits. NULL: not wanted.
// Rows m .. pitch-1 get idx 0 and scale 0.
int rbe_cu_unpack(const rbe_cu_codes *codes, int64_t pitch, uint8_t *idx, void *scale, uint32_t *mixed, void *stream);
// packed <-> words, rows of packed_stride bytes with zero padding bits.
int rbe_cu_pack(const rbe_cu_codes *codes, uint8_t *packed, int64_t packed_stride, void *stream);
int rbe_cu_unpack_words(const rbe_cu_codes *codes, int32_t *words, void *stream);
// *first_bad: the lowest place (row*Q + q) of a code that the layout cannot hold, or row*Q of a row whose padding bits are set; ~0 if none.
// Uses *scratch, 8 bytes on the device, and waits for the stream.
int rbe_cu_check_codes(const rbe_cu_codes *codes, unsigned long long *scratch, unsigned long long *first_bad, void *stream);

// ---- decode (decode.cu) ----
// W of the codes' rows, in any float type; RBE_F64 only from real RBE_F64. basis [M, 256, g] and gain [m] of type real.
int rbe_cu_decode(const rbe_cu_codes *codes, const void *basis, const void *gain, const rbe_cu_residual *residual, const rbe_cu_matrix *out,
                  void *stream);

// ---- shapes and types (convert.cu) ----
// A dense copy of another type of a strided array of up to 8 dimensions.
enum { RBE_CU_DIMS = 8 };
typedef struct rbe_cu_strided {
    const void *data;
    int32_t element;  // bytes; dtype matters where conversion is asked for
    rbe_dtype dtype;
    int32_t dims;
    int64_t sizes[RBE_CU_DIMS], strides[RBE_CU_DIMS];
} rbe_cu_strided;
int rbe_cu_copy(const rbe_cu_strided *from, bool convert, void *to, rbe_dtype dtype, void *stream);
// to[j, t] = from[t, j]; columns beyond from->rows up to to->stride become 0. to->dtype float32, float64 or that of from.
int rbe_cu_transpose(const rbe_cu_matrix *from, const rbe_cu_matrix *to, void *stream);
// basis [M, 256, g] float32 -> half [M, 256, depth], padded with zeros
int rbe_cu_narrow_basis(const float *basis, int64_t vectors, int32_t group, int32_t depth, rbe_dtype dtype, uint16_t *out, void *stream);
// y[t, i] = alpha of row i (or 1) times in[t, i] + bias[i] (or 0); in: splits [T, m] of float32 or float64 added in order.
int rbe_cu_finish_product(const void *in, rbe_dtype real, int64_t splits, const void *gain, const void *bias, const rbe_cu_matrix *y,
                          void *stream);
// out[j] = sum over t of a[t, j]
int rbe_cu_column_sums(const rbe_cu_matrix *a, rbe_dtype real, void *out, void *stream);
// out[p] = sum over splits of in[split, p], in order
int rbe_cu_sum_splits(const void *in, rbe_dtype real, int64_t splits, int64_t count, void *out, void *stream);

// ---- residuals that are multiplied apart (residual.cu) ----
// out [rows, cols] = bytes, int8 or e4m3, times scale [rows] or [cols] where it is not NULL.
int rbe_cu_widen(const void *bytes, bool e4m3, int64_t rows, int64_t cols, const float *scale, bool by_row, void *out, rbe_dtype dtype,
                 void *stream);
// out [padded, n]: tokens of x as int8 or e4m3, each in units of scale[t], then zeros.
int rbe_cu_round_tokens(const rbe_cu_matrix *x, int64_t padded, bool e4m3, uint8_t *out, float *scale, void *stream);
// y[t, i] += sums[t, i] * row_scale[i] * token_scale[t]; sums dense, int32 or float32.
int rbe_cu_add_scaled(const void *sums, bool integers, const float *row_scale, const float *token_scale, const rbe_cu_matrix *y, void *stream);

// ---- forward of codes with a table ----
// Up to 16 tokens (token.cu): table [T, Q, 256] float32, then y[t, i] = gain[i] sum over q of scale table[t, q, idx] + bias[i].
int rbe_cu_token_table(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *table, void *stream);
int rbe_cu_token_gather(const rbe_cu_codes *codes, const float *table, const float *gain, const float *bias, const rbe_cu_matrix *y,
                        void *stream);
// Many tokens of a half type (tiles_half.cu): the table of a tile of tokens lives in shared memory and is made by tensor cores. basis as
// rbe_cu_narrow_basis made it, depth a multiple of 16; codes as `mixed`, pitch a multiple of RBE_CU_ROWS.
enum { RBE_CU_ROWS = 512 };
int rbe_cu_tiles_half(const rbe_cu_matrix *x, const uint16_t *basis, int32_t depth, int32_t group, int32_t stages, const uint32_t *mixed,
                      int64_t pitch, int64_t rows, const float *gain, const float *bias, const rbe_cu_matrix *y, void *stream);
// Many tokens of float32 (gather_f32.cu): table [Q, 256, pitch_t] comes from a dense product; pitch_t a multiple of 4, pitch of
// RBE_CU_ROWS.
int rbe_cu_gather_f32(const float *table, int64_t pitch_t, const uint8_t *idx, const float *scale, int64_t pitch, int64_t rows,
                      int64_t count, const float *gain, const float *bias, const rbe_cu_matrix *y, void *stream);
// rbe8 at 1 to 4 tokens (lookup.cu): splits of columns, each [T, m] float32; rbe_cu_finish_product adds them.
int64_t rbe_cu_lookup_splits(const rbe_cu_codes *codes, int64_t tokens);
int rbe_cu_lookup(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *partial, void *stream);
// Any layout, x half (decode_mma.cu): W tiles are decoded into shared memory and multiplied there. Where splits is 1 the result is y; else
// splits of columns, each [T, m] float32, for rbe_cu_finish_product to add (gain is in them, bias is not).
int64_t rbe_cu_decode_mma_splits(const rbe_cu_codes *codes, int64_t tokens);
int rbe_cu_decode_mma(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, const float *gain, const float *bias,
                      const rbe_cu_residual *residual, const rbe_cu_matrix *y, int64_t splits, float *partial, void *stream);
// rbe8xM_g8 with M up to 4 and rbe16sxM_g8 with M up to 2, x half, rows and columns below 2^30 (fragments.cu): W is decoded into the registers
// of tensor cores. arranged: as many vectors of 16 bytes as rbe_cu_fragments_arranged says; padded: as many bytes as
// rbe_cu_fragments_padded says. Where splits is 1 the result is y; else splits of columns, each [T, m] float32, for rbe_cu_finish_product
// to add (neither gain nor bias is in them).
int64_t rbe_cu_fragments_arranged(const rbe_cu_codes *codes, int64_t tokens);
int64_t rbe_cu_fragments_padded(const rbe_cu_codes *codes);
int64_t rbe_cu_fragments_splits(const rbe_cu_codes *codes, int64_t tokens);
int rbe_cu_fragments(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, const float *gain, const float *bias,
                     const rbe_cu_matrix *y, void *arranged, uint8_t *padded, int64_t splits, float *partial, void *stream);

// ---- backward ----
// Rows sorted by code, stable: order [Q, m], start [Q, 257] (sort.cu).
int rbe_cu_sort(const uint8_t *idx, int64_t pitch, int64_t rows, int64_t count, int32_t *order, int32_t *start, void *stream);
// For every code: d[q, i] (+)= sum over t of dy[i, t] table[q, idx, t]; dtable[q, j, t] = sum over rows of code j of gain scale dy[i, t]
// (backward_table.cu). dy and tables hold `tokens` numbers a row, stride pitch_t (a multiple of 2), all of one type: float32 or bfloat16.
int rbe_cu_backward_table(const int32_t *order, const int32_t *start, const float *scale, int64_t pitch, const float *gain, int64_t rows,
                          int64_t count, rbe_dtype dtype, const void *dy, const void *table, void *dtable, int64_t tokens, int64_t pitch_t,
                          bool accumulate, float *d, void *stream);
// From a dense gradient dw [rows, n] of the codes' rows (backward_dense.cu): d [Q, pitch] = <dw, vector>, and splits of
// dbasis [splits, M, 256, g] = sum over codes of gain scale dw.
int rbe_cu_dense_d(const rbe_cu_codes *codes, const void *dw, const void *basis, void *d, int64_t pitch, void *stream);
int64_t rbe_cu_dense_basis_splits(const rbe_cu_codes *codes);
int rbe_cu_dense_basis(const rbe_cu_codes *codes, const void *dw, const int32_t *order, const int32_t *start, const void *scale,
                       int64_t pitch, const void *gain, bool accumulate, int64_t splits, void *partial, void *stream);
// dgain[i] = sum over q of scale d; dscale and damplitude [m, Q] (finish.cu); NULL: not wanted.
int rbe_cu_finish_codes(const rbe_cu_codes *codes, const void *d, const void *scale, int64_t pitch, const void *gain, void *dgain,
                        void *dscale, void *damplitude, void *stream);

// ---- the device (convert.cu) ----
// Makes `device` current and returns the one that was, or -1.
int rbe_cu_use_device(int device);
const char *rbe_cu_error_text(int error);
int rbe_cu_capability(void);  // of the current device: 90 is sm_90
bool rbe_cu_capturing(void *stream);  // in a graph: nothing may wait
int rbe_cu_zero(void *at, size_t bytes, void *stream);
int rbe_cu_to_host(void *to, const void *from, size_t bytes, void *stream);  // waits for the stream
int rbe_cu_to_device(void *to, const void *from, size_t bytes, void *stream);  // `from` may be freed when it returns

#ifdef __cplusplus
}
#endif
#endif
