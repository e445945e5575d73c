// rbe_cuda_linear_backward: check, choose a way for dx, D and dbasis, then turn D into dgain, dscale and damplitude.
#include "cuda_backward.h"
#include "cuda_residual.h"
#include "product.h"

static rbe_status check(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out, rbe_error *err) {
    RBE_TRY(rbe_cuda_check(w, err));
    RBE_TRY(rbe_check_matrix(w, "x", x, -1, w->cols, err));
    RBE_TRY(rbe_check_matrix(w, "dy", dy, x->rows, w->rows, err));
    if (!out) return rbe_fail(err, RBE_BAD_ARGUMENT, "gradients: are missing");
    if (out->dx) RBE_TRY(rbe_check_matrix(w, "dx", out->dx, x->rows, w->cols, err));
    if (x->dtype != dy->dtype || (out->dx && out->dx->dtype != x->dtype))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: must have the dtype of x", x->dtype != dy->dtype ? "dy" : "dx");
    if (out->dx && (out->dx->col_stride != 1 || out->dx->row_stride != out->dx->cols) && out->dx->rows * out->dx->cols > 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "dx: must be contiguous");
    if (out->amplitude && !w->amplitude)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "amplitude: its gradient is wanted, but the weight has no amplitude");
    return RBE_OK;
}

// No tokens: every gradient is zero.
static rbe_status zero_all(const rbe_weight *w, const rbe_gradients *out, const rbe_device *device, rbe_error *err) {
    const size_t real = rbe_cuda_bytes(w->real), places = (size_t)(w->rows * w->groups * w->layout.stages);
    const size_t basis = (size_t)w->layout.stages * RBE_BASIS_VECTORS * (size_t)w->layout.group, rows = (size_t)w->rows;
    void *const at[] = {out->basis, out->gain, out->bias, out->amplitude, out->scale};
    const size_t counts[] = {basis, rows, rows, places, places};
    for (int i = 0; i < 5; i++)
        if (at[i]) RBE_LAUNCH(rbe_cu_zero(at[i], counts[i] * real, device->stream), err);
    return RBE_OK;
}

rbe_status rbe_cuda_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out,
                                    const rbe_device *device, rbe_error *err) {
    RBE_TRY(check(w, dy, x, out, err));
    if (x->rows == 0) return zero_all(w, out, device, err);
    rbe_cuda_weight bound;
    const bool low_rank = w->layout.residual == RBE_RESIDUAL_LOWRANK;
    rbe_weight codes = low_rank ? rbe_cuda_without_residual(w) : *w;
    const bool by_table = rbe_cuda_plan_backward_table(&codes.layout, x->dtype, w->rows, w->cols, x->rows);
    const bool apart = low_rank || (by_table && w->layout.residual != RBE_RESIDUAL_NONE);
    if (apart) codes = rbe_cuda_without_residual(w);
    RBE_TRY(rbe_cuda_bind(&codes, device, &bound, err));
    const bool wants_d = out->scale || out->amplitude || out->gain;
    const int64_t places = bound.count * bound.pitch;
    rbe_cuda_backward b = {.w = &bound, .dy = dy, .x = x, .out = out, .device = device};
    if (out->bias) {
        rbe_cu_matrix dense;
        RBE_TRY(rbe_cuda_dense(dy, dy->dtype, device, &dense, err));
        RBE_LAUNCH(rbe_cu_column_sums(&dense, w->real, out->bias, device->stream), err);
    }
    if (!out->dx && !out->basis && !wants_d) return RBE_OK;
    RBE_TRY(rbe_cuda_take(device, places, 1, &b.idx, err));
    RBE_TRY(rbe_cuda_take(device, places, rbe_cuda_bytes(w->real), &b.scale, err));
    if (wants_d) RBE_TRY(rbe_cuda_take(device, places, rbe_cuda_bytes(w->real), &b.d, err));
    RBE_LAUNCH(rbe_cu_unpack(&bound.codes, bound.pitch, b.idx, b.scale, NULL, device->stream), err);
    RBE_TRY(by_table ? rbe_cuda_backward_by_table(&b, err) : rbe_cuda_backward_dense(&b, err));
    if (apart && out->dx) {
        const rbe_cu_matrix dx = {out->dx->data, x->dtype, x->rows, w->cols, w->cols};
        rbe_cu_matrix dense;
        RBE_TRY(rbe_cuda_dense(dy, dy->dtype, device, &dense, err));
        RBE_TRY(rbe_cuda_add_residual_dx(w, &dense, &dx, device, err));
    }
    if (!wants_d) return RBE_OK;
    RBE_LAUNCH(rbe_cu_finish_codes(&bound.codes, b.d, b.scale, bound.pitch, w->gain, out->gain, out->scale, out->amplitude, device->stream),
               err);
    return RBE_OK;
}
