// Two small kernels with one planted bug each, chosen at compile time of the call: what the tool must catch. Bug::none is correct.
#pragma once
#include "kernels/cuda/cu.h"

enum class Bug {
    none,
    read_past_table,
    no_barrier_after_fill,
    no_barrier_before_reading,
    race_across_blocks,
    mask_of_absent_lanes,
    divergent_barrier,
    no_wait,
    no_barrier_at_end_of_loop
};

// y[o] = sum over k of table[code[o, k]] x[k]; grid (rows, splits of k), 256 threads
template <Bug bug>
static __global__ void lookup(const uint8_t *code, const float *table_in, const float *x, float *y, int cols) {
    CU_SHARED(float, table, [256]);
    CU_SHARED(float, part, [8]);
    const int t = (int)threadIdx.x, row = (int)blockIdx.x;
    table[t] = table_in[bug == Bug::read_past_table ? t + 1 : t];
    if (bug != Bug::no_barrier_after_fill) __syncthreads();
    float sum = 0.0f;
    for (int k = (int)blockIdx.y * 256 + t; k < cols; k += 256 * (int)gridDim.y) sum += table[code[(size_t)row * cols + k]] * x[k];
    sum = cu_warp_sum(sum);
    if ((t & 31) == 0) part[t >> 5] = sum;
    if (bug != Bug::no_barrier_before_reading) __syncthreads();
    if (t < 8) {
        float total = part[t];
        for (int step = 4; step; step >>= 1)
            total += __shfl_xor_sync(bug == Bug::mask_of_absent_lanes ? 0xFFFFFFFFu : 0xFFu, total, step);
        if (t == 0 && bug == Bug::race_across_blocks) y[row] += total;
        if (t == 0 && bug != Bug::race_across_blocks) y[(size_t)blockIdx.y * gridDim.x + row] = total;
    }
    if (bug == Bug::divergent_barrier && t < 128) __syncthreads();
}

// d[16, 8] = a[16, depth] b[8, depth]^T, bf16, one warp of two that share the loads, two stages of cp.async
template <Bug bug>
static __global__ void pipeline(const uint16_t *a, const uint16_t *b, float *d, int depth) {
    CU_SHARED(uint16_t, stage, [2][24][24]);
    const int t = (int)threadIdx.x, lane = t & 31, warp = t >> 5;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int steps = depth / 16;
    for (int step = -1; step < steps; ++step) {
        if (step + 1 < steps && t < 48) {
            const int r = t >> 1, part = (t & 1) * 8;
            const uint16_t *from = (r < 16 ? a + (size_t)r * depth : b + (size_t)(r - 16) * depth) + (step + 1) * 16 + part;
            cu_cp_async16(&stage[(step + 1) & 1][r][part], from);
        }
        cu_cp_commit();
        if (step < 0) continue;
        if (bug != Bug::no_wait) cu_cp_wait(1);
        __syncthreads();
        if (warp == step % 2) {
            uint32_t fragment[4], other[4];
            cu_ldmatrix_x4(fragment, &stage[step & 1][lane & 15][(lane >> 4) * 8]);
            cu_ldmatrix_x4(other, &stage[step & 1][16 + (lane & 7)][((lane >> 3) & 1) * 8]);
            cu_mma_bf16(sum, fragment, other);
        }
        if (bug != Bug::no_barrier_at_end_of_loop) __syncthreads();
    }
    cu_cp_wait(0);
    for (int i = 0; i < 4; ++i) d[warp * 128 + ((lane >> 2) + 8 * (i >> 1)) * 8 + 2 * (lane & 3) + (i & 1)] = sum[i];
}
