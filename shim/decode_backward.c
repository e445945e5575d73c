// rbe::decode_backward: the gradients of rbe::decode for basis and gain.
#include "operators.h"

rbe_status rbe_op_decode_backward(rbe_call *call) {
    enum { GRADIENT, CODES, BASIS, GAIN, LAYOUT };
    static const rbe_weight_positions at = {CODES, BASIS, GAIN, -1, -1, LAYOUT, -1};
    rbe_view gradient;
    rbe_weight w;
    rbe_weight_views views;
    const void *dense, *words;
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, GRADIENT), "gradient", &gradient);
    if (status == RBE_OK) status = rbe_bind_weight(call, &at, RBE_F32, -1, &w, &views);
    if (status != RBE_OK) return status;
    int64_t shape[2] = {w.rows, w.cols};
    status = rbe_expect_shape(call, &gradient, 2, shape, "[m, n]");
    if (status == RBE_OK) status = rbe_dense_float(call, &gradient, RBE_F32, &dense);
    if (status != RBE_OK) return status;
    if (!w.words && !rbe_on_cuda(call)) {
        int32_t *unpacked = rbe_call_allocate(call, (size_t)(w.rows * w.groups * w.layout.stages) * sizeof *unpacked);
        if (!unpacked) return rbe_call_fail(call, "codes: out of memory");
        status = rbe_unpack(&w, unpacked, &call->err);
        if (status != RBE_OK) return status;
        words = unpacked;
        w.packed = w.interleaved = NULL;
        w.words = words;
    }
    int64_t basis_shape[3] = {w.layout.stages, RBE_BASIS_VECTORS, w.layout.group};
    void *dbasis, *dgain;
    status = rbe_call_result(call, 3, basis_shape, torch.aoti_torch_dtype_float32(), &dbasis);
    if (status == RBE_OK) status = rbe_call_result(call, 1, &w.rows, torch.aoti_torch_dtype_float32(), &dgain);
    if (status != RBE_OK) return status;
    if (rbe_on_cuda(call)) return rbe_cuda_decode_backward(&w, dense, dbasis, dgain, &call->place.device, &call->err);
    rbe_parallel threads = rbe_torch_threads();
    return rbe_decode_backward(&w, dense, dbasis, dgain, &threads, &call->err);
}
