// Calibrated encoding, first pass: group after group, the error of the earlier ones fed back through V (H = V V^T).
//
//     v_k = w_k V_kk + c_k,  c_k = sum over i < k of e_i V_ik      the search with the basis turned by V_kk gives the codes of group k
#include "encode_calibrated.cuh"

template <int SEARCH>
static __global__ void __launch_bounds__(32 * CU_ROWS, 1) encode_feedback(rbe_cu_calibrated c, int64_t desk_bytes) {
    CU_DYNAMIC_SHARED(char, shared);
    const rbe_cu_codes &codes = c.search.codes;
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, warps = (int)blockDim.x >> 5;
    const int64_t row0 = (int64_t)blockIdx.x * warps, i = row0 + warp, n = codes.cols, g = codes.group, stages = codes.stages;
    const int rows = codes.rows - row0 < warps ? (int)(codes.rows - row0) : warps;
    char *desks = c.memory ? (char *)c.memory + row0 * desk_bytes : shared;
    const cu_desk d = cu_desk_at(desks + warp * desk_bytes, codes.group, codes.stages > 1, true);
    const float *step = cu_desk_at(desks, codes.group, codes.stages > 1, true).step;
    const double gain = warp < rows ? cu_real_at(c.target.gain, c.target.real, i) : 1.0;
    for (int64_t k = 0, first = 0; k < codes.groups; ++k, first += g) {
        const int64_t depth = first + g <= n ? g : n - first;
        if (warp < rows) {
            for (int64_t e = lane; e < depth; e += 32) d.v[e] = c.pull[i * n + first + e];
            cu_add_target(c, d, i, k, depth);
            cu_search<SEARCH>(c, d, i, k, depth, gain);
            for (int64_t e = lane; e < depth; e += 32) {
                const float error = (float)(cu_weight_at(c.target, i, first + e) - cu_reconstructed(c, gain, d.words, e));
                c.error[i * n + first + e] = error;
                d.step[e] = error;
            }
            if (lane < stages) c.words[(i * codes.groups + k) * stages + lane] = (int32_t)d.words[lane];
        }
        cu_add_rows(c, row0, (1u << rows) - 1u, step, desk_bytes / 4, depth, first, first + depth, n);
    }
}

int rbe_cu_encode_feedback(const rbe_cu_calibrated *c, void *stream) {
    void (*const kernels[])(rbe_cu_calibrated, int64_t) = {encode_feedback<CU_ONE>, encode_feedback<CU_SEVERAL>, encode_feedback<CU_BY_SIGNS>};
    return cu_launch_rows(kernels, c, stream);
}
