// What the searches read, made on the device: the basis turned element-major with squares and unit, each group's factor and the basis
// turned by it, and checks of values. Sums in float64 in the order of ops/encode.c and ops/encode_calibrated.c.
#include "encode.cuh"

constexpr int THREADS = 256;

static unsigned blocks_of(int64_t threads) { return (unsigned)((threads + THREADS - 1) / THREADS); }

// A block a table: the power of two that brings the largest number near 1.
static __global__ void __launch_bounds__(THREADS) find_unit(const void *vectors, rbe_dtype real, int64_t size, double *unit) {
    CU_SHARED(double, part, [THREADS]);
    const int t = (int)threadIdx.x;
    double most = 0;
    for (int64_t i = t; i < size; i += THREADS) most = fmax(most, fabs(cu_real_at(vectors, real, blockIdx.x * size + i)));
    part[t] = most;
    __syncthreads();
    for (int reach = THREADS / 2; reach; reach /= 2) {
        if (t < reach) part[t] = fmax(part[t], part[t + reach]);
        __syncthreads();
    }
    if (t == 0) unit[blockIdx.x] = part[0] > 0 ? ldexp(1.0, -ilogb(part[0])) : 1.0;
}

// A thread a vector.
static __global__ void __launch_bounds__(THREADS) fill_search(rbe_cu_search s, double *square, double *wide, float *narrow) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, g = s.codes.group, vectors = (int64_t)s.codes.stages * RBE_BASIS_VECTORS;
    if (at >= s.tables * vectors) return;
    const int64_t table = at / vectors, stage = at % vectors / RBE_BASIS_VECTORS, j = at % RBE_BASIS_VECTORS;
    const int64_t ragged = s.codes.cols - (s.codes.groups - 1) * g;
    double whole = 0, end = 0;
    CU_NO_UNROLL
    for (int64_t e = 0; e < g; ++e) {
        const double b = cu_element(s, table, stage, j, e), shown = s.codes.field == RBE_FIELD_RBE16S ? fabs(b) : b;
        const int64_t to = ((table * s.codes.stages + stage) * g + e) * RBE_BASIS_VECTORS + j;
        if (wide) wide[to] = shown;
        if (narrow) narrow[to] = (float)shown;
        whole += b * b;
        if (e < ragged) end += b * b;
    }
    square[2 * table * vectors + stage * RBE_BASIS_VECTORS + j] = whole;
    square[(2 * table + 1) * vectors + stage * RBE_BASIS_VECTORS + j] = end;
}

int rbe_cu_fill_search(const rbe_cu_search *search, double *unit, double *square, double *wide, float *narrow, void *stream) {
    const int64_t vectors = (int64_t)search->codes.stages * RBE_BASIS_VECTORS;
    const int error = cu_launch(find_unit, dim3((unsigned)search->tables), dim3(THREADS), 0, (cudaStream_t)stream, search->vectors,
                                search->codes.real, vectors * search->codes.group, unit);
    if (error) return error;
    return cu_launch(fill_search, dim3(blocks_of(search->tables * vectors)), dim3(THREADS), 0, (cudaStream_t)stream, *search, square, wide,
                     narrow);
}

static __global__ void __launch_bounds__(THREADS) block_triangles(const float *matrix, int64_t n, int64_t g, double *factors) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, k = at / (g * g), i = at / g % g, e = at % g, first = k * g;
    if (first >= n) return;
    const int64_t depth = first + g <= n ? g : n - first;
    if (i < depth && e < depth) factors[k * g * g + i * depth + e] = e < i ? 0.0 : (double)matrix[(first + i) * n + first + e];
}

int rbe_cu_block_triangles(const float *matrix, int64_t n, int64_t group, double *factors, void *stream) {
    return cu_launch(block_triangles, dim3(blocks_of((n + group - 1) / group * group * group)), dim3(THREADS), 0, (cudaStream_t)stream,
                     matrix, n, group, factors);
}

