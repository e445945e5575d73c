// From d [Q, pitch] to the gradients of a code's numbers:
//
//     dgain[i] = sum over q of scale(i, q) d[q, i]     dscale[i, q] = gain[i] d[q, i]     damplitude[i, q] = dscale d scale/da
//
// A block has 32 rows; 8 threads a row take every eighth q, and their sums are added in order.
#include "codes.cuh"

constexpr int ROWS = 32, SHARES = 8;

template <class Real>
static __global__ void finish_codes(rbe_cu_codes codes, const Real *d, const Real *scale, int64_t pitch, const Real *gain, Real *dgain,
                                    Real *dscale, Real *damplitude) {
    CU_SHARED(Real, part, [SHARES][ROWS]);
    const int tx = (int)threadIdx.x, ty = (int)threadIdx.y;
    const int64_t i = (int64_t)blockIdx.x * ROWS + tx, count = codes.groups * codes.stages;
    Real sum = 0;
    if (i < codes.rows) {
        for (int64_t q = ty; q < count; q += SHARES) {
            const Real value = d[q * pitch + i], ds = gain[i] * value;
            sum += scale[q * pitch + i] * value;
            if (dscale) dscale[i * count + q] = ds;
            if (damplitude)
                damplitude[i * count + q] =
                    cu_amplitude_gradient(codes, cu_word(codes, i, q), ((const Real *)codes.amplitude)[i * count + q], ds);
        }
    }
    part[ty][tx] = sum;
    __syncthreads();
    if (ty || i >= codes.rows || !dgain) return;
    for (int r = 1; r < SHARES; ++r) sum += part[r][tx];
    dgain[i] = sum;
}

int rbe_cu_finish_codes(const rbe_cu_codes *codes, const void *d, const void *scale, int64_t pitch, const void *gain, void *dgain,
                        void *dscale, void *damplitude, void *stream) {
    const dim3 blocks((unsigned)((codes->rows + ROWS - 1) / ROWS)), threads(ROWS, SHARES);
    return codes->real == RBE_F64
               ? cu_launch(finish_codes<double>, blocks, threads, 0, (cudaStream_t)stream, *codes, (const double *)d, (const double *)scale,
                           pitch, (const double *)gain, (double *)dgain, (double *)dscale, (double *)damplitude)
               : cu_launch(finish_codes<float>, blocks, threads, 0, (cudaStream_t)stream, *codes, (const float *)d, (const float *)scale,
                           pitch, (const float *)gain, (float *)dgain, (float *)dscale, (float *)damplitude);
}
