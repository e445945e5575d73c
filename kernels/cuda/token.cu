// y = x W^T for a few tokens of codes that have a scale:
//
//     table[t, q, j] = <x_t,k, basis[s, j]>             q = k*M + s: 256 dot products of g numbers each
//     y[t, i] = gain[i] sum over q of scale(i, q) table[t, q, idx(i, q)] + bias[i]
//
// The table of a token is Q KiB, so the gathers hit L1 or L2. Codes are read once for up to PER_PASS tokens, and their scales made on the
// way.
#include "codes.cuh"

constexpr int PER_PASS = 4, THREADS = 256, ROWS = THREADS / 32;

template <class Act>
static __global__ void __launch_bounds__(THREADS) token_table(const typename Act::stored *x, int64_t stride, int64_t tokens, int64_t cols,
                                                              int group, int stages, const float *basis, float *table) {
    const int64_t q = blockIdx.x, k = q / stages, col = k * group, t0 = (int64_t)blockIdx.y * PER_PASS;
    const int j = (int)threadIdx.x, some = (int)(tokens - t0 < PER_PASS ? tokens - t0 : PER_PASS);
    const int width = (int)(cols - col < group ? cols - col : group);
    const float *vector = basis + ((q % stages) * RBE_BASIS_VECTORS + j) * group;
    float sum[PER_PASS];
    CU_UNROLL
    for (int t = 0; t < PER_PASS; ++t) sum[t] = 0.0f;
    for (int e = 0; e < width; ++e) {
        const float b = vector[e];
        CU_UNROLL
        for (int t = 0; t < PER_PASS; ++t)
            if (t < some) sum[t] = fmaf(Act::load(x[(t0 + t) * stride + col + e]), b, sum[t]);
    }
    CU_UNROLL
    for (int t = 0; t < PER_PASS; ++t)
        if (t < some) table[((t0 + t) * (int64_t)gridDim.x + q) * RBE_BASIS_VECTORS + j] = sum[t];
}

template <class Act>
static __global__ void __launch_bounds__(THREADS) token_gather(rbe_cu_codes codes, const float *table, const float *gain, const float *bias,
                                                               typename Act::stored *y, int64_t stride, int64_t tokens) {
    const int lane = (int)threadIdx.x & 31;
    const int64_t i = (int64_t)blockIdx.x * ROWS + (threadIdx.x >> 5), t0 = (int64_t)blockIdx.y * PER_PASS,
                  count = codes.groups * codes.stages;
    const int some = (int)(tokens - t0 < PER_PASS ? tokens - t0 : PER_PASS);
    if (i >= codes.rows) return;  // a whole warp
    float sum[PER_PASS];
    CU_UNROLL
    for (int t = 0; t < PER_PASS; ++t) sum[t] = 0.0f;
    for (int64_t q = lane; q < count; q += 32) {
        const uint32_t word = cu_word(codes, i, q);
        const float scale = cu_scale<float>(codes, word, i, q);
        const float *at = table + (t0 * count + q) * RBE_BASIS_VECTORS + cu_idx(word);
        CU_UNROLL
        for (int t = 0; t < PER_PASS; ++t)
            if (t < some) sum[t] = fmaf(scale, at[(int64_t)t * count * RBE_BASIS_VECTORS], sum[t]);
    }
    CU_UNROLL
    for (int t = 0; t < PER_PASS; ++t) {
        const float total = cu_warp_sum(sum[t]);
        if (t < some && lane == 0) y[(t0 + t) * stride + i] = Act::store(gain[i] * total + (bias ? bias[i] : 0.0f));
    }
}

template <class Act>
static int table_of(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *table, void *stream) {
    return cu_launch(token_table<Act>, dim3((unsigned)(codes->groups * codes->stages), (unsigned)((x->rows + PER_PASS - 1) / PER_PASS)),
                     dim3(THREADS), 0, (cudaStream_t)stream, (const typename Act::stored *)x->data, x->stride, x->rows, x->cols,
                     codes->group, codes->stages, basis, table);
}
template <class Act>
static int gather(const rbe_cu_codes *codes, const float *table, const float *gain, const float *bias, const rbe_cu_matrix *y,
                  void *stream) {
    return cu_launch(token_gather<Act>, dim3((unsigned)((codes->rows + ROWS - 1) / ROWS), (unsigned)((y->rows + PER_PASS - 1) / PER_PASS)),
                     dim3(THREADS), 0, (cudaStream_t)stream, *codes, table, gain, bias, (typename Act::stored *)y->data, y->stride,
                     y->rows);
}

int rbe_cu_token_table(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *table, void *stream) {
    return x->dtype == RBE_BF16  ? table_of<cu_bf16>(codes, x, basis, table, stream)
           : x->dtype == RBE_F16 ? table_of<cu_f16>(codes, x, basis, table, stream)
                                 : table_of<cu_f32>(codes, x, basis, table, stream);
}
int rbe_cu_token_gather(const rbe_cu_codes *codes, const float *table, const float *gain, const float *bias, const rbe_cu_matrix *y,
                        void *stream) {
    return y->dtype == RBE_BF16  ? gather<cu_bf16>(codes, table, gain, bias, y, stream)
           : y->dtype == RBE_F16 ? gather<cu_f16>(codes, table, gain, bias, y, stream)
                                 : gather<cu_f32>(codes, table, gain, bias, y, stream);
}