// A block a group. Columns from the last to the first; a thread a row of the column.
static __global__ void __launch_bounds__(THREADS)
    factor_blocks(const float *matrix, int64_t n, int64_t g, double *factors, unsigned long long *indefinite) {
    const int64_t k = blockIdx.x, first = k * g, depth = first + g <= n ? g : n - first;
    double *u = factors + k * g * g;
    for (int64_t j = depth - 1; j >= 0; --j) {
        double square = matrix[(first + j) * n + first + j];  // every thread the same
        for (int64_t c = j + 1; c < depth; ++c) square -= u[j * depth + c] * u[j * depth + c];
        if (!(square > 0)) {
            if (threadIdx.x == 0) atomicMin(indefinite, (unsigned long long)k);
            return;
        }
        const double diagonal = sqrt(square);
        for (int64_t i = threadIdx.x; i < depth; i += THREADS) {
            if (i > j) u[i * depth + j] = 0;
            if (i == j) u[i * depth + j] = diagonal;
            if (i >= j) continue;
            double value = matrix[(first + i) * n + first + j];
            for (int64_t c = j + 1; c < depth; ++c) value -= u[i * depth + c] * u[j * depth + c];
            u[i * depth + j] = value / diagonal;
        }
        __syncthreads();
    }
}

int rbe_cu_factor_blocks(const float *matrix, int64_t n, int64_t group, double *factors, unsigned long long *indefinite, void *stream) {
    return cu_launch(factor_blocks, dim3((unsigned)((n + group - 1) / group)), dim3(THREADS), 0, (cudaStream_t)stream, matrix, n, group,
                     factors, indefinite);
}

static __global__ void __launch_bounds__(THREADS) turn_basis(rbe_cu_codes codes, const void *basis, const double *factors, float *turned) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, g = codes.group, size = (int64_t)codes.stages * RBE_BASIS_VECTORS * g;
    const int64_t k = at / size, b = at % size / g, e = at % g;
    if (k >= codes.groups) return;
    const int64_t depth = (k + 1) * g <= codes.cols ? g : codes.cols - k * g;
    double sum = 0;
    for (int64_t i = 0; i <= e && e < depth; ++i) sum += cu_real_at(basis, codes.real, b * g + i) * factors[k * g * g + i * depth + e];
    turned[at] = (float)sum;
}

int rbe_cu_turn_basis(const rbe_cu_codes *codes, const void *basis, const double *factors, float *turned, void *stream) {
    const int64_t size = codes->groups * codes->stages * RBE_BASIS_VECTORS * codes->group;
    return cu_launch(turn_basis, dim3(blocks_of(size)), dim3(THREADS), 0, (cudaStream_t)stream, *codes, basis, factors, turned);
}

static __global__ void no_places(unsigned long long *places) { places[threadIdx.x] = ~0ull; }

int rbe_cu_no_places(unsigned long long *places, int count, void *stream) {
    return cu_launch(no_places, dim3(1), dim3((unsigned)count), 0, (cudaStream_t)stream, places);
}

static __global__ void __launch_bounds__(THREADS) check_values(const void *data, rbe_dtype dtype, int64_t rows, int64_t cols,
                                                               int64_t row_stride, int64_t col_stride, int kind, unsigned long long *place) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= rows * cols) return;
    const double value = cu_real_at(data, dtype, at / cols * row_stride + at % cols * col_stride);
    const bool good = kind == RBE_CU_POSITIVE ? value > 0 : value - value == 0;
    if (!good) atomicMin(place, (unsigned long long)at);  // the lowest place, whatever the order
}

int rbe_cu_check_values(const void *data, rbe_dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int kind,
                        unsigned long long *place, void *stream) {
    return cu_launch(check_values, dim3(blocks_of(rows * cols)), dim3(THREADS), 0, (cudaStream_t)stream, data, dtype, rows, cols, row_stride,
                     col_stride, kind, place);
}
