// The search for near vectors: what every one of the 256 scores against a few targets, and which scores reach a limit.
//
// Targets are broadcast element by element, vectors of the basis lie in lanes, scores stay in registers: 256 * depth multiply-adds a target.
// Scores of different ISAs differ by rounding: a search decides among what the limit leaves by sums of its own (ops/encode.h).
#include "../kernels.h"
#include "simd.h"

enum {
    PARTS = RBE_SCORE_LANES / V_WIDTH,    // vectors that hold the largest scores of a target
    VECTORS = PARTS > 2 ? PARTS : 2,      // of scores side by side
    ROWS = V_WIDTH == 16 ? 8 : V_WIDTH == 1 ? 1 : 4,
};

V_INLINE void block(const int rows, int64_t depth, const float *v, int64_t v_row, const float *basis, const float *half, const float *inverse,
                    float *score, float *most) {
    vf top[ROWS][PARTS];
    for (int j = 0; j < RBE_BASIS_VECTORS; j += VECTORS * V_WIDTH) {
        vf acc[ROWS][VECTORS];
#pragma GCC unroll 16
        for (int c = 0; c < VECTORS; ++c) {
            const vf start = half ? v_sub(v_zero(), v_load(half + j + c * V_WIDTH)) : v_zero();
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r][c] = start;
        }
        for (int64_t e = 0; e < depth; ++e) {
            const float *line = basis + e * RBE_BASIS_VECTORS + j;
            vf b[VECTORS];
#pragma GCC unroll 16
            for (int c = 0; c < VECTORS; ++c) b[c] = v_load(line + c * V_WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const vf a = v_set1(v[r * v_row + e]);
#pragma GCC unroll 16
                for (int c = 0; c < VECTORS; ++c) acc[r][c] = v_fma(a, b[c], acc[r][c]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < VECTORS; ++c) {
                if (inverse) acc[r][c] = v_abs(v_mul(acc[r][c], v_load(inverse + j + c * V_WIDTH)));
                v_store(score + r * RBE_BASIS_VECTORS + j + c * V_WIDTH, acc[r][c]);
                top[r][c % PARTS] = j + c * V_WIDTH < RBE_SCORE_LANES ? acc[r][c] : v_max(acc[r][c], top[r][c % PARTS]);
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < PARTS; ++c) v_store(most + r * RBE_SCORE_LANES + c * V_WIDTH, top[r][c]);
}

void RBE_KERNEL(scores)(int64_t rows, int64_t depth, const float *v, int64_t v_row, const float *basis, const float *half, const float *inverse,
                        float *score, float *most) {
    for (; rows >= ROWS; rows -= ROWS, v += ROWS * v_row, score += ROWS * RBE_BASIS_VECTORS, most += ROWS * RBE_SCORE_LANES) {
        if (half) block(ROWS, depth, v, v_row, basis, half, NULL, score, most);
        else block(ROWS, depth, v, v_row, basis, NULL, inverse, score, most);
    }
    for (; rows > 0; --rows, v += v_row, score += RBE_BASIS_VECTORS, most += RBE_SCORE_LANES) block(1, depth, v, v_row, basis, half, inverse, score, most);
}

int64_t RBE_KERNEL(at_least)(const float *score, float limit, int32_t *at) {
    const vf least = v_set1(limit);
    int64_t found = 0;
    for (int j = 0; j < RBE_BASIS_VECTORS; j += V_WIDTH)
        for (uint32_t bits = v_ge_bits(v_load(score + j), least); bits; bits &= bits - 1) at[found++] = j + __builtin_ctz(bits);
    return found;
}
