// What surrounds the products of a residual: bytes widened with their scales, tokens rounded to eight bits, the result added to y.
#include "codes.cuh"

constexpr int THREADS = 256;

static unsigned blocks_of(int64_t threads) { return (unsigned)((threads + THREADS - 1) / THREADS); }

template <class Out, class Real>
static __global__ void __launch_bounds__(THREADS)
    widen(const uint8_t *bytes, bool e4m3, int64_t rows, int64_t cols, const float *scale, bool by_row, typename Out::stored *out) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= rows * cols) return;
    const Real value = e4m3 ? (Real)cu_e4m3_to_f32(bytes[at]) : (Real)(int8_t)bytes[at];
    out[at] = Out::store(scale ? value * (Real)scale[by_row ? at / cols : at % cols] : value);
}
template <class Out, class Real = float>
static int launch_widen(const uint8_t *bytes, bool e4m3, int64_t rows, int64_t cols, const float *scale, bool by_row, void *out, void *stream) {
    return cu_launch(widen<Out, Real>, dim3(blocks_of(rows * cols)), dim3(THREADS), 0, (cudaStream_t)stream, bytes, e4m3, rows, cols, scale,
                     by_row, (typename Out::stored *)out);
}

int rbe_cu_widen(const void *bytes, bool e4m3, int64_t rows, int64_t cols, const float *scale, bool by_row, void *out, rbe_dtype dtype,
                 void *stream) {
    const uint8_t *from = (const uint8_t *)bytes;
    switch (dtype) {
        case RBE_F64: return launch_widen<cu_f64, double>(from, e4m3, rows, cols, scale, by_row, out, stream);
        case RBE_BF16: return launch_widen<cu_bf16>(from, e4m3, rows, cols, scale, by_row, out, stream);
        case RBE_F16: return launch_widen<cu_f16>(from, e4m3, rows, cols, scale, by_row, out, stream);
        default: return launch_widen<cu_f32>(from, e4m3, rows, cols, scale, by_row, out, stream);
    }
}

CU_DEVICE float load(const void *data, rbe_dtype dtype, int64_t at) {
    switch (dtype) {
        case RBE_BF16: return cu_bf16_to_f32(((const uint16_t *)data)[at]);
        case RBE_F16: return cu_f16_to_f32(((const uint16_t *)data)[at]);
        default: return ((const float *)data)[at];
    }
}

// A block a token: its largest number becomes 127, or 448 for e4m3. Tokens beyond the last are zeros.
static __global__ void __launch_bounds__(THREADS) round_tokens(rbe_cu_matrix x, bool e4m3, uint8_t *out, float *scale) {
    CU_SHARED(float, part, [THREADS / 32]);
    const int64_t t = blockIdx.x, n = x.cols;
    const bool there = t < x.rows;
    float most = 0;
    for (int64_t j = threadIdx.x; there && j < n; j += THREADS) most = fmaxf(most, fabsf(load(x.data, x.dtype, t * x.stride + j)));
    CU_UNROLL
    for (int step = 16; step; step >>= 1) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, step));
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = most;
    __syncthreads();
    for (int w = 0; w < THREADS / 32; ++w) most = fmaxf(most, part[w]);
    const float full = e4m3 ? 448.0f : 127.0f, unit = most / full;
    for (int64_t j = threadIdx.x; j < n; j += THREADS) {
        const float value = there && unit > 0 ? load(x.data, x.dtype, t * x.stride + j) / unit : 0.0f;
        const float safe = fabsf(value) <= full ? value : value > 0 ? full : value < 0 ? -full : 0.0f;  // NaN: 0
        out[t * n + j] = e4m3 ? cu_f32_to_e4m3(safe) : (uint8_t)(int8_t)rintf(safe);
    }
    if (threadIdx.x == 0 && there) scale[t] = unit;
}

int rbe_cu_round_tokens(const rbe_cu_matrix *x, int64_t padded, bool e4m3, uint8_t *out, float *scale, void *stream) {
    return cu_launch(round_tokens, dim3((unsigned)padded), dim3(THREADS), 0, (cudaStream_t)stream, *x, e4m3, out, scale);
}

template <class Sum>
static __global__ void __launch_bounds__(THREADS)
    add_scaled(const Sum *sums, const float *row_scale, const float *token_scale, rbe_cu_matrix y) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= y.rows * y.cols) return;
    const int64_t t = at / y.cols, i = at - t * y.cols, to = t * y.stride + i;
    const float value = load(y.data, y.dtype, to) + (float)sums[at] * row_scale[i] * token_scale[t];
    switch (y.dtype) {
        case RBE_BF16: ((uint16_t *)y.data)[to] = cu_f32_to_bf16(value); break;
        case RBE_F16: ((uint16_t *)y.data)[to] = cu_f32_to_f16(value); break;
        default: ((float *)y.data)[to] = value; break;
    }
}

int rbe_cu_add_scaled(const void *sums, bool integers, const float *row_scale, const float *token_scale, const rbe_cu_matrix *y,
                      void *stream) {
    const dim3 blocks(blocks_of(y->rows * y->cols));
    return integers ? cu_launch(add_scaled<int32_t>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, (const int32_t *)sums, row_scale,
                                token_scale, *y)
                    : cu_launch(add_scaled<float>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, (const float *)sums, row_scale,
                                token_scale, *y);
}
