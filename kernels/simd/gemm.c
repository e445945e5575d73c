// C[rows x cols] (+)= A[rows x depth] B[depth x cols]: A broadcast element by element, B and C in vectors, C in registers.
//
// Every element of C is one chain of multiply-adds over e in rising order, starting from zero and, to accumulate, added to C at the end.
#include "../kernels.h"
#include "simd.h"

typedef struct operands {
    const float *a;
    int64_t a_row, a_col;
    const float *b;
    int64_t b_row;
    float *c;
    int64_t c_row;
} operands;

// rows x vecs vectors of C; the last vector of a row has `lanes` lanes that exist (full: all of them).
V_INLINE void block(const int rows, const int vecs, const bool full, int64_t lanes, int64_t depth, operands o, bool accumulate) {
    vf acc[V_GEMM_ROWS][2];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vecs; ++v) acc[r][v] = v_zero();
    for (int64_t e = 0; e < depth; ++e) {
        const float *line = o.b + e * o.b_row, *column = o.a + e * o.a_col;
        vf b[2];
#pragma GCC unroll 2
        for (int v = 0; v < vecs; ++v) b[v] = full || v + 1 < vecs ? v_load(line + v * V_WIDTH) : v_load_n(line + v * V_WIDTH, lanes);
#pragma GCC unroll 12
        for (int r = 0; r < rows; ++r) {
            const vf a = v_set1(column[r * o.a_row]);
#pragma GCC unroll 2
            for (int v = 0; v < vecs; ++v) acc[r][v] = v_fma(a, b[v], acc[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < vecs; ++v) {
            float *c = o.c + r * o.c_row + v * V_WIDTH;
            if (full || v + 1 < vecs) {
                v_store(c, accumulate ? v_add(v_load(c), acc[r][v]) : acc[r][v]);
            } else {
                v_store_n(c, accumulate ? v_add(v_load_n(c, lanes), acc[r][v]) : acc[r][v], lanes);
            }
        }
    }
}

V_INLINE operands down(operands o, int64_t rows) {
    o.a += rows * o.a_row;
    o.c += rows * o.c_row;
    return o;
}

V_INLINE void columns(const int vecs, const bool full, int64_t lanes, int64_t rows, int64_t depth, operands o, bool accumulate) {
    for (; rows >= V_GEMM_ROWS; rows -= V_GEMM_ROWS, o = down(o, V_GEMM_ROWS)) block(V_GEMM_ROWS, vecs, full, lanes, depth, o, accumulate);
    for (; rows >= 4; rows -= 4, o = down(o, 4)) block(4, vecs, full, lanes, depth, o, accumulate);
    for (; rows > 0; --rows, o = down(o, 1)) block(1, vecs, full, lanes, depth, o, accumulate);
}

void RBE_KERNEL(gemm)(int64_t rows, int64_t depth, int64_t cols, const float *a, int64_t a_row, int64_t a_col, const float *b,
                      int64_t b_row, float *c, int64_t c_row, bool accumulate) {
    int64_t j = 0;
    for (; j + 2 * V_WIDTH <= cols; j += 2 * V_WIDTH)
        columns(2, true, V_WIDTH, rows, depth, (operands){a, a_row, a_col, b + j, b_row, c + j, c_row}, accumulate);
    const int64_t rest = cols - j;
    const operands o = {a, a_row, a_col, b + j, b_row, c + j, c_row};
    if (rest > V_WIDTH)
        columns(2, false, rest - V_WIDTH, rows, depth, o, accumulate);
    else if (rest == V_WIDTH)
        columns(1, true, V_WIDTH, rows, depth, o, accumulate);
    else if (rest > 0)
        columns(1, false, rest, rows, depth, o, accumulate);
}
