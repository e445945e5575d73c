// One stage: the joint minimum of |v - scale b_j|^2 over idx j and scale in float64; ties to the lowest word (ops/encode_stage.c).
#pragma once

#include "encode.cuh"

struct cu_word_error {
    uint32_t word;
    double error;
};

// The word with the best scale for idx j; the same in every lane.
CU_DEVICE cu_word_error cu_word_of(const rbe_cu_search &s, int64_t table, int j, int64_t depth, const double *v, double dot, double square) {
    const uint32_t idx = (uint32_t)j << RBE_IDX_SHIFT;
    if (!s.codes.scaled) {
        uint32_t signs = 0;
        if (s.codes.field == RBE_FIELD_RBE16S) {
            const int e = (int)threadIdx.x & 31;
            signs = __ballot_sync(CU_WARP, e < depth && v[e] * cu_element(s, table, 0, j, e) < 0);
        }
        return {idx | signs, square - 2 * dot};
    }
    if (square == 0) return {idx | s.codes.constant, 0};
    cu_nearest n = cu_nearest_scale(s, dot / square, 1);
    n.scale = __shfl_sync(CU_WARP, n.scale, 0);
    n.word = __shfl_sync(CU_WARP, n.word, 0);
    return {idx | n.word, square * n.scale * n.scale - 2 * n.scale * dot};
}

// only: the idx of a seeded layout, else -1.
CU_DEVICE uint32_t cu_encode_stage(const rbe_cu_search &s, int64_t table, int64_t depth, const double *v, const double *square, int only) {
    const double slack = 1e-12;  // what rounding may put between two errors that are one
    const int lane = (int)threadIdx.x & 31;
    const bool signs = s.codes.field == RBE_FIELD_RBE16S;
    const double *wide = s.wide + table * s.codes.group * RBE_BASIS_VECTORS + lane;
    double dot[CU_EACH] = {}, bound[CU_EACH];
    CU_NO_UNROLL
    for (int64_t e = 0; e < depth; ++e, wide += RBE_BASIS_VECTORS) {
        const double value = signs ? fabs(v[e]) : v[e];
        CU_UNROLL
        for (int u = 0; u < CU_EACH; ++u) dot[u] += value * wide[32 * u];
    }
    CU_UNROLL
    for (int u = 0; u < CU_EACH; ++u) {
        const double size = square[lane + 32 * u];
        bound[u] = !s.codes.scaled ? size - 2 * dot[u] : size > 0 ? -dot[u] * dot[u] / size : 0.0;
    }
    const int first = only < 0 ? cu_least_of(bound).at : only;
    cu_word_error best = cu_word_of(s, table, first, depth, v, cu_pick(dot, first), square[first]);
    if (only >= 0) return best.word;
    CU_NO_UNROLL
    for (int u = 0; u < CU_EACH; ++u) {
        const double bound_u = bound[0], dot_u = dot[0];
        CU_UNROLL
        for (int c = 1; c < CU_EACH; ++c) {  // the next one moves up: an index would put them into memory
            bound[c - 1] = bound[c];
            dot[c - 1] = dot[c];
        }
        unsigned left = __ballot_sync(CU_WARP, !(bound_u > best.error + slack * fabs(best.error)) && lane + 32 * u != first);
        for (; left; left &= left - 1) {
            const int from = __ffs((int)left) - 1, j = from + 32 * u;
            if (__shfl_sync(CU_WARP, bound_u, from) > best.error + slack * fabs(best.error)) continue;
            const cu_word_error tried = cu_word_of(s, table, j, depth, v, __shfl_sync(CU_WARP, dot_u, from), square[j]);
            if (tried.error < best.error || (tried.error == best.error && tried.word < best.word)) best = tried;
        }
    }
    return best.word;
}
