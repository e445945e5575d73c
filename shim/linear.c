// rbe::linear and rbe::linear_backward: from boxed arguments to the C API and back.
#include <string.h>

#include "operators.h"

static rbe_status parse_accuracy(rbe_call *call, int at, rbe_accuracy *out) {
    static const char *const names[] = {"auto", "exact", "fast"};
    const char *text;
    size_t length;
    rbe_call_string(call, at, &text, &length);
    for (int a = 0; a < 3; a++) {
        if (strlen(names[a]) == length && memcmp(names[a], text, length) == 0) {
            *out = (rbe_accuracy)a;
            return RBE_OK;
        }
    }
    return rbe_call_fail(call, "accuracy: was '%.*s'; must be 'auto', 'exact' or 'fast'", (int)(length < 40 ? length : 40), text);
}

static rbe_status matrix_argument(rbe_call *call, int at, const char *name, rbe_view *view, rbe_matrix *out) {
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, at), name, view);
    return status == RBE_OK ? rbe_matrix_of(call, view, out) : status;
}

static rbe_status bias_argument(rbe_call *call, int at, const rbe_weight *w, rbe_view *view, const void **out) {
    *out = NULL;
    if (!rbe_call_tensor(call, at)) return RBE_OK;
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, at), "bias", view);
    if (status == RBE_OK) status = rbe_expect_shape(call, view, 1, &w->rows, "[m]");
    if (status == RBE_OK) status = rbe_dense_float(call, view, w->real, out);
    return status;
}

rbe_status rbe_op_linear(rbe_call *call) {
    enum { X, CODES, BASIS, GAIN, BIAS, AMPLITUDE, RESIDUAL, LAYOUT = RESIDUAL + 4, ROUNDED = LAYOUT + 5, ACCURACY };
    static const rbe_weight_positions at = {CODES, BASIS, GAIN, AMPLITUDE, RESIDUAL, LAYOUT, ROUNDED};
    rbe_view x_view, bias_view;
    rbe_matrix x, y;
    rbe_weight w;
    rbe_weight_views views;
    rbe_accuracy accuracy = RBE_ACCURACY_AUTO;
    const void *bias;
    rbe_status status = matrix_argument(call, X, "x", &x_view, &x);
    if (status == RBE_OK) status = rbe_bind_weight(call, &at, rbe_real_of(x.dtype), x.cols, &w, &views);
    if (status == RBE_OK) status = bias_argument(call, BIAS, &w, &bias_view, &bias);
    if (status == RBE_OK) status = parse_accuracy(call, ACCURACY, &accuracy);
    if (status != RBE_OK) return status;

    int64_t shape[64];
    memcpy(shape, x_view.sizes, (size_t)x_view.dims * sizeof *shape);
    shape[x_view.dims - 1] = w.rows;
    y = (rbe_matrix){NULL, x.dtype, x.rows, w.rows, w.rows, 1};
    status = rbe_call_result(call, (int)x_view.dims, shape, x_view.dtype, &y.data);
    if (status != RBE_OK) return status;
    if (rbe_on_cuda(call)) return rbe_cuda_linear(&w, &x, bias, &y, accuracy, &call->place.device, &call->err);
    rbe_parallel threads = rbe_torch_threads();
    return rbe_linear(&w, &x, bias, &y, accuracy, &threads, &call->err);
}

// A gradient of `real` numbers and the result it ends in: the same memory where the dtypes agree, else converted at the end.
typedef struct gradient {
    void *computed, *result;
    rbe_dtype dtype;
    int64_t count;
} gradient;

static rbe_status gradient_result(rbe_call *call, const rbe_view *of, bool wanted, rbe_dtype real, gradient *out) {
    static const int64_t nothing[1] = {0};
    *out = (gradient){NULL, NULL, real, 0};
    void *data;
    if (!wanted) return rbe_call_result(call, 1, nothing, of ? of->dtype : rbe_torch_dtype(real), &data);
    rbe_status status = rbe_call_result(call, (int)of->dims, of->sizes, of->dtype, &data);
    if (status != RBE_OK) return status;
    rbe_float_dtype(of->dtype, &out->dtype);
    out->count = 1;
    for (int64_t d = 0; d < of->dims; d++) out->count *= of->sizes[d];
    out->result = out->computed = data;  // NULL where the tensor is empty
    if (out->dtype == real) return RBE_OK;
    out->computed = rbe_call_allocate(call, (size_t)out->count * rbe_dtype_size(real));
    return out->computed ? RBE_OK : (rbe_call_fail(call, "%s: out of memory for its gradient", of->name), RBE_OUT_OF_MEMORY);
}

