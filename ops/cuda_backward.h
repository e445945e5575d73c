// The two ways of rbe_cuda_linear_backward, by table and by the dense gradient of W.
#ifndef RBE_OPS_CUDA_BACKWARD_H
#define RBE_OPS_CUDA_BACKWARD_H

#include "cuda_internal.h"

typedef struct rbe_cuda_backward {
    const rbe_cuda_weight *w;
    const rbe_matrix *dy, *x;
    const rbe_gradients *out;
    void *d;      // raw D [Q, pitch] of type real, or NULL where nothing asks for it
    void *scale;  // [Q, pitch] of type real
    uint8_t *idx; // [Q, pitch]
    const rbe_device *device;
} rbe_cuda_backward;

rbe_status rbe_cuda_backward_by_table(const rbe_cuda_backward *b, rbe_error *err);
rbe_status rbe_cuda_backward_dense(const rbe_cuda_backward *b, rbe_error *err);

#endif
