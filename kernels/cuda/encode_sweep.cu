// Calibrated encoding, later passes: every group again given all others, with pull = error H.
//
//     l = pull_k - e_k H_kk,  H_kk = U U^T;  v = w_k U + l U^-T      the search with the basis turned by U gives codes to try
//
// A group keeps its codes unless e H_kk e^T + 2 e l falls.
#include "encode_calibrated.cuh"

// e H_kk e^T + 2 e l of d.e and d.l; uses d.v.
CU_DEVICE double loss_of(const rbe_cu_calibrated &c, const cu_desk &d, int64_t first, int64_t depth) {
    const int64_t n = c.search.codes.cols;
    for (int64_t i = threadIdx.x & 31; i < depth; i += 32) {
        double along = 2 * d.l[i];
        for (int64_t j = 0; j < depth; ++j) along += d.e[j] * c.matrix[(first + j) * n + first + i];
        d.v[i] = d.e[i] * along;
    }
    __syncwarp();
    double sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += d.v[i];
    __syncwarp();
    return sum;
}

// d.v with v U^T = d.l, from the last element to the first.
CU_DEVICE void solve(const cu_desk &d, const double *factor, int64_t depth) {
    if ((threadIdx.x & 31) == 0) {
        for (int64_t j = depth - 1; j >= 0; --j) {
            double left = d.l[j];
            for (int64_t i = j + 1; i < depth; ++i) left -= d.v[i] * factor[j * depth + i];
            d.v[j] = left / factor[j * depth + j];
        }
    }
    __syncwarp();
}

template <int SEARCH>
static __global__ void __launch_bounds__(32 * CU_ROWS, 1) encode_sweep(rbe_cu_calibrated c, int64_t desk_bytes) {
    CU_DYNAMIC_SHARED(char, shared);
    CU_SHARED(unsigned, moved, [CU_ROWS]);
    const rbe_cu_codes &codes = c.search.codes;
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, warps = (int)blockDim.x >> 5;
    const int64_t row0 = (int64_t)blockIdx.x * warps, i = row0 + warp, n = codes.cols, g = codes.group, stages = codes.stages;
    const bool there = i < codes.rows;
    char *desks = c.memory ? (char *)c.memory + row0 * desk_bytes : shared;
    const cu_desk d = cu_desk_at(desks + warp * desk_bytes, codes.group, codes.stages > 1, true);
    const float *step = cu_desk_at(desks, codes.group, codes.stages > 1, true).step;
    const double gain = there ? cu_real_at(c.target.gain, c.target.real, i) : 1.0;
    for (int64_t k = 0, first = 0; k < codes.groups; ++k, first += g) {
        const int64_t depth = first + g <= n ? g : n - first;
        bool better = false;
        if (there) {
            float *error = c.error + i * n + first;
            for (int64_t e = lane; e < depth; e += 32) {
                d.e[e] = error[e];
                double l = c.pull[i * n + first + e];
                for (int64_t p = 0; p < depth; ++p) l -= (double)error[p] * c.matrix[(first + p) * n + first + e];
                d.l[e] = l;
            }
            __syncwarp();
            const double now = loss_of(c, d, first, depth);
            solve(d, c.factors + k * g * g, depth);
            cu_add_target(c, d, i, k, depth);
            cu_search<SEARCH>(c, d, i, k, depth, gain);
            for (int64_t e = lane; e < depth; e += 32)
                d.e[e] = cu_weight_at(c.target, i, first + e) - cu_reconstructed(c, gain, d.words, e);
            __syncwarp();
            better = loss_of(c, d, first, depth) < now;
            for (int64_t e = lane; better && e < depth; e += 32) {
                d.step[e] = (float)(d.e[e] - error[e]);
                error[e] = (float)d.e[e];
            }
            if (better && lane < stages) c.words[(i * codes.groups + k) * stages + lane] = (int32_t)d.words[lane];
        }
        if (lane == 0) moved[warp] = better ? 1u << warp : 0u;
        __syncthreads();
        unsigned rows = 0;
        for (int r = 0; r < warps; ++r) rows |= moved[r];
        cu_add_rows(c, row0, rows, step, desk_bytes / 4, rows ? depth : 0, first, 0, n);
    }
}

int rbe_cu_encode_sweep(const rbe_cu_calibrated *c, void *stream) {
    void (*const kernels[])(rbe_cu_calibrated, int64_t) = {encode_sweep<CU_ONE>, encode_sweep<CU_SEVERAL>, encode_sweep<CU_BY_SIGNS>};
    return cu_launch_rows(kernels, c, stream);
}

constexpr int THREADS = 256;

static __global__ void __launch_bounds__(THREADS) encode_error(rbe_cu_calibrated c) {
    const rbe_cu_codes &codes = c.search.codes;
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, i = at / codes.cols, col = at % codes.cols, k = col / codes.group;
    if (i >= codes.rows) return;
    const double gain = cu_real_at(c.target.gain, c.target.real, i);
    const int32_t *words = c.words + (i * codes.groups + k) * codes.stages;
    c.error[at] = (float)(cu_weight_at(c.target, i, col) - cu_reconstructed(c, gain, words, col - k * codes.group));
}

int rbe_cu_encode_error(const rbe_cu_calibrated *c, void *stream) {
    const int64_t count = c->search.codes.rows * c->search.codes.cols;
    return cu_launch(encode_error, dim3((unsigned)((count + THREADS - 1) / THREADS)), dim3(THREADS), 0, (cudaStream_t)stream, *c);
}

// 8 rows and 256 columns a block
static __global__ void __launch_bounds__(THREADS, 2) encode_pull(rbe_cu_calibrated c) {
    const int64_t n = c.search.codes.cols, m = c.search.codes.rows, row0 = (int64_t)blockIdx.x * CU_ROWS, begin = (int64_t)blockIdx.y * THREADS;
    const int rows = m - row0 < CU_ROWS ? (int)(m - row0) : CU_ROWS;
    cu_add_rows(c, row0, (1u << rows) - 1u, c.error + row0 * n, n, n, 0, begin, begin + THREADS < n ? begin + THREADS : n);
}

int rbe_cu_encode_pull(const rbe_cu_calibrated *c, void *stream) {
    const int64_t m = c->search.codes.rows, n = c->search.codes.cols;
    return cu_launch(encode_pull, dim3((unsigned)((m + CU_ROWS - 1) / CU_ROWS), (unsigned)((n + THREADS - 1) / THREADS)), dim3(THREADS), 0,
                     (cudaStream_t)stream, *c);
}
