// The torch-free public C API: layouts, codes <-> packed bytes <-> weights, y = x W^T and its gradients.
//
// Every function checks its arguments before it touches memory and returns a status; on failure `err->text` holds one sentence that
// names the argument, what it was and what it must be. Thread-safe: no function changes state shared between calls.
// Letters: m = rows = out_features, n = cols = in_features, g = group, K = ceil(n / g) groups, M = stages, T = tokens.
#ifndef RBE_H
#define RBE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels/format.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum rbe_status { RBE_OK, RBE_BAD_ARGUMENT, RBE_OUT_OF_MEMORY, RBE_DEVICE_FAILED } rbe_status;
typedef struct rbe_error { char text[512]; } rbe_error;

// Formats the sentence and returns the status, so that a check reads `return rbe_fail(err, RBE_BAD_ARGUMENT, "x: ...", ...)`.
rbe_status rbe_fail(rbe_error *err, rbe_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

// ---- layout -----------------------------------------------------------------------------------------------------------------
// "rbe22_g64", "rbe8x2_g8+int8": <fields>[x<stages>]_g<group>[+int8|+fp8|+lr<rank>|+sp<fraction>]
typedef struct rbe_layout {
    rbe_field field;
    int32_t bits, group, stages;
    rbe_residual_kind residual;
    int32_t rank;     // lowrank
    double fraction;  // sparse: entries a row = max(1, round(fraction * n))
} rbe_layout;

rbe_status rbe_layout_parse(const char *text, size_t length, rbe_layout *out, rbe_error *err);

// ---- tensors ----------------------------------------------------------------------------------------------------------------
typedef enum rbe_dtype { RBE_F32, RBE_F64, RBE_BF16, RBE_F16 } rbe_dtype;

// Strides in elements; any sign, zero allowed (a broadcast input).
typedef struct rbe_matrix {
    void *data;
    rbe_dtype dtype;
    int64_t rows, cols, row_stride, col_stride;
} rbe_matrix;

// Contiguous. Which fields are set follows layout.residual (docs/operators.md has the shapes).
typedef struct rbe_residual {
    const void *values;        // int8 [m, n] | fp8 [m, n] | int8 A [m, r] | fp16 [m, c]
    const float *scale;        // [m]         | [m]        | [r]           | -
    const void *right;         //                          | int8 B [r, n] | int32 column [m, c], rising within a row
    const float *right_scale;  //                          | [r]           |
} rbe_residual;

enum { RBE_INTERLEAVED_ROWS = 64 };

// One layer's weight, or a shard of it. Exactly one of words, packed and interleaved is set. `real` is the type of basis, gain and amplitude:
// RBE_F32, or RBE_F64 for the reference path. All contiguous but for the stride between packed rows.
typedef struct rbe_weight {
    rbe_layout layout;
    int64_t rows, cols, groups;       // of what is here
    int64_t row0, k0, groups_total;   // its place in the whole layer; only layouts ending in r read them
    uint32_t seed;
    const int32_t *words;             // interchange [m, K, M]
    const uint8_t *packed;            // [m, ceil(K*M*bits/8)]
    int64_t packed_stride;            // bytes
    const uint8_t *interleaved;       // rbe8 alone: [ceil(m / 64)][K*M][64], rows that do not exist are zero
    rbe_dtype real;
    const void *basis;                // [M, 256, g]
    const void *gain;                 // [m], finite
    const void *amplitude;            // [m, K, M] or NULL: replaces sign, amp and amp_fine of every code
    bool rounded;                     // false: the amplitude is not rounded to its bits (reference path only)
    rbe_residual residual;
} rbe_weight;

// ---- threads ----------------------------------------------------------------------------------------------------------------
// How a caller lends its threads: run(pool, begin, end, grain, body, context) calls body on disjoint ranges and returns when all are done.
typedef void (*rbe_body)(int64_t begin, int64_t end, void *context);
typedef struct rbe_parallel {
    void (*run)(void *pool, int64_t begin, int64_t end, int64_t grain, rbe_body body, void *context);
    void *pool;
    int threads;
} rbe_parallel;
// Results do not depend on the number of threads. NULL: the calling thread alone.

// ---- products ---------------------------------------------------------------------------------------------------------------
// exact: float32 products and sums, the error of a dense float32 product. fast: tables in float16 or 8 bits where they are quicker (docs/operators.md
// states the error). auto: exact for float32 x, fast for bfloat16 and float16.
typedef enum rbe_accuracy { RBE_ACCURACY_AUTO, RBE_ACCURACY_EXACT, RBE_ACCURACY_FAST } rbe_accuracy;

// y[t, i] = sum over j of x[t, j] W[i, j] + bias[i].  x: T x n, y: T x m of the same dtype. bias: [m] of type w->real, or NULL.
rbe_status rbe_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y, rbe_accuracy accuracy,
                      const rbe_parallel *threads, rbe_error *err);

