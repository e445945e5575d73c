// Gradients of codes and basis from the gradient of W, for layouts whose product decodes. dw [rows, n] of type real:
//
//     d[q, i]          = sum over e of dw[i, k*g + e] basis[s, idx, e]                (+- rbe16s)
//     dbasis[s, j, e]  = sum over codes (i, k) of idx j of gain[i] scale(i, q) dw[i, k*g + e]
#include "codes.cuh"

constexpr int THREADS = 128;

template <class Real>
static __global__ void __launch_bounds__(THREADS) dense_d(rbe_cu_codes codes, const Real *dw, const Real *basis, Real *d, int64_t pitch) {
    const int64_t count = codes.groups * codes.stages, at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= codes.rows * count) return;
    const int64_t i = at / count, q = at % count, col = q / codes.stages * codes.group;
    const int width = (int)(codes.cols - col < codes.group ? codes.cols - col : codes.group);
    const uint32_t word = cu_word(codes, i, q);
    const Real *vector = basis + (q % codes.stages * RBE_BASIS_VECTORS + cu_idx(word)) * codes.group, *from = dw + i * codes.cols + col;
    const uint32_t signs = codes.field == RBE_FIELD_RBE16S ? word & 255u : 0u;
    Real sum = 0;
    for (int e = 0; e < width; ++e) sum += from[e] * (signs >> (e & 7) & 1u ? -vector[e] : vector[e]);
    d[q * pitch + i] = sum;
}

int rbe_cu_dense_d(const rbe_cu_codes *codes, const void *dw, const void *basis, void *d, int64_t pitch, void *stream) {
    const int64_t places = codes->rows * codes->groups * codes->stages;
    const dim3 blocks((unsigned)((places + THREADS - 1) / THREADS));
    return codes->real == RBE_F64 ? cu_launch(dense_d<double>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, *codes, (const double *)dw,
                                              (const double *)basis, (double *)d, pitch)
                                  : cu_launch(dense_d<float>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, *codes, (const float *)dw,
                                              (const float *)basis, (float *)d, pitch);
}

template <class Real>
struct basis_arguments {
    rbe_cu_codes codes;
    const Real *dw;
    const int32_t *order, *start;
    const Real *scale, *gain;
    int64_t pitch;
    bool accumulate;
    int64_t splits;
    Real *partial;
};

// A block one basis vector and a share of the groups. Neighbouring threads take neighbouring elements; as many rows at once as fit are
// added up apart and then in order.
template <class Real>
static __global__ void __launch_bounds__(THREADS, 8) dense_basis(basis_arguments<Real> a) {
    CU_SHARED(Real, part, [THREADS]);
    const rbe_cu_codes &c = a.codes;
    const int64_t vector = blockIdx.x, stage = vector / RBE_BASIS_VECTORS, j = vector % RBE_BASIS_VECTORS, split = blockIdx.y;
    const int width = c.group < THREADS ? c.group : THREADS, lanes = THREADS / width, lane = (int)threadIdx.x / width;
    const int64_t share = (c.groups + a.splits - 1) / a.splits, end = (split + 1) * share < c.groups ? (split + 1) * share : c.groups;
    for (int e0 = 0; e0 < c.group; e0 += width) {
        const int e = e0 + (int)threadIdx.x % width;
        Real sum = 0;
        for (int64_t k = split * share; lane < lanes && e < c.group && k < end; ++k) {
            const int64_t q = k * c.stages + stage, col = k * c.group + e;
            if (col >= c.cols) continue;
            const int32_t *start = a.start + q * (RBE_BASIS_VECTORS + 1) + j;
            for (int32_t r = start[0] + lane; r < start[1]; r += lanes) {
                const int64_t i = a.order[q * c.rows + r];
                const Real value = a.gain[i] * a.scale[q * a.pitch + i] * a.dw[i * c.cols + col];
                const bool negated = c.field == RBE_FIELD_RBE16S && (cu_word(c, i, q) >> (e & 7) & 1u);
                sum += negated ? -value : value;
            }
        }
        part[threadIdx.x] = sum;
        __syncthreads();
        if ((int)threadIdx.x < width && e < c.group) {
            for (int l = 1; l < lanes; ++l) sum += part[l * width + threadIdx.x];
            Real *to = a.partial + ((split * c.stages * RBE_BASIS_VECTORS + vector) * c.group + e);
            *to = a.accumulate ? *to + sum : sum;
        }
        __syncthreads();
    }
}

// Enough blocks for 128 a multiprocessor.
int64_t rbe_cu_dense_basis_splits(const rbe_cu_codes *codes) {
    const int64_t vectors = (int64_t)codes->stages * RBE_BASIS_VECTORS,
                  wanted = (128 * (int64_t)cu_multiprocessors() + vectors - 1) / vectors;
    const int64_t most = codes->groups < 16 ? codes->groups : 16;
    return wanted < most ? wanted : most;
}

template <class Real>
static int basis_of(const rbe_cu_codes *codes, const void *dw, const int32_t *order, const int32_t *start, const void *scale, int64_t pitch,
                    const void *gain, bool accumulate, int64_t splits, void *partial, void *stream) {
    const basis_arguments<Real> a = {*codes, (const Real *)dw, order,  start,          (const Real *)scale, (const Real *)gain,
                                     pitch,  accumulate,       splits, (Real *)partial};
    return cu_launch(dense_basis<Real>, dim3((unsigned)codes->stages * RBE_BASIS_VECTORS, (unsigned)splits), dim3(THREADS), 0,
                     (cudaStream_t)stream, a);
}

int rbe_cu_dense_basis(const rbe_cu_codes *codes, const void *dw, const int32_t *order, const int32_t *start, const void *scale,
                       int64_t pitch, const void *gain, bool accumulate, int64_t splits, void *partial, void *stream) {
    return codes->real == RBE_F64 ? basis_of<double>(codes, dw, order, start, scale, pitch, gain, accumulate, splits, partial, stream)
                                  : basis_of<float>(codes, dw, order, start, scale, pitch, gain, accumulate, splits, partial, stream);
}
