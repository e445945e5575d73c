// Reading torch tensors: shape, dtype and strides, with the checks and conversions that the operators share.
#ifndef RBE_SHIM_TENSOR_H
#define RBE_SHIM_TENSOR_H

#include "call.h"

// Borrowed from torch: valid while the tensor lives.
typedef struct rbe_view {
    const char *name;  // of the argument, for messages
    const void *data;
    int64_t dims;
    const int64_t *sizes, *strides;  // strides in elements
    int32_t dtype;                   // torch's number
} rbe_view;

// Refuses what is not a strided tensor on the call's device.
rbe_status rbe_view_of(rbe_call *call, torch_tensor t, const char *name, rbe_view *out);

// "float32", for messages and for sizes in bytes.
const char *rbe_torch_dtype_name(int32_t dtype);
bool rbe_float_dtype(int32_t torch_dtype, rbe_dtype *out);
int32_t rbe_torch_dtype(rbe_dtype dtype);
size_t rbe_dtype_size(rbe_dtype dtype);

// "[2, 256, 8]" in a buffer that lives until the next call on this thread.
const char *rbe_shape_text(int64_t dims, const int64_t *sizes);

// Fails unless the shape is exactly `sizes`; `letters` says what they are: "[M, 256, g]".
rbe_status rbe_expect_shape(rbe_call *call, const rbe_view *v, int64_t dims, const int64_t *sizes, const char *letters);

// The elements as a dense array of `real` (float32 or float64): the tensor's own memory where it is that already, else a converted copy.
rbe_status rbe_dense_float(rbe_call *call, const rbe_view *v, rbe_dtype real, const void **out);

// The elements as a dense array of their own type, copied where they are not contiguous. element: bytes.
rbe_status rbe_dense_bytes(rbe_call *call, const rbe_view *v, size_t element, const void **out);

// A float tensor of at least one dimension as a matrix: leading dimensions become rows, the last one columns.
rbe_status rbe_matrix_of(rbe_call *call, const rbe_view *v, rbe_matrix *out);

// Inverse of the conversion of rbe_dense_float, for gradients: `count` numbers of `real` to `dtype`.
rbe_status rbe_store_float(rbe_call *call, const void *from, rbe_dtype real, void *to, rbe_dtype dtype, int64_t count);

#endif
