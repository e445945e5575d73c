// rbe::encode_calibrated: code words of a weight that keep the layer's outputs on given inputs.
#include <string.h>

#include "operators.h"

// A float32 matrix [n, n]; NULL in *out where the argument is None.
static rbe_status square_of(rbe_call *call, int at, const char *name, int64_t n, const float **out) {
    torch_tensor tensor = rbe_call_tensor(call, at);
    *out = NULL;
    if (!tensor) return RBE_OK;
    rbe_view view;
    const void *data = NULL;
    int64_t shape[2] = {n, n};
    rbe_status status = rbe_view_of(call, tensor, name, &view);
    if (status == RBE_OK) status = rbe_expect_shape(call, &view, 2, shape, "[n, n]");
    if (status == RBE_OK) status = rbe_dense_float(call, &view, RBE_F32, &data);
    *out = data;
    return status;
}

rbe_status rbe_op_encode_calibrated(rbe_call *call) {
    enum { WEIGHT, BASIS, GAIN, HESSIAN, FACTOR, CODES, LAYOUT, SWEEPS = LAYOUT + 5 };
    rbe_matrix weight;
    rbe_weight w = {.rounded = true};
    rbe_calibration calibration = {0};
    rbe_view codes;
    const void *start = NULL;
    rbe_status status = rbe_bind_encoding(call, WEIGHT, LAYOUT, &w, &weight);
    if (status == RBE_OK) status = square_of(call, HESSIAN, "hessian", w.cols, &calibration.hessian);
    if (status == RBE_OK) status = square_of(call, FACTOR, "factor", w.cols, &calibration.factor);
    if (status != RBE_OK) return status;
    int64_t shape[3] = {w.rows, w.groups, w.layout.stages};
    if ((rbe_call_tensor(call, CODES) != NULL) == (calibration.factor != NULL)) {
        return rbe_call_fail(call, "factor, codes: exactly one must be given: a factor to encode anew, codes to improve");
    }
    if (!calibration.factor) {
        status = rbe_view_of(call, rbe_call_tensor(call, CODES), "codes", &codes);
        if (status == RBE_OK && codes.dtype != torch.aoti_torch_dtype_int32()) {
            return rbe_call_fail(call, "codes: is %s; must be int32 words", rbe_torch_dtype_name(codes.dtype));
        }
        if (status == RBE_OK) status = rbe_expect_shape(call, &codes, 3, shape, "[m, K, M]");
        if (status == RBE_OK) status = rbe_dense_bytes(call, &codes, sizeof(int32_t), &start);
        if (status == RBE_OK && !rbe_on_cuda(call)) {
            w.words = start;
            status = rbe_check_codes(&w, &call->err);
            w.words = NULL;
        }
        if (status != RBE_OK) return status;
    }
    int64_t sweeps = rbe_call_int(call, SWEEPS);
    if (sweeps < 0 || sweeps > 1000) return rbe_call_fail(call, "sweeps: was %lld; must be 0 .. 1000", (long long)sweeps);
    calibration.sweeps = (int)sweeps;
    void *words;
    status = rbe_call_result(call, 3, shape, torch.aoti_torch_dtype_int32(), &words);
    if (status != RBE_OK) return status;
    if (rbe_on_cuda(call)) {
        w.words = start;
        return rbe_cuda_encode_calibrated(&w, &weight, &calibration, words, &call->place.device, &call->err);
    }
    if (start) memcpy(words, start, (size_t)(shape[0] * shape[1] * shape[2]) * sizeof(int32_t));
    rbe_parallel threads = rbe_torch_threads();
    return rbe_encode_calibrated(&w, &weight, &calibration, words, &threads, &call->err);
}
