// Dense products on the device by cuBLASLt, which is loaded when it is first needed: no build and no CPU user depends on it.
#ifndef RBE_OPS_CUDA_BLASLT_H
#define RBE_OPS_CUDA_BLASLT_H

#include "cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

// A matrix as it lies in memory, row after row; the product sees it transposed where `transposed`.
typedef struct rbe_gemm_operand {
    const void *data;
    int64_t stride;        // between rows, in elements
    int64_t batch_stride;  // between matrices of a batch, in elements; 0: the same one
    bool transposed;
} rbe_gemm_operand;

// c[b] = a[b] b[b] (+ c[b]), b < batch: m x n from m x k and k x n; sums in float32, in float64 where out is.
typedef struct rbe_gemm {
    int64_t m, n, k, batch;
    rbe_gemm_operand a, b;
    void *c;
    int64_t c_stride, c_batch_stride;
    rbe_dtype in, out;  // of a and b; of c
    bool accumulate;
    bool tf32;  // float32 inputs may lose all but 10 bits of fraction
} rbe_gemm;

rbe_status rbe_cuda_gemm(const rbe_gemm *g, const rbe_device *device, rbe_error *err);

#ifdef __cplusplus
}
#endif
#endif
