// Rows += a thin product: what the errors of a group do to the columns beside it. Products and sums are rounded each on its own, so that every ISA
// gives the same bits.
#include "../kernels.h"
#include "simd.h"

enum { ROWS = 4, VECTORS = V_WIDTH == 16 ? 4 : 2 };

V_INLINE void block(const int rows, const int vectors, int64_t depth, const float *e, const float *matrix, int64_t matrix_row, float *const *out, int64_t j) {
    vf acc[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) acc[r][c] = v_load(out[r] + j + c * V_WIDTH);
    for (int64_t i = 0; i < depth; ++i, matrix += matrix_row) {
        vf m[VECTORS];
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) m[c] = v_load(matrix + j + c * V_WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
            const vf factor = v_set1(e[r * depth + i]);
#pragma GCC unroll 4
            for (int c = 0; c < vectors; ++c) acc[r][c] = v_add(acc[r][c], v_mul(factor, m[c]));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < vectors; ++c) v_store(out[r] + j + c * V_WIDTH, acc[r][c]);
}

V_INLINE void some(const int rows, int64_t depth, const float *e, const float *matrix, int64_t matrix_row, int64_t cols, float *const *out) {
    int64_t j = 0;
    for (; j + VECTORS * V_WIDTH <= cols; j += VECTORS * V_WIDTH) block(rows, VECTORS, depth, e, matrix, matrix_row, out, j);
    for (; j + V_WIDTH <= cols; j += V_WIDTH) block(rows, 1, depth, e, matrix, matrix_row, out, j);
    for (int r = 0; r < rows; ++r)
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t l = j; l < cols; ++l) out[r][l] += e[r * depth + i] * matrix[i * matrix_row + l];
}

void RBE_KERNEL(add_rows)(int64_t rows, int64_t depth, const float *e, const float *matrix, int64_t matrix_row, int64_t cols, float *const *out) {
    for (; rows >= ROWS; rows -= ROWS, e += ROWS * depth, out += ROWS) some(ROWS, depth, e, matrix, matrix_row, cols, out);
    for (; rows > 0; --rows, e += depth, ++out) some(1, depth, e, matrix, matrix_row, cols, out);
}