// Where each gradient goes; NULL where it is not wanted. All but dx are contiguous, of type w->real.
typedef struct rbe_gradients {
    const rbe_matrix *dx;  // T x n, dtype of x
    void *basis;           // [M, 256, g]
    void *gain;            // [m]
    void *bias;            // [m]
    void *amplitude;       // [m, K, M]; needs w->amplitude
    void *scale;           // [m, K, M]; d loss / d scale(code), amplitude or not
} rbe_gradients;

// The diagonal-Jacobian backward: with D[i,k,s] = sum over t of dy[t,i] P[t,k,s,idx],
// dscale = gain[i] D, damplitude = dscale * d scale/da (zero where it would push |a| beyond 1), dgain[i] = sum over k,s of scale D.
rbe_status rbe_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out, rbe_accuracy accuracy,
                               const rbe_parallel *threads, rbe_error *err);

// ---- codes ------------------------------------------------------------------------------------------------------------------
// W (m x n, row-major, of type w->real) from codes.
rbe_status rbe_decode(const rbe_weight *w, void *dense, const rbe_parallel *threads, rbe_error *err);

// Gradients of rbe_decode: dense is that of W (m x n); dbasis [M, 256, g] and dgain [m] are written. Reads w->words, float32, no amplitude.
rbe_status rbe_decode_backward(const rbe_weight *w, const float *dense, float *dbasis, float *dgain, const rbe_parallel *threads, rbe_error *err);

// words [m, K, M] from a float32 or float64 matrix: M = 1 jointly minimises |w - gain * vector|^2 over idx and scale in float64, ties to the
// lowest unsigned word; M > 1 searches with a beam, deterministically. Reads layout, rows, cols, groups, place, seed, basis and gain of w.
rbe_status rbe_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_parallel *threads, rbe_error *err);

// words that make tr((W - Q) H (W - Q)^T) small, Q what they decode to and H = sum of x x^T over the inputs x that the layer is to be right for:
// group after group with the error of the earlier ones fed back (GPTQ, LDLQ), then `sweeps` of choosing every group's codes again given all others.
typedef struct rbe_calibration {
    const float *hessian;  // H [n, n], symmetric, positive definite
    const float *factor;   // [n, n] upper triangular, H = factor factor^T; NULL: words holds the codes to start from
    int sweeps;
} rbe_calibration;
// Reads what rbe_encode reads, float32, of whole rows (k0 = 0). words: [m, K, M].
rbe_status rbe_encode_calibrated(const rbe_weight *w, const rbe_matrix *dense, const rbe_calibration *calibration, int32_t *words,
                                 const rbe_parallel *threads, rbe_error *err);

rbe_status rbe_pack(const rbe_weight *w, uint8_t *packed, rbe_error *err);    // from w->words; rows are ceil(K*M*bits/8) bytes
rbe_status rbe_unpack(const rbe_weight *w, int32_t *words, rbe_error *err);   // from w->packed or w->interleaved
static inline int64_t rbe_packed_row_bytes(const rbe_layout *l, int64_t groups) { return (groups * l->stages * l->bits + 7) / 8; }

// Packed rows of rbe8, `stride` bytes apart and `count` = K*M long, <-> interleaved; a packed result is dense.
rbe_status rbe_interleave(const uint8_t *packed, int64_t stride, int64_t rows, int64_t count, uint8_t *interleaved, rbe_error *err);
rbe_status rbe_deinterleave(const uint8_t *interleaved, int64_t rows, int64_t count, uint8_t *packed, rbe_error *err);
static inline int64_t rbe_interleaved_tiles(int64_t rows) { return (rows - 1) / RBE_INTERLEAVED_ROWS + 1; }

// Refuses words with bits outside the layout (or an idx the seed does not give) and padding bits that are not zero.
rbe_status rbe_check_codes(const rbe_weight *w, rbe_error *err);

// ---- which kernels ----------------------------------------------------------------------------------------------------------
const char *rbe_isa_name(void);  // "scalar", "avx2", "avx512", "neon": the best the host has, lowered by RBE_ISA
bool rbe_reads_interleaved(void);  // whether the host has kernels that gain by interleaved codes
// One line saying which kernel a product of this shape takes, for show_config(). Returns the length written.
int rbe_describe_linear(const rbe_layout *layout, int64_t rows, int64_t cols, int64_t tokens, rbe_dtype x, rbe_accuracy accuracy, char *text,
                        size_t size);

#ifdef __cplusplus
}
#endif
#endif
