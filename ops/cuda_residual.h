// Residuals that are multiplied apart from the codes.
#ifndef RBE_OPS_CUDA_RESIDUAL_H
#define RBE_OPS_CUDA_RESIDUAL_H

#include "cuda_internal.h"

// Whether a product adds the residual of w by rbe_cuda_add_residual; otherwise it is added where W is decoded.
bool rbe_cuda_residual_apart(const rbe_weight *w, rbe_dtype x, int64_t tokens, rbe_accuracy accuracy);
// The same weight without it.
rbe_weight rbe_cuda_without_residual(const rbe_weight *w);

// y += x residual^T; dx += dy residual. x, dy, y and dx of one type.
rbe_status rbe_cuda_add_residual(const rbe_weight *w, const rbe_cu_matrix *x, const rbe_cu_matrix *y, bool tf32, const rbe_device *device,
                                 rbe_error *err);
rbe_status rbe_cuda_add_residual_dx(const rbe_weight *w, const rbe_cu_matrix *dy, const rbe_cu_matrix *dx, const rbe_device *device,
                                    rbe_error *err);

#endif
