// The searches for codes as C functions: as launch.h, each launches on a stream and returns CUDA's error code. They give the words that
// ops/encode*.c gives, bit for bit: float64 and float32 operations in the same order, none fused.
#ifndef RBE_CUDA_ENCODE_H
#define RBE_CUDA_ENCODE_H

#include "launch.h"

#ifdef __cplusplus
extern "C" {
#endif

// All scales that a layout can hold (of rbe32 those with amp_fine 0), rising; beside each the lowest word that has it.
typedef struct rbe_cu_scales {
    const float *value;
    const uint32_t *word;
    int32_t count;
} rbe_cu_scales;

// A basis turned for the searches: one for all groups, or one for each (`tables`). Units as rbe_encoder.unit of ops/encode.h.
typedef struct rbe_cu_search {
    rbe_cu_codes codes;     // layout, shape, seed and place; `real` is the type of vectors
    rbe_cu_scales scales;
    int64_t tables;
    const void *vectors;    // [tables, M, 256, g]
    const double *unit;     // [tables]
    const double *square;   // [tables, 2, M, 256]: |b|^2 over a whole group, and over the columns of the last one
    const double *wide;     // [tables, g, 256], where M = 1; |b| for rbe16s
    const float *narrow;    // [tables, M, g, 256], where M > 1
} rbe_cu_search;

// What is encoded, float32 or float64, with any strides.
typedef struct rbe_cu_target {
    const void *data;
    rbe_dtype dtype;
    int64_t row_stride, col_stride;
    const void *gain;  // [m]
    rbe_dtype real;    // of gain
} rbe_cu_target;

// ---- tables (encode_tables.cu, encode_scales.cu) ----
int32_t rbe_cu_scale_count(rbe_field field);
int rbe_cu_list_scales(rbe_field field, float *value, uint32_t *word, void *stream);
// unit, square, and wide or narrow of a search whose codes and vectors are set.
int rbe_cu_fill_search(const rbe_cu_search *search, double *unit, double *square, double *wide, float *narrow, void *stream);
// factors [K, g g]: of every diagonal block [depth, depth] of a matrix [n, n] the upper triangle as float64, or U with U U^T the block.
// *indefinite becomes the lowest group whose block has none.
int rbe_cu_block_triangles(const float *matrix, int64_t n, int64_t group, double *factors, void *stream);
int rbe_cu_factor_blocks(const float *matrix, int64_t n, int64_t group, double *factors, unsigned long long *indefinite, void *stream);
// turned [K, M, 256, g] = basis [M, 256, g] times each group's factor; columns beyond the last one are 0.
int rbe_cu_turn_basis(const rbe_cu_codes *codes, const void *basis, const double *factors, float *turned, void *stream);

// Values that an encoding cannot use. places[i] becomes the lowest place (row * cols + col) of such a value, or stays ~0.
enum { RBE_CU_FINITE, RBE_CU_POSITIVE };
int rbe_cu_no_places(unsigned long long *places, int count, void *stream);
int rbe_cu_check_values(const void *data, rbe_dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int kind,
                        unsigned long long *place, void *stream);

// ---- searches ----
enum { RBE_CU_CALIBRATED_ROWS = 8 };  // of a block, at most
// Bytes of memory that a launch needs beside shared memory, 0 for all but groups of some thousand columns.
size_t rbe_cu_encode_memory(const rbe_cu_codes *codes, bool calibrated);
// words [m, K, M] (encode.cu)
int rbe_cu_encode(const rbe_cu_search *search, const rbe_cu_target *target, int32_t *words, void *memory, void *stream);

// The two passes of calibrated encoding (encode_feedback.cu, encode_sweep.cu): matrix is V or H [n, n], factors its blocks as above, basis
// the weight's own, of type target.real. error [m, n] = W - what the words decode to; pull [m, n] = error H, kept up by a sweep; for the
// feedback it starts as 0.
typedef struct rbe_cu_calibrated {
    rbe_cu_search search;
    rbe_cu_target target;
    const void *basis;
    const float *matrix;
    const double *factors;
    float *error, *pull;
    int32_t *words;
    void *memory;
} rbe_cu_calibrated;
int rbe_cu_encode_feedback(const rbe_cu_calibrated *c, void *stream);
int rbe_cu_encode_error(const rbe_cu_calibrated *c, void *stream);  // error of the words
int rbe_cu_encode_pull(const rbe_cu_calibrated *c, void *stream);   // pull += error matrix
int rbe_cu_encode_sweep(const rbe_cu_calibrated *c, void *stream);

#ifdef __cplusplus
}
#endif
#endif
