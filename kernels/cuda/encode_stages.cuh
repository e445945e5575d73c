// Several stages: a beam in float32, then every stage again against what the others leave, until none improves (ops/encode_stages.c). Path b
// of the beam has its error in lane b.
#pragma once

#include "encode.cuh"

// rest of path p; the last one is the rounds' own
CU_DEVICE float *cu_path(const rbe_cu_search &s, const cu_desk &d, int p) { return d.paths + p * (s.codes.group + 1); }

CU_DEVICE double cu_size_of(int64_t depth, const float *v) {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e) sum += (double)v[e] * v[e];
    return sum;
}

// The error that every idx of a stage would add to |rest|^2 with its best unquantised scale, eight a lane.
CU_DEVICE void cu_bounds(const rbe_cu_search &s, int64_t table, int stage, int64_t depth, const float *rest, const double *square,
                         float *bound) {
    const int lane = (int)threadIdx.x & 31;
    const bool signs = s.codes.field == RBE_FIELD_RBE16S;
    const float *narrow = s.narrow + (table * s.codes.stages + stage) * s.codes.group * RBE_BASIS_VECTORS + lane;
    CU_UNROLL
    for (int u = 0; u < CU_EACH; ++u) bound[u] = 0;
    CU_NO_UNROLL
    for (int64_t e = 0; e < depth; ++e, narrow += RBE_BASIS_VECTORS) {
        const float value = signs ? fabsf(rest[e]) : rest[e];
        CU_UNROLL
        for (int u = 0; u < CU_EACH; ++u) bound[u] += value * narrow[32 * u];
    }
    CU_UNROLL
    for (int u = 0; u < CU_EACH; ++u) {
        const float size = (float)square[stage * RBE_BASIS_VECTORS + lane + 32 * u];
        bound[u] = !s.codes.scaled ? size - 2 * bound[u] : size > 0 ? -bound[u] * bound[u] / size : 0.0f;
    }
}

// The word of idx j against `rest` with the scale that fits it best. Lanes below `lanes` have numbers of their own.
CU_DEVICE uint32_t cu_fitted(const rbe_cu_search &s, int64_t table, int stage, int j, int64_t depth, const float *rest,
                             const double *square, int lanes) {
    const bool sizes = s.codes.field == RBE_FIELD_RBE16S;
    const double size = (double)(float)square[stage * RBE_BASIS_VECTORS + j];
    const uint32_t idx = (uint32_t)j << RBE_IDX_SHIFT;
    uint32_t signs = 0;
    double dot = 0;
    CU_NO_UNROLL
    for (int64_t e = 0; e < depth; ++e) {
        const double b = cu_element(s, table, stage, j, e), value = rest[e];
        if (sizes) signs |= (uint32_t)(value * b < 0) << e;
        dot += sizes ? fabs(value * b) : value * b;
    }
    if (!s.codes.scaled) return idx | signs;
    const cu_nearest n = cu_nearest_scale(s, size == 0 ? 0.0 : dot / size, lanes);
    return size == 0 ? idx | s.codes.constant : idx | n.word;
}

// element e of from + factor * vector(word)
CU_DEVICE float cu_with_vector(const rbe_cu_search &s, int64_t table, int stage, uint32_t word, float factor, float from, int64_t e) {
    const float scale = factor * (s.codes.scaled ? cu_word_scale(word) : 1.0f);
    const float b = scale * (float)cu_element(s, table, stage, cu_idx(word), e);
    return from + (s.codes.field == RBE_FIELD_RBE16S && (word >> e & 1u) ? -b : b);
}

