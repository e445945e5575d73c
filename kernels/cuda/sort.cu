// Rows sorted by code, for every q: order[q, start[q, j] .. start[q, j+1]-1] are the rows whose idx is j, rising.
//
// A block a q, a counting sort in two passes. Each of 8 warps has an eighth of the rows and counts of its own; lanes with one idx find each
// other by match, so nothing is atomic and the order is the same in every run.
#include "cu.h"
#include "launch.h"

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// lanes of the warp whose row exists and has the same idx; 0 where the lane's own row does not exist
CU_DEVICE unsigned lanes_alike(bool there, uint8_t idx) {
    const unsigned key = there ? idx : 256u + (threadIdx.x & 31);
    const unsigned alike = __match_any_sync(0xFFFFFFFFu, key);
    return there ? alike : 0u;
}

static __global__ void __launch_bounds__(THREADS)
    sort_rows(const uint8_t *idx, int64_t pitch, int64_t rows, int32_t *order, int32_t *start) {
    CU_SHARED(int32_t, next, [WARPS][RBE_BASIS_VECTORS]);
    CU_SHARED(int32_t, total, [RBE_BASIS_VECTORS]);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, j = (int)threadIdx.x;
    const int64_t q = blockIdx.x, share = (rows + 32 * WARPS - 1) / (32 * WARPS) * 32;
    const int64_t begin = warp * share, end = begin + share < rows ? begin + share : rows;
    const uint8_t *at = idx + q * pitch;
    for (int w = 0; w < WARPS; ++w) next[w][j] = 0;
    __syncthreads();
    for (int64_t i0 = begin; i0 < end; i0 += 32) {
        const bool there = i0 + lane < end;
        const uint8_t value = there ? at[i0 + lane] : (uint8_t)0;
        const unsigned alike = lanes_alike(there, value);
        if (there && !(alike & ((1u << lane) - 1u))) next[warp][value] += __popc(alike);  // the first of them
        __syncwarp();
    }
    __syncthreads();
    int32_t count = 0;
    for (int w = 0; w < WARPS; ++w) count += next[w][j];
    total[j] = count;
    __syncthreads();
    for (int reach = 1; reach < RBE_BASIS_VECTORS; reach *= 2) {  // running sums
        const int32_t left = j >= reach ? total[j - reach] : 0;
        __syncthreads();
        total[j] += left;
        __syncthreads();
    }
    int32_t place = total[j] - count;
    start[q * (RBE_BASIS_VECTORS + 1) + j] = place;
    if (j == RBE_BASIS_VECTORS - 1) start[q * (RBE_BASIS_VECTORS + 1) + RBE_BASIS_VECTORS] = total[j];
    for (int w = 0; w < WARPS; ++w) {
        const int32_t some = next[w][j];
        next[w][j] = place;
        place += some;
    }
    __syncthreads();
    for (int64_t i0 = begin; i0 < end; i0 += 32) {
        const bool there = i0 + lane < end;
        const uint8_t value = there ? at[i0 + lane] : (uint8_t)0;
        const unsigned alike = lanes_alike(there, value), before = alike & ((1u << lane) - 1u);
        const int32_t first = there ? next[warp][value] : 0;
        __syncwarp();
        if (there) order[q * rows + first + __popc(before)] = (int32_t)(i0 + lane);
        if (there && !before) next[warp][value] = first + __popc(alike);
        __syncwarp();
    }
}

int rbe_cu_sort(const uint8_t *idx, int64_t pitch, int64_t rows, int64_t count, int32_t *order, int32_t *start, void *stream) {
    return cu_launch(sort_rows, dim3((unsigned)count), dim3(THREADS), 0, (cudaStream_t)stream, idx, pitch, rows, order, start);
}
