// rbe16s under a metric: least |v - (sum of s o b) F|^2 (ops/encode_signs.c). Vectors are ranked by the metric's diagonal, eight a lane; a
// lane then flips the signs of one of the best twelve.
#pragma once

#include "encode.cuh"

constexpr int CU_SIGNS = 8, CU_CANDIDATES = 12, CU_FLIP_ROUNDS = 4, CU_STAGE_ROUNDS = 3;

struct cu_metric {
    int depth;
    const void *basis;        // [M, 256, 8] of type real
    rbe_dtype real;
    const double *factor;     // F [depth, depth], upper triangular
    double square[CU_SIGNS];  // |row i of F|^2; 0 beyond depth
};

CU_DEVICE double cu_sign_element(const cu_metric &f, int stage, int j, int e) {
    return cu_real_at(f.basis, f.real, ((int64_t)stage * RBE_BASIS_VECTORS + j) * CU_SIGNS + e);
}

// rest += sign * (s o b) F
CU_DEVICE void cu_add_signed(const cu_metric &f, int stage, uint32_t word, double sign, double *rest) {
    CU_UNROLL
    for (int i = 0; i < CU_SIGNS; ++i) {
        if (i >= f.depth) continue;
        const double b = cu_sign_element(f, stage, (int)cu_idx(word), i), value = sign * (word >> i & 1u ? -b : b);
        CU_UNROLL
        for (int j = i; j < CU_SIGNS; ++j)
            if (j < f.depth) rest[j] += value * f.factor[i * f.depth + j];
    }
}

// Flips the word's signs while one flip lowers |rest|^2; returns |rest|^2.
CU_DEVICE double cu_flip(const cu_metric &f, int stage, uint32_t *word, double *rest) {
    bool flipped = true;
    CU_NO_UNROLL
    for (int round = 0; flipped && round < CU_FLIP_ROUNDS; ++round) {
        flipped = false;
        CU_UNROLL
        for (int i = 0; i < CU_SIGNS; ++i) {
            if (i >= f.depth) continue;
            const double b = cu_sign_element(f, stage, (int)cu_idx(*word), i), value = *word >> i & 1u ? -b : b;
            double along = 0;
            CU_UNROLL
            for (int j = i; j < CU_SIGNS; ++j)
                if (j < f.depth) along += rest[j] * f.factor[i * f.depth + j];
            if (4 * value * along + 4 * value * value * f.square[i] < -1e-12 * f.square[i] * value * value) {
                CU_UNROLL
                for (int j = i; j < CU_SIGNS; ++j)
                    if (j < f.depth) rest[j] += 2 * value * f.factor[i * f.depth + j];
                *word ^= 1u << i;
                flipped = true;
            }
        }
    }
    double sum = 0;
    CU_UNROLL
    for (int e = 0; e < CU_SIGNS; ++e)
        if (e < f.depth) sum += rest[e] * rest[e];
    return sum;
}

// The best code of one stage for v, and rest = v - (s o b) F; returns |rest|^2. The same in every lane.
CU_DEVICE double cu_choose_signs(const cu_metric &f, int stage, const double *v, uint32_t *word, double *rest) {
    const int lane = (int)threadIdx.x & 31;
    double target[CU_SIGNS];
    CU_UNROLL
    for (int j = 0; j < CU_SIGNS; ++j) {  // target F = v
        target[j] = 0;
        if (j >= f.depth) continue;
        double left = v[j];
        CU_UNROLL
        for (int i = 0; i < j; ++i) left -= target[i] * f.factor[i * f.depth + j];
        target[j] = left / f.factor[j * f.depth + j];
    }
    cu_kept<double> best = {0, 0, 0};
    CU_NO_UNROLL
    for (int first = 0; first < RBE_BASIS_VECTORS; first += 32) {
        double value = 0;
        CU_UNROLL
        for (int i = 0; i < CU_SIGNS; ++i) {
            if (i >= f.depth) continue;
            const double left = fabs(target[i]) - fabs(cu_sign_element(f, stage, first + lane, i));
            value += f.square[i] * left * left;
        }
        cu_keep_row(&best, CU_CANDIDATES, value, first);
    }
    uint32_t tried = (uint32_t)(lane < CU_CANDIDATES ? best.tag : 0) << RBE_IDX_SHIFT;
    double left[CU_SIGNS];
    CU_UNROLL
    for (int i = 0; i < CU_SIGNS; ++i) {
        left[i] = v[i];
        if (i < f.depth) tried |= (uint32_t)(target[i] * cu_sign_element(f, stage, (int)cu_idx(tried), i) < 0) << i;
    }
    cu_add_signed(f, stage, tried, -1, left);
    const double error = cu_flip(f, stage, &tried, left);
    const cu_least<double> least = cu_warp_least(cu_least<double>{lane < CU_CANDIDATES ? error : INFINITY, lane});
    *word = __shfl_sync(CU_WARP, tried, least.at);
    CU_UNROLL
    for (int i = 0; i < CU_SIGNS; ++i) rest[i] = __shfl_sync(CU_WARP, left[i], least.at);
    return least.value;
}

// v [depth] in units of the basis; words[0 .. M-1] in the desk's memory, written by lane 0.
CU_DEVICE void cu_encode_signs(int stages, const void *basis, rbe_dtype real, int64_t depth, const double *factor, const double *v,
                               uint32_t *words) {
    const int lane = (int)threadIdx.x & 31;
    cu_metric f;
    f.depth = (int)depth;
    f.basis = basis;
    f.real = real;
    f.factor = factor;
    double rest[CU_SIGNS], left[CU_SIGNS], error = 0;
    uint32_t word = 0;
    CU_UNROLL
    for (int i = 0; i < CU_SIGNS; ++i) {
        f.square[i] = 0;
        rest[i] = i < f.depth ? v[i] : 0.0;
        CU_UNROLL
        for (int j = i; j < CU_SIGNS; ++j)
            if (i < f.depth && j < f.depth) f.square[i] += factor[i * f.depth + j] * factor[i * f.depth + j];
    }
    CU_NO_UNROLL
    for (int stage = 0; stage < stages; ++stage) {
        error = cu_choose_signs(f, stage, rest, &word, left);
        if (lane == 0) words[stage] = word;
        CU_UNROLL
        for (int i = 0; i < CU_SIGNS; ++i) rest[i] = left[i];
    }
    __syncwarp();
    CU_NO_UNROLL
    for (int turn = 0; stages > 1 && turn < CU_STAGE_ROUNDS * stages; ++turn) {
        const int stage = turn % stages;
        double again[CU_SIGNS];
        CU_UNROLL
        for (int i = 0; i < CU_SIGNS; ++i) again[i] = rest[i];
        cu_add_signed(f, stage, words[stage], 1, again);
        const double tried = cu_choose_signs(f, stage, again, &word, left);
        if (tried < error) {
            error = tried;
            if (lane == 0) words[stage] = word;
            CU_UNROLL
            for (int i = 0; i < CU_SIGNS; ++i) rest[i] = left[i];
        }
        __syncwarp();
    }
}
