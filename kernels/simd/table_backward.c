// The codes' part of the backward, one group and stage at a time: rows sorted by code, so that a code's P and dP stay in registers while
// the rows that use it pass by once.
//
//     d[p] += dot(dy[row[p]], P[j])          dp[j] = sum over the places p of code j of factor[p] * dy[row[p]]
#include "../kernels.h"
#include "simd.h"

enum { VECTORS_MAX = 4 };

V_INLINE void places_of(const int vecs, const int32_t *start, const int32_t *row, const float *factor, const float *dy, const float *p,
                        float *d, float *dp) {
    const int64_t w = vecs * V_WIDTH;
    vf part[V_WIDTH];  // dot products of V_WIDTH places before their lanes are summed
    int filled = 0;
    int32_t done = 0;
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
        vf table[VECTORS_MAX], acc[VECTORS_MAX];
        for (int v = 0; v < vecs; ++v) {
            table[v] = v_load(p + j * w + v * V_WIDTH);
            acc[v] = v_zero();
        }
        for (int32_t place = start[j]; place < start[j + 1]; ++place) {
            const float *line = dy + (int64_t)row[place] * w;
            const vf f = v_set1(factor[place]);
            const char *soon = (const char *)(dy + (int64_t)row[place + RBE_PLACES_AHEAD] * w);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; ++v) __builtin_prefetch(soon + v * 64);
            vf dot = v_zero();
#pragma GCC unroll 4
            for (int v = 0; v < vecs; ++v) {
                const vf g = v_load(line + v * V_WIDTH);
                dot = v_fma(g, table[v], dot);
                acc[v] = v_fma(f, g, acc[v]);
            }
            part[filled++] = dot;
            if (filled == V_WIDTH) {
                v_store(d + done, v_add(v_load(d + done), v_sums(part)));
                done += V_WIDTH;
                filled = 0;
            }
        }
        for (int v = 0; v < vecs; ++v) v_store(dp + j * w + v * V_WIDTH, acc[v]);
    }
    if (filled) {
        for (int i = filled; i < V_WIDTH; ++i) part[i] = v_zero();
        v_store_n(d + done, v_add(v_load_n(d + done, filled), v_sums(part)), filled);
    }
}

void RBE_KERNEL(table_backward)(const int32_t *start, const int32_t *row, const float *factor, const float *dy, const float *p, int64_t w,
                                float *d, float *dp) {
    if (w == 4 * V_WIDTH)
        places_of(4, start, row, factor, dy, p, d, dp);
    else
        places_of(2, start, row, factor, dy, p, d, dp);
}
