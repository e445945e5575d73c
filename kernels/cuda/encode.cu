// Codes of a weight, a warp a group of a row: v = w / gain in units of the basis, then the search of one stage or of several.
#include "encode_stage.cuh"
#include "encode_stages.cuh"

constexpr int WARPS = 8, BLOCKS_EACH = 8;  // blocks a multiprocessor

template <bool SEVERAL>
static __global__ void __launch_bounds__(32 * WARPS, 2)
    encode(rbe_cu_search s, rbe_cu_target target, int32_t *words, char *memory, int64_t desk_bytes) {
    CU_DYNAMIC_SHARED(char, shared);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, warps = (int)blockDim.x >> 5;
    const int64_t first = (int64_t)blockIdx.x * warps + warp, step = (int64_t)gridDim.x * warps, g = s.codes.group, stages = s.codes.stages;
    const cu_desk d = cu_desk_at(memory ? memory + first * desk_bytes : shared + warp * desk_bytes, s.codes.group, SEVERAL, false);
    for (int64_t at = first; at < s.codes.rows * s.codes.groups; at += step) {
        const int64_t i = at / s.codes.groups, k = at % s.codes.groups, q = k * stages;
        const int64_t depth = (k + 1) * g <= s.codes.cols ? g : s.codes.cols - k * g;
        const double gain = cu_real_at(target.gain, target.real, i);
        const double *square = s.square + (depth == g ? 0 : stages * RBE_BASIS_VECTORS);
        if (gain == 0) {  // every code gives the same weight: the lowest word
            for (int64_t t = lane; t < stages; t += 32)
                words[at * stages + t] =
                    (int32_t)(s.codes.constant | (s.codes.seeded ? (uint32_t)cu_only(s.codes, i, q + t) << RBE_IDX_SHIFT : 0));
            continue;
        }
        for (int64_t e = lane; e < depth; e += 32) {
            const double w = cu_real_at(target.data, target.dtype, i * target.row_stride + (k * g + e) * target.col_stride);
            const double v = w / gain * s.unit[0];
            if (SEVERAL) cu_path(s, d, 0)[e] = (float)v;
            else d.v[e] = v;
        }
        __syncwarp();
        if (SEVERAL) {
            cu_encode_stages(s, 0, depth, square, d, i, q);
            if (lane < stages) words[at * stages + lane] = (int32_t)d.words[lane];
        } else {
            const uint32_t word = cu_encode_stage(s, 0, depth, d.v, square, cu_only(s.codes, i, q));
            if (lane == 0) words[at] = (int32_t)word;
        }
        __syncwarp();
    }
}

static int64_t blocks_of(const rbe_cu_codes *codes, int warps) {
    const int64_t wanted = (codes->rows * codes->groups + warps - 1) / warps, most = (int64_t)BLOCKS_EACH * cu_multiprocessors();
    return wanted < most ? wanted : most;
}

size_t rbe_cu_encode_memory(const rbe_cu_codes *codes, bool calibrated) {
    const size_t bytes = cu_desk_bytes(codes->group, codes->stages > 1, calibrated);
    if (cu_desks_fitting(bytes, WARPS)) return 0;
    const int64_t warps = calibrated ? (codes->rows + RBE_CU_CALIBRATED_ROWS - 1) / RBE_CU_CALIBRATED_ROWS * RBE_CU_CALIBRATED_ROWS
                                     : blocks_of(codes, WARPS) * WARPS;
    return bytes * (size_t)warps;
}

int rbe_cu_encode(const rbe_cu_search *search, const rbe_cu_target *target, int32_t *words, void *memory, void *stream) {
    const bool several = search->codes.stages > 1;
    const size_t bytes = cu_desk_bytes(search->codes.group, several, false);
    const int warps = memory ? WARPS : cu_desks_fitting(bytes, WARPS);
    const dim3 blocks((unsigned)blocks_of(&search->codes, warps)), threads((unsigned)(32 * warps));
    const size_t shared = memory ? 0 : bytes * (size_t)warps;
    return several ? cu_launch(encode<true>, blocks, threads, shared, (cudaStream_t)stream, *search, *target, words, (char *)memory, (int64_t)bytes)
                   : cu_launch(encode<false>, blocks, threads, shared, (cudaStream_t)stream, *search, *target, words, (char *)memory, (int64_t)bytes);
}