// Path 0 of the desk holds what to encode; leaves the words of row i, codes q .. q+M-1, in d.words[0 .. M-1].
CU_DEVICE void cu_encode_stages(const rbe_cu_search &s, int64_t table, int64_t depth, const double *square, const cu_desk &d, int64_t i,
                                int64_t q) {
    const int lane = (int)threadIdx.x & 31, stages = s.codes.stages;
    double error = cu_size_of(depth, cu_path(s, d, 0));
    float bound[CU_EACH];
    int live = 1, now = 0;  // first path of the present beam: 0 or BEAM
    for (int stage = 0; stage < stages; ++stage) {
        const int only = cu_only(s.codes, i, q + stage), next = CU_BEAM - now;
        cu_kept<float> best = {0, 0, 0};
        for (int b = 0; b < live; ++b) {
            const float base = (float)__shfl_sync(CU_WARP, error, b);
            cu_bounds(s, table, stage, depth, cu_path(s, d, now + b), square, bound);
            if (only >= 0) {
                const float value = base + cu_pick(bound, only);
                if (best.count < CU_BEAM || value < __shfl_sync(CU_WARP, best.value, CU_BEAM - 1))
                    cu_keep(&best, CU_BEAM, value, b * RBE_BASIS_VECTORS + only);
                continue;
            }
            CU_UNROLL
            for (int u = 0; u < CU_EACH; ++u) {
                const float limit = __shfl_sync(CU_WARP, best.value, CU_BEAM - 1);
                if (best.count == CU_BEAM && !__ballot_sync(CU_WARP, base + bound[u] < limit)) continue;
                cu_keep_row(&best, CU_BEAM, base + bound[u], b * RBE_BASIS_VECTORS + 32 * u);
            }
        }
        live = best.count;
        const int from = lane < live ? best.tag / RBE_BASIS_VECTORS : 0, j = lane < live ? best.tag % RBE_BASIS_VECTORS : 0;
        const uint32_t word = cu_fitted(s, table, stage, j, depth, cu_path(s, d, now + from), square, live);
        if (lane < live) {
            for (int t = 0; t < stage; ++t) d.words[(next + lane) * CU_STAGES + t] = d.words[(now + from) * CU_STAGES + t];
            d.words[(next + lane) * CU_STAGES + stage] = word;
            d.from[lane] = now + from;
        }
        __syncwarp();
        for (int p = lane; p < live * (int)depth; p += 32) {
            const int b = p / (int)depth, e = p % (int)depth;
            cu_path(s, d, next + b)[e] =
                cu_with_vector(s, table, stage, d.words[(next + b) * CU_STAGES + stage], -1.0f, cu_path(s, d, d.from[b])[e], e);
        }
        __syncwarp();
        error = lane < live ? cu_size_of(depth, cu_path(s, d, next + lane)) : 0.0;
        now = next;
        __syncwarp();
    }
    const cu_least<double> least = cu_warp_least(cu_least<double>{lane < live ? error : INFINITY, lane});
    uint32_t *words = d.words + (now + least.at % CU_BEAM) * CU_STAGES;
    float *kept = cu_path(s, d, now + least.at % CU_BEAM), *rest = cu_path(s, d, 2 * CU_BEAM);
    double least_error = least.value;
    bool improved = true;
    for (int round = 0; improved && round < CU_ROUNDS; ++round) {
        improved = false;
        for (int stage = 0; stage < stages; ++stage) {
            for (int64_t e = lane; e < depth; e += 32) rest[e] = cu_with_vector(s, table, stage, words[stage], 1.0f, kept[e], e);
            __syncwarp();
            int j = cu_only(s.codes, i, q + stage);
            if (j < 0) {
                cu_bounds(s, table, stage, depth, rest, square, bound);
                j = cu_least_of(bound).at;
            }
            const uint32_t word = __shfl_sync(CU_WARP, cu_fitted(s, table, stage, j, depth, rest, square, 1), 0);
            __syncwarp();
            for (int64_t e = lane; e < depth; e += 32) rest[e] = cu_with_vector(s, table, stage, word, -1.0f, rest[e], e);
            __syncwarp();
            const double tried = cu_size_of(depth, rest);
            if (tried < least_error * (1 - 1e-6)) {
                for (int64_t e = lane; e < depth; e += 32) kept[e] = rest[e];
                if (lane == 0) words[stage] = word;
                least_error = tried;
                improved = true;
            }
            __syncwarp();
        }
    }
    if (lane < stages) d.words[lane] = words[lane];
    __syncwarp();
}
