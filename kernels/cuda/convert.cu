// What surrounds the products: copies of strided arrays, transposes, sums of partial results and of columns, and the device itself.
#include "cu.h"
#include "launch.h"

enum { THREADS = 256, TILE = 32, TILE_ROWS = 8 };

static unsigned blocks_of(int64_t threads) { return (unsigned)((threads + THREADS - 1) / THREADS); }

CU_DEVICE double load_any(const void *data, rbe_dtype dtype, int64_t at) {
    switch (dtype) {
        case RBE_F64: return ((const double *)data)[at];
        case RBE_BF16: return cu_bf16_to_f32(((const uint16_t *)data)[at]);
        case RBE_F16: return cu_f16_to_f32(((const uint16_t *)data)[at]);
        default: return ((const float *)data)[at];
    }
}
// From float64 to a half type the value is rounded twice, by way of float32.
CU_DEVICE void store_any(void *data, rbe_dtype dtype, int64_t at, double value) {
    switch (dtype) {
        case RBE_F64: ((double *)data)[at] = value; break;
        case RBE_BF16: ((uint16_t *)data)[at] = cu_f32_to_bf16((float)value); break;
        case RBE_F16: ((uint16_t *)data)[at] = cu_f32_to_f16((float)value); break;
        default: ((float *)data)[at] = (float)value; break;
    }
}

static __global__ void copy(rbe_cu_strided from, int64_t count, bool convert, void *to, rbe_dtype dtype) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= count) return;
    int64_t offset = 0, rest = at;
    for (int d = from.dims - 1; d >= 0; --d) {
        const int64_t outer = rest / from.sizes[d];
        offset += (rest - outer * from.sizes[d]) * from.strides[d];
        rest = outer;
    }
    if (convert) {
        store_any(to, dtype, at, load_any(from.data, from.dtype, offset));
    } else {
        switch (from.element) {
            case 1: ((uint8_t *)to)[at] = ((const uint8_t *)from.data)[offset]; break;
            case 2: ((uint16_t *)to)[at] = ((const uint16_t *)from.data)[offset]; break;
            case 4: ((uint32_t *)to)[at] = ((const uint32_t *)from.data)[offset]; break;
            default: ((uint64_t *)to)[at] = ((const uint64_t *)from.data)[offset]; break;
        }
    }
}

int rbe_cu_copy(const rbe_cu_strided *from, bool convert, void *to, rbe_dtype dtype, void *stream) {
    int64_t count = 1;
    for (int d = 0; d < from->dims; ++d) count *= from->sizes[d];
    if (count == 0) return 0;
    return cu_launch(copy, dim3(blocks_of(count)), dim3(THREADS), 0, (cudaStream_t)stream, *from, count, convert, to, dtype);
}

static __global__ void transpose(rbe_cu_matrix from, rbe_cu_matrix to, int64_t column_tiles) {
    CU_SHARED(double, tile, [TILE][TILE + 1]);
    const int64_t t0 = (int64_t)blockIdx.x / column_tiles * TILE, j0 = (int64_t)blockIdx.x % column_tiles * TILE;
    const int tx = (int)threadIdx.x, ty = (int)threadIdx.y;
    for (int r = ty; r < TILE; r += TILE_ROWS) {
        const int64_t t = t0 + r, j = j0 + tx;
        tile[r][tx] = t < from.rows && j < from.cols ? load_any(from.data, from.dtype, t * from.stride + j) : 0.0;
    }
    __syncthreads();
    for (int r = ty; r < TILE; r += TILE_ROWS) {
        const int64_t t = t0 + tx, j = j0 + r;
        if (j < from.cols && t < to.stride) store_any(to.data, to.dtype, j * to.stride + t, tile[tx][r]);
    }
}

int rbe_cu_transpose(const rbe_cu_matrix *from, const rbe_cu_matrix *to, void *stream) {
    const int64_t row_tiles = (to->stride + TILE - 1) / TILE, column_tiles = (from->cols + TILE - 1) / TILE;
    if (row_tiles * column_tiles == 0) return 0;
    return cu_launch(transpose, dim3((unsigned)(row_tiles * column_tiles)), dim3(TILE, TILE_ROWS), 0, (cudaStream_t)stream, *from, *to,
                     column_tiles);
}

static __global__ void narrow_basis(const float *basis, int64_t vectors, int group, int depth, rbe_dtype dtype, uint16_t *out) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, v = at / depth;
    if (v >= vectors) return;
    const int e = (int)(at - v * depth);
    const float value = e < group ? basis[v * group + e] : 0.0f;
    out[at] = dtype == RBE_BF16 ? cu_f32_to_bf16(value) : cu_f32_to_f16(value);
}

