// The gather of a table that a dense product made, in float32:
//
//     y[t, i] = gain[i] sum over q of scale(i, q) table[q, idx(i, q), t] + bias[i]
//
// A block has 32 tokens and 512 rows; a warp 32 rows, a lane one token and 32 sums. The tile of a q, 256 x 32 floats, comes by cp.async
// while the tile before is gathered; a gather reads 32 neighbouring words, so no banks conflict.
#include "cu.h"
#include "launch.h"

constexpr int TOKENS = 32, WARPS = 16, THREADS = 32 * WARPS, WARP_ROWS = 32, ROWS = WARPS * WARP_ROWS;

struct gather_shared {
    float table[2][RBE_BASIS_VECTORS][TOKENS];
    float scale[2][ROWS];
    uint8_t idx[2][ROWS];
};

struct gather_arguments {
    const float *table;
    int64_t tokens, pitch_t;
    const uint8_t *idx;
    const float *scale;
    int64_t pitch, rows, count;
    const float *gain, *bias;
    float *y;
    int64_t y_stride;
};

static __global__ void __launch_bounds__(THREADS) gather_f32(gather_arguments a) {
    CU_DYNAMIC_SHARED(gather_shared, shared);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const int64_t t0 = (int64_t)blockIdx.x * TOKENS, row0 = (int64_t)blockIdx.y * ROWS;
    float y[WARP_ROWS] = {};
    const auto load = [&](int64_t q) {
        const float *from = a.table + q * RBE_BASIS_VECTORS * a.pitch_t + t0;
        for (int p = (int)threadIdx.x; p < RBE_BASIS_VECTORS * TOKENS / 4; p += THREADS) {
            const int j = p / (TOKENS / 4), t = p % (TOKENS / 4) * 4;
            if (t0 + t < a.pitch_t) cu_cp_async16(&shared->table[q & 1][j][t], from + (int64_t)j * a.pitch_t + t);
        }
        if ((int)threadIdx.x < ROWS / 4)
            cu_cp_async16(&shared->scale[q & 1][4 * threadIdx.x], a.scale + q * a.pitch + row0 + 4 * threadIdx.x);
        if ((int)threadIdx.x < ROWS / 16)
            cu_cp_async16(&shared->idx[q & 1][16 * threadIdx.x], a.idx + q * a.pitch + row0 + 16 * threadIdx.x);
        cu_cp_commit();
    };
    load(0);
    for (int64_t q = 0; q < a.count; ++q) {
        cu_cp_wait(0);
        __syncthreads();  // the tile is there, and no warp gathers from the one before, which the next load overwrites
        if (q + 1 < a.count) load(q + 1);
        CU_UNROLL
        for (int r = 0; r < WARP_ROWS; ++r) {
            const int i = warp * WARP_ROWS + r;
            y[r] = fmaf(shared->scale[q & 1][i], shared->table[q & 1][shared->idx[q & 1][i]][lane], y[r]);
        }
    }
    const int64_t t = t0 + lane;
    if (t >= a.tokens) return;
    CU_UNROLL
    for (int r = 0; r < WARP_ROWS; ++r) {
        const int64_t i = row0 + warp * WARP_ROWS + r;
        if (i < a.rows) a.y[t * a.y_stride + i] = a.gain[i] * y[r] + (a.bias ? a.bias[i] : 0.0f);
    }
}

int rbe_cu_gather_f32(const float *table, int64_t pitch_t, const uint8_t *idx, const float *scale, int64_t pitch, int64_t rows,
                      int64_t count, const float *gain, const float *bias, const rbe_cu_matrix *y, void *stream) {
    const gather_arguments a = {table, y->rows, pitch_t, idx, scale, pitch, rows, count, gain, bias, (float *)y->data, y->stride};
    const dim3 blocks((unsigned)((y->rows + TOKENS - 1) / TOKENS), (unsigned)((rows + ROWS - 1) / ROWS));
    return cu_launch(gather_f32, blocks, dim3(THREADS), sizeof(gather_shared), (cudaStream_t)stream, a);
}
