// The bodies of the operators: each reads its arguments, checks them, allocates results and calls ops/.
#ifndef RBE_SHIM_OPERATORS_H
#define RBE_SHIM_OPERATORS_H

#include "weight.h"

rbe_status rbe_op_linear(rbe_call *call);
rbe_status rbe_op_linear_backward(rbe_call *call);
rbe_status rbe_op_decode(rbe_call *call);
rbe_status rbe_op_decode_backward(rbe_call *call);
rbe_status rbe_op_encode(rbe_call *call);
rbe_status rbe_op_encode_calibrated(rbe_call *call);
rbe_status rbe_op_pack(rbe_call *call);
rbe_status rbe_op_unpack(rbe_call *call);
rbe_status rbe_op_interleave(rbe_call *call);
rbe_status rbe_op_deinterleave(rbe_call *call);

// What the two encoders read: weight, basis and gain from argument `at` on, the layout's arguments from `layout` on.
rbe_status rbe_bind_encoding(rbe_call *call, int at, int layout, rbe_weight *w, rbe_matrix *weight);

// What a tensor of this dtype computes in: float64 on the reference kernels, float32 for everything else.
static inline rbe_dtype rbe_real_of(rbe_dtype dtype) { return dtype == RBE_F64 ? RBE_F64 : RBE_F32; }

#endif