static rbe_status finish_gradient(rbe_call *call, const gradient *g, rbe_dtype real) {
    return g->computed == g->result ? RBE_OK : rbe_store_float(call, g->computed, real, g->result, g->dtype, g->count);
}

rbe_status rbe_op_linear_backward(rbe_call *call) {
    enum { DY, X, CODES, BASIS, GAIN, BIAS, AMPLITUDE, RESIDUAL, LAYOUT = RESIDUAL + 4, ROUNDED = LAYOUT + 5, WANTED, ACCURACY };
    enum { WANT_DX = 1, WANT_BASIS = 2, WANT_GAIN = 4, WANT_BIAS = 8, WANT_AMPLITUDE = 16 };
    static const rbe_weight_positions at = {CODES, BASIS, GAIN, AMPLITUDE, RESIDUAL, LAYOUT, ROUNDED};
    rbe_view dy_view, x_view, bias_view;
    rbe_matrix dy, x, dx;
    rbe_weight w;
    rbe_weight_views views;
    rbe_accuracy accuracy = RBE_ACCURACY_AUTO;
    const void *bias;
    rbe_status status = matrix_argument(call, X, "x", &x_view, &x);
    if (status == RBE_OK) status = matrix_argument(call, DY, "dy", &dy_view, &dy);
    if (status == RBE_OK) status = rbe_bind_weight(call, &at, rbe_real_of(x.dtype), x.cols, &w, &views);
    if (status == RBE_OK) status = bias_argument(call, BIAS, &w, &bias_view, &bias);
    if (status == RBE_OK) status = parse_accuracy(call, ACCURACY, &accuracy);
    if (status != RBE_OK) return status;

    int64_t shape[64], wanted = rbe_call_int(call, WANTED);
    memcpy(shape, x_view.sizes, (size_t)x_view.dims * sizeof *shape);
    shape[x_view.dims - 1] = w.rows;
    status = rbe_expect_shape(call, &dy_view, x_view.dims, shape, "[..., m]");
    if (status != RBE_OK) return status;
    if (dy_view.dtype != x_view.dtype) {
        return rbe_call_fail(call, "dy: is %s; must be %s like x", rbe_torch_dtype_name(dy_view.dtype), rbe_torch_dtype_name(x_view.dtype));
    }
    if (wanted < 0 || wanted > 31) return rbe_call_fail(call, "wanted: was %lld; must be 0 .. 31", (long long)wanted);
    bool want_bias = wanted & WANT_BIAS && bias, want_amplitude = wanted & WANT_AMPLITUDE && views.has_amplitude;

    gradient dx_gradient, dbasis, dgain, dbias, damplitude;
    status = gradient_result(call, &x_view, wanted & WANT_DX, x.dtype, &dx_gradient);
    if (status == RBE_OK) status = gradient_result(call, &views.basis, wanted & WANT_BASIS, w.real, &dbasis);
    if (status == RBE_OK) status = gradient_result(call, &views.gain, wanted & WANT_GAIN, w.real, &dgain);
    if (status == RBE_OK) status = gradient_result(call, bias ? &bias_view : NULL, want_bias, w.real, &dbias);
    if (status == RBE_OK)
        status = gradient_result(call, views.has_amplitude ? &views.amplitude : NULL, want_amplitude, w.real, &damplitude);
    if (status != RBE_OK) return status;

    dx = (rbe_matrix){dx_gradient.result, x.dtype, x.rows, x.cols, x.cols, 1};
    rbe_gradients out = {.dx = dx.data ? &dx : NULL, .basis = dbasis.computed, .gain = dgain.computed, .bias = dbias.computed,
                         .amplitude = damplitude.computed};
    if (rbe_on_cuda(call)) {
        status = rbe_cuda_linear_backward(&w, &dy, &x, &out, &call->place.device, &call->err);
    } else {
        rbe_parallel threads = rbe_torch_threads();
        status = rbe_linear_backward(&w, &dy, &x, &out, accuracy, &threads, &call->err);
    }
    if (status == RBE_OK) status = finish_gradient(call, &dbasis, w.real);
    if (status == RBE_OK) status = finish_gradient(call, &dgain, w.real);
    if (status == RBE_OK) status = finish_gradient(call, &dbias, w.real);
    if (status == RBE_OK) status = finish_gradient(call, &damplitude, w.real);
    return status;
}
