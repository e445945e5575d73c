// The search for near vectors: what every one of the 256 scores against a few targets, and which scores reach a limit.
//
// Targets are broadcast element by element, vectors of the basis lie in lanes, scores stay in registers: 256 * depth multiply-adds a target.
// Scores of different ISAs differ by rounding: a search decides among what the limit leaves by sums of its own (ops/encode.h).
#include <math.h>

#include "../kernels.h"
#include "simd.h"

enum {
    PARTS = RBE_SCORE_LANES / V_WIDTH,    // vectors that hold the largest scores of a target
    MANY = PARTS > 2 ? PARTS : 2,         // vectors of scores side by side, of many targets
    ONE = V_WIDTH == 1 ? PARTS : 8,       // and of one target
    ROWS = V_WIDTH == 16 ? 8 : V_WIDTH == 1 ? 1 : 4,
};

V_INLINE void block(const int rows, const int vectors, int64_t depth, const float *v, int64_t v_row, const float *basis, const float *half, const float *inverse,
                    float *score, float *most, float *top) {
    vf best[ROWS][PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < PARTS; ++c) best[r][c] = v_set1(-INFINITY);
    for (int j = 0; j < RBE_BASIS_VECTORS; j += vectors * V_WIDTH) {
        vf acc[ROWS][ONE];
#pragma GCC unroll 16
        for (int c = 0; c < vectors; ++c) {
            const vf start = half ? v_sub(v_zero(), v_load(half + j + c * V_WIDTH)) : v_zero();
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r][c] = start;
        }
        for (int64_t e = 0; e < depth; ++e) {
            const float *line = basis + e * RBE_BASIS_VECTORS + j;
            vf b[ONE];
#pragma GCC unroll 16
            for (int c = 0; c < vectors; ++c) b[c] = v_load(line + c * V_WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const vf a = v_set1(v[r * v_row + e]);
#pragma GCC unroll 16
                for (int c = 0; c < vectors; ++c) acc[r][c] = v_fma(a, b[c], acc[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < vectors; ++c) {
                if (inverse) acc[r][c] = v_abs(v_mul(acc[r][c], v_load(inverse + j + c * V_WIDTH)));
                v_store(score + r * RBE_BASIS_VECTORS + j + c * V_WIDTH, acc[r][c]);
                best[r][c % PARTS] = v_max(acc[r][c], best[r][c % PARTS]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        vf largest = best[r][0];
        for (int c = 0; c < PARTS; ++c) {
            v_store(most + r * RBE_SCORE_LANES + c * V_WIDTH, best[r][c]);
            largest = v_max(largest, best[r][c]);
        }
        top[r] = v_largest(largest);
    }
}

void RBE_KERNEL(scores)(int64_t rows, int64_t depth, const float *v, int64_t v_row, const float *basis, const float *half, const float *inverse,
                        float *score, float *most, float *top) {
    for (; rows >= ROWS; rows -= ROWS, v += ROWS * v_row, score += ROWS * RBE_BASIS_VECTORS, most += ROWS * RBE_SCORE_LANES, top += ROWS) {
        if (half) block(ROWS, MANY, depth, v, v_row, basis, half, NULL, score, most, top);
        else block(ROWS, MANY, depth, v, v_row, basis, NULL, inverse, score, most, top);
    }
    for (; rows > 0; --rows, v += v_row, score += RBE_BASIS_VECTORS, most += RBE_SCORE_LANES, ++top)
        block(1, ONE, depth, v, v_row, basis, half, inverse, score, most, top);
}

// Sorting by counting: a lane is among the `want` smallest if fewer than that are below it.
float RBE_KERNEL(score_limit)(int64_t rows, const float *base, bool squared, const float *most, int want) {
    vf lane[PARTS], below[PARTS], limit = v_set1(-INFINITY);
    for (int c = 0; c < PARTS; ++c) {
        lane[c] = v_set1(INFINITY);
        below[c] = v_zero();
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int c = 0; c < PARTS; ++c) {
            const vf score = v_load(most + r * RBE_SCORE_LANES + c * V_WIDTH);
            lane[c] = v_min(v_sub(v_set1(base[r]), v_mul(squared ? score : v_set1(2.0f), score)), lane[c]);
        }
    }
    float each[RBE_SCORE_LANES];
    for (int c = 0; c < PARTS; ++c) v_store(each + c * V_WIDTH, lane[c]);
    for (int l = 0; l < RBE_SCORE_LANES; ++l)
        for (int c = 0; c < PARTS; ++c) below[c] = v_add(below[c], v_of_bits(vi_and(v_lt(v_set1(each[l]), lane[c]), v_bits(v_set1(1.0f)))));
    for (int c = 0; c < PARTS; ++c) {
        const vi taken = v_lt(below[c], v_set1((float)want));
        const vi kept = vi_or(vi_and(taken, v_bits(lane[c])), vi_and(vi_xor(taken, vi_set1(-1)), v_bits(v_set1(-INFINITY))));
        limit = v_max(v_of_bits(kept), limit);
    }
    return v_largest(limit);
}

// Mostly one is found, anywhere: no branch depends on where.
int64_t RBE_KERNEL(at_least)(const float *score, float limit, int32_t *at) {
    enum { STRETCHES = RBE_BASIS_VECTORS / 64 };
    const vf least = v_set1(limit);
    uint64_t bits[STRETCHES], any = 0;
    int64_t found = 0;
    int first = 0;
    for (int s = STRETCHES - 1; s >= 0; --s) {
        bits[s] = 0;
#pragma GCC unroll 16
        for (int c = 0; c < 64; c += V_WIDTH) bits[s] |= (uint64_t)v_ge_bits(v_load(score + 64 * s + c), least) << c;
        any |= bits[s];
        first = bits[s] ? s : first;
        found += __builtin_popcountll(bits[s]);
    }
    if (found == 1) {
        at[0] = 64 * first + __builtin_ctzll(any);
        return 1;
    }
    found = 0;
    for (int s = 0; s < STRETCHES; ++s)
        for (; bits[s]; bits[s] &= bits[s] - 1) at[found++] = 64 * s + __builtin_ctzll(bits[s]);
    return found;
}
