// Refuses arguments of a product that do not fit the weight, before any memory behind them is read.
#include <math.h>

#include "../kernels/reference/reference.h"
#include "product.h"

rbe_status rbe_out_of_memory(rbe_error *err) { return rbe_fail(err, RBE_OUT_OF_MEMORY, "workspace: out of memory"); }

static const char *dtype_name(rbe_dtype dtype) {
    static const char *const names[] = {"float32", "float64", "bfloat16", "float16"};
    return (unsigned)dtype < 4 ? names[dtype] : "unknown";
}

rbe_status rbe_check_gain(const rbe_weight *w, rbe_error *err) {
    for (int64_t i = 0; i < w->rows; ++i) {
        const double gain = rbe_real_at(w->gain, w->real, i);
        if (!isfinite(gain)) return rbe_fail(err, RBE_BAD_ARGUMENT, "gain: row %lld is %g, must be finite", (long long)i, gain);
    }
    return RBE_OK;
}

static rbe_status check_sparse(const rbe_weight *w, rbe_error *err) {
    const int64_t count = rbe_reference_sparse_count(w);
    const int32_t *column = w->residual.right;
    for (int64_t i = 0; i < w->rows; ++i) {
        for (int64_t p = 0, last = -1; p < count; ++p, ++column) {
            if (*column <= last || *column >= w->cols)
                return rbe_fail(err, RBE_BAD_ARGUMENT, "residual_right: column %ld at row %lld, entry %lld must be above %lld and below %lld",
                                (long)*column, (long long)i, (long long)p, (long long)last, (long long)w->cols);
            last = *column;
        }
    }
    return RBE_OK;
}

static rbe_status check_residual(const rbe_weight *w, rbe_error *err) {
    const rbe_residual *r = &w->residual;
    const rbe_residual_kind kind = w->layout.residual;
    if (kind == RBE_RESIDUAL_NONE) return RBE_OK;
    if ((unsigned)kind > RBE_RESIDUAL_SPARSE) return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: residual kind %d is unknown", (int)kind);
    const bool right = kind == RBE_RESIDUAL_LOWRANK || kind == RBE_RESIDUAL_SPARSE;
    const char *missing = !r->values                                             ? "residual"
                          : !r->scale && kind != RBE_RESIDUAL_SPARSE             ? "residual_scale"
                          : !r->right && right                                   ? "residual_right"
                          : !r->right_scale && kind == RBE_RESIDUAL_LOWRANK      ? "residual_right_scale"
                                                                                 : NULL;
    if (missing) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: is missing, but the layout's residual needs it", missing);
    if (kind == RBE_RESIDUAL_LOWRANK && w->layout.rank < 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: rank %d of the residual must be at least 1", (int)w->layout.rank);
    if (kind != RBE_RESIDUAL_SPARSE) return RBE_OK;
    if (!(w->layout.fraction > 0.0 && w->layout.fraction <= 1.0))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: sparse fraction %g must be above 0 and at most 1", w->layout.fraction);
    return check_sparse(w, err);
}

rbe_status rbe_check_weight(const rbe_weight *w, rbe_error *err) {
    const rbe_status codes = rbe_check_codes(w, err);
    if (codes != RBE_OK) return codes;
    if (w->real != RBE_F32 && w->real != RBE_F64)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: is %s, must be float32 or float64", dtype_name(w->real));
    if (!w->basis || !w->gain) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: is missing", w->basis ? "gain" : "basis");
    if (w->layout.field == RBE_FIELD_RBE16S && w->layout.group != 8)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: rbe16s has eight signs, so its group must be 8, not %d", (int)w->layout.group);
    if (w->amplitude && !rbe_field_has_scale(w->layout.field))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "amplitude: is given, but codes of %d bits have scale 1 and no amplitude", (int)w->layout.bits);
    if (w->amplitude && !w->rounded && w->real != RBE_F64)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "rounded: is false with %s, but only float64 computes with unrounded amplitudes",
                        dtype_name(w->real));
    const rbe_status gain = rbe_check_gain(w, err);
    return gain != RBE_OK ? gain : check_residual(w, err);
}

rbe_status rbe_check_matrix(const rbe_weight *w, const char *name, const rbe_matrix *a, int64_t tokens, int64_t cols, rbe_error *err) {
    if (!a) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: is missing", name);
    if ((unsigned)a->dtype > RBE_F16) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: dtype %d is unknown", name, (int)a->dtype);
    if ((a->dtype == RBE_F64) != (w->real == RBE_F64))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: is %s with a basis of %s; float64 goes with float64, all others with float32", name,
                        dtype_name(a->dtype), dtype_name(w->real));
    if (a->rows < 0 || (tokens >= 0 && a->rows != tokens))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: has %lld rows, must have %s%lld", name, (long long)a->rows, tokens < 0 ? "at least " : "",
                        (long long)(tokens < 0 ? 0 : tokens));
    if (a->cols != cols)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: has %lld columns, but the weight is %lld x %lld, so it must have %lld", name,
                        (long long)a->cols, (long long)w->rows, (long long)w->cols, (long long)cols);
    if (a->rows > INT64_MAX / 64 / rbe_max(1, a->cols))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: %lld rows of %lld columns are more than can be addressed", name, (long long)a->rows,
                        (long long)a->cols);
    if (a->rows && !a->data) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: has no data", name);
    return RBE_OK;
}
