// Products through the table P[q, j] = x[k-th group] . basis[s, j]: the sums over codes. P itself comes from gemm, for one token from here.
//
//     y[i, t] = gain[i] * sum over q of scale[i,q] P[q, idx[i,q], t] + bias[i]
#include "../kernels.h"
#include "simd.h"

// `rows` rows at once, so that several lines of P are on their way; y stays in registers over the codes of a block.
V_INLINE void rows_of(const int rows, const int vecs, int64_t count, const uint8_t *idx, const float *scale, int64_t code_row,
                      const float *p, float *y, bool first, const float *gain, const float *bias) {
    const int64_t w = vecs * V_WIDTH;
    vf acc[8][2];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vecs; ++v) acc[r][v] = first ? v_zero() : v_load(y + r * w + v * V_WIDTH);
    for (int64_t q = 0; q < count; ++q, p += RBE_BASIS_VECTORS * w) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
            const float *line = p + idx[r * code_row + q] * w;
            const vf s = scale ? v_set1(scale[r * code_row + q]) : v_set1(1.0f);
#pragma GCC unroll 2
            for (int v = 0; v < vecs; ++v)
                acc[r][v] = scale ? v_fma(s, v_load(line + v * V_WIDTH), acc[r][v]) : v_add(v_load(line + v * V_WIDTH), acc[r][v]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vecs; ++v) {
            vf sum = acc[r][v];
            if (gain) sum = v_fma(sum, v_set1(gain[r]), v_set1(bias ? bias[r] : 0.0f));
            v_store(y + r * w + v * V_WIDTH, sum);
        }
    }
}

V_INLINE void all_rows(const int vecs, bool scaled, int64_t rows, int64_t count, const uint8_t *idx, const float *scale, int64_t code_row,
                       const float *p, float *y, bool first, const float *gain, const float *bias) {
    const int64_t many = vecs == 1 ? 8 : 4;
    for (int64_t i = 0; i < rows;) {
        const float *s = scaled ? scale + i * code_row : 0, *g = gain ? gain + i : 0, *b = bias ? bias + i : 0;
        if (i + many <= rows) {
            rows_of(vecs == 1 ? 8 : 4, vecs, count, idx + i * code_row, s, code_row, p, y + i * vecs * V_WIDTH, first, g, b);
            i += many;
        } else {
            rows_of(1, vecs, count, idx + i * code_row, s, code_row, p, y + i * vecs * V_WIDTH, first, g, b);
            ++i;
        }
    }
}

void RBE_KERNEL(table_rows)(int64_t rows, int64_t count, const uint8_t *idx, const float *scale, int64_t code_row, const float *p,
                            int64_t w, float *y, bool first, const float *gain, const float *bias) {
    if (w == V_WIDTH && scale)
        all_rows(1, true, rows, count, idx, scale, code_row, p, y, first, gain, bias);
    else if (w == V_WIDTH)
        all_rows(1, false, rows, count, idx, scale, code_row, p, y, first, gain, bias);
    else if (scale)
        all_rows(2, true, rows, count, idx, scale, code_row, p, y, first, gain, bias);
    else
        all_rows(2, false, rows, count, idx, scale, code_row, p, y, first, gain, bias);
}

void RBE_KERNEL(table_token)(int64_t groups, int64_t stages, int64_t g, int64_t cols, const float *x, const float *turned, float *p) {
    enum { VECTORS = V_WIDTH >= 8 ? 8 : 4, STEP = VECTORS * V_WIDTH };
    for (int64_t k = 0; k < groups; ++k) {
        const int64_t depth = cols - k * g < g ? cols - k * g : g;
        for (int64_t s = 0; s < stages; ++s, p += RBE_BASIS_VECTORS) {
            const float *column = turned + s * g * RBE_BASIS_VECTORS;
            for (int64_t j = 0; j < RBE_BASIS_VECTORS; j += STEP) {
                vf acc[VECTORS];
                for (int v = 0; v < VECTORS; ++v) acc[v] = v_zero();
                for (int64_t e = 0; e < depth; ++e) {
                    const vf value = v_set1(x[k * g + e]);
#pragma GCC unroll 8
                    for (int v = 0; v < VECTORS; ++v)
                        acc[v] = v_fma(value, v_load(column + e * RBE_BASIS_VECTORS + j + v * V_WIDTH), acc[v]);
                }
                for (int v = 0; v < VECTORS; ++v) v_store(p + j + v * V_WIDTH, acc[v]);
            }
        }
    }
}

float RBE_KERNEL(table_dot)(int64_t count, const uint8_t *idx, const float *scale, const float *p) {
    vf even = v_zero(), odd = v_zero();
    const vi lane = vi_shl(vi_iota(), 8), one = vi_set1(V_WIDTH * RBE_BASIS_VECTORS);
    int64_t q = 0;
    for (; q + 2 * V_WIDTH <= count; q += 2 * V_WIDTH, p += 2 * V_WIDTH * RBE_BASIS_VECTORS) {
        const vi at = vi_add(lane, vi_load_u8(idx + q)), next = vi_add(vi_add(lane, one), vi_load_u8(idx + q + V_WIDTH));
        const vf a = v_gather(p, at), b = v_gather(p, next);
        even = scale ? v_fma(v_load(scale + q), a, even) : v_add(a, even);
        odd = scale ? v_fma(v_load(scale + q + V_WIDTH), b, odd) : v_add(b, odd);
    }
    float sum = v_sum(v_add(even, odd));
    for (; q < count; ++q, p += RBE_BASIS_VECTORS) sum += scale ? scale[q] * p[idx[q]] : p[idx[q]];
    return sum;
}