int rbe_cu_narrow_basis(const float *basis, int64_t vectors, int32_t group, int32_t depth, rbe_dtype dtype, uint16_t *out, void *stream) {
    return cu_launch(narrow_basis, dim3(blocks_of(vectors * depth)), dim3(THREADS), 0, (cudaStream_t)stream, basis, vectors, group, depth,
                     dtype, out);
}

template <class Real>
static __global__ void finish_product(const Real *in, int64_t splits, const Real *gain, const Real *bias, rbe_cu_matrix y) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, count = y.rows * y.cols;
    if (at >= count) return;
    const int64_t t = at / y.cols, i = at - t * y.cols;
    Real sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += in[s * count + at];
    if (gain) sum *= gain[i];
    if (bias) sum += bias[i];
    store_any(y.data, y.dtype, t * y.stride + i, (double)sum);
}

int rbe_cu_finish_product(const void *in, rbe_dtype real, int64_t splits, const void *gain, const void *bias, const rbe_cu_matrix *y,
                          void *stream) {
    const dim3 blocks(blocks_of(y->rows * y->cols));
    if (y->rows * y->cols == 0) return 0;
    return real == RBE_F64 ? cu_launch(finish_product<double>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, (const double *)in, splits,
                                       (const double *)gain, (const double *)bias, *y)
                           : cu_launch(finish_product<float>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, (const float *)in, splits,
                                       (const float *)gain, (const float *)bias, *y);
}

// 32 columns a block; 8 threads a column take every eighth token, and their sums are added in order.
template <class Real>
static __global__ void column_sums(rbe_cu_matrix a, Real *out) {
    CU_SHARED(Real, part, [TILE_ROWS][TILE]);
    const int tx = (int)threadIdx.x, ty = (int)threadIdx.y;
    const int64_t j = (int64_t)blockIdx.x * TILE + tx;
    Real sum = 0;
    if (j < a.cols)
        for (int64_t t = ty; t < a.rows; t += TILE_ROWS) sum += (Real)load_any(a.data, a.dtype, t * a.stride + j);
    part[ty][tx] = sum;
    __syncthreads();
    if (ty || j >= a.cols) return;
    for (int r = 1; r < TILE_ROWS; ++r) sum += part[r][tx];
    out[j] = sum;
}

int rbe_cu_column_sums(const rbe_cu_matrix *a, rbe_dtype real, void *out, void *stream) {
    const dim3 blocks((unsigned)((a->cols + TILE - 1) / TILE)), threads(TILE, TILE_ROWS);
    return real == RBE_F64 ? cu_launch(column_sums<double>, blocks, threads, 0, (cudaStream_t)stream, *a, (double *)out)
                           : cu_launch(column_sums<float>, blocks, threads, 0, (cudaStream_t)stream, *a, (float *)out);
}

template <class Real>
static __global__ void sum_splits(const Real *in, int64_t splits, int64_t count, Real *out) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= count) return;
    Real sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += in[s * count + at];
    out[at] = sum;
}

int rbe_cu_sum_splits(const void *in, rbe_dtype real, int64_t splits, int64_t count, void *out, void *stream) {
    return real == RBE_F64 ? cu_launch(sum_splits<double>, dim3(blocks_of(count)), dim3(THREADS), 0, (cudaStream_t)stream,
                                       (const double *)in, splits, count, (double *)out)
                           : cu_launch(sum_splits<float>, dim3(blocks_of(count)), dim3(THREADS), 0, (cudaStream_t)stream, (const float *)in,
                                       splits, count, (float *)out);
}

int rbe_cu_capability() { return cu_capability(); }
bool rbe_cu_capturing(void *stream) { return cu_capturing((cudaStream_t)stream); }
int rbe_cu_zero(void *at, size_t bytes, void *stream) { return cu_clear(at, bytes, (cudaStream_t)stream); }
int rbe_cu_to_host(void *to, const void *from, size_t bytes, void *stream) {
    return cu_copy_to_host(to, from, bytes, (cudaStream_t)stream);
}
int rbe_cu_to_device(void *to, const void *from, size_t bytes, void *stream) {
    return cu_copy_to_device(to, from, bytes, (cudaStream_t)stream);
}

#ifdef __CUDACC__
int rbe_cu_use_device(int device) {
    int before = -1;
    if (cudaGetDevice(&before) != cudaSuccess) before = -1;
    return cudaSetDevice(device) == cudaSuccess ? before : -1;
}
const char *rbe_cu_error_text(int error) { return cudaGetErrorString((cudaError_t)error); }
#else
int rbe_cu_use_device(int) { return 0; }
const char *rbe_cu_error_text(int error) { return error ? "invalid argument" : "no error"; }
#endif
