// W from codes: W[i, k*g + e] = gain[i] sum over s of scale basis[s, idx, e] (+- rbe16s) + residual[i, k*g + e]
//
// A thread decodes SPAN neighbouring columns of a row: 8 where they lie in one group (g a multiple of 8) and there is no residual, else 1.
// Sums in float32, or in float64 for the reference class, in the order of kernels/reference/weight.c.
#include "codes.cuh"

template <class Real, class Out, int SPAN>
static __global__ void decode(rbe_cu_codes codes, const Real *basis, const Real *gain, rbe_cu_residual residual, typename Out::stored *out,
                              int64_t stride) {
    const int64_t spans = (codes.cols + SPAN - 1) / SPAN, at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= codes.rows * spans) return;
    const int64_t i = at / spans, col = at % spans * SPAN;
    const int64_t k = col / codes.group, e = col - k * codes.group;
    Real sum[SPAN];
    CU_UNROLL
    for (int c = 0; c < SPAN; ++c) sum[c] = 0;
    for (int s = 0; s < codes.stages; ++s) {
        const int64_t q = k * codes.stages + s;
        const uint32_t word = cu_word(codes, i, q), signs = codes.field == RBE_FIELD_RBE16S ? word >> e : 0;
        const Real scale = cu_scale<Real>(codes, word, i, q);
        const Real *vector = basis + ((int64_t)s * RBE_BASIS_VECTORS + cu_idx(word)) * codes.group + e;
        CU_UNROLL
        for (int c = 0; c < SPAN; ++c) sum[c] += scale * (signs >> c & 1u ? -vector[c] : vector[c]);
    }
    const Real factor = gain[i];
    CU_UNROLL
    for (int c = 0; c < SPAN; ++c) {
        Real value = factor * sum[c];
        if (SPAN == 1) value += cu_residual<Real>(residual, codes.cols, i, col);
        if (col + c < codes.cols) out[i * stride + col + c] = Out::store(value);
    }
}

template <class Real, class Out, int SPAN>
static int run(const rbe_cu_codes *codes, const void *basis, const void *gain, const rbe_cu_residual *residual, const rbe_cu_matrix *out,
               void *stream) {
    enum { THREADS = 256 };
    const int64_t threads = codes->rows * ((codes->cols + SPAN - 1) / SPAN);
    return cu_launch(decode<Real, Out, SPAN>, dim3((unsigned)((threads + THREADS - 1) / THREADS)), dim3(THREADS), 0, (cudaStream_t)stream,
                     *codes, (const Real *)basis, (const Real *)gain, *residual, (typename Out::stored *)out->data, out->stride);
}

template <class Real, class Out>
static int spanned(const rbe_cu_codes *codes, const void *basis, const void *gain, const rbe_cu_residual *residual,
                   const rbe_cu_matrix *out, void *stream) {
    const bool one = codes->group % 8 || residual->kind != RBE_RESIDUAL_NONE;
    return one ? run<Real, Out, 1>(codes, basis, gain, residual, out, stream)
               : run<Real, Out, 8>(codes, basis, gain, residual, out, stream);
}

int rbe_cu_decode(const rbe_cu_codes *codes, const void *basis, const void *gain, const rbe_cu_residual *residual, const rbe_cu_matrix *out,
                  void *stream) {
    switch (out->dtype) {
        case RBE_F64: return spanned<double, cu_f64>(codes, basis, gain, residual, out, stream);
        case RBE_BF16: return spanned<float, cu_bf16>(codes, basis, gain, residual, out, stream);
        case RBE_F16: return spanned<float, cu_f16>(codes, basis, gain, residual, out, stream);
        default: return spanned<float, cu_f32>(codes, basis, gain, residual, out, stream);
    }
}
