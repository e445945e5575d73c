// rbe_linear: check, choose a path, run it. float64 takes the reference.
#include "dispatch.h"
#include "../kernels/reference/reference.h"
#include "product.h"

static rbe_status run(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    switch (rbe_plan_linear(job->kernels, &w->layout, w->rows, w->cols, job->x->rows, job->fast, w->packed != NULL)) {
        case RBE_PATH_TABLE: return rbe_linear_table(job, err);
        case RBE_PATH_TABLE_TOKEN: return rbe_linear_token(job, err);
        case RBE_PATH_LUT8: return rbe_linear_lut8(job, err);
        case RBE_PATH_DECODE_DOT: return rbe_linear_decode(job, true, err);
        default: return rbe_linear_decode(job, false, err);
    }
}

rbe_status rbe_linear_exact(rbe_job *job, rbe_error *err) {
    job->fast = false;
    return run(job, err);
}

rbe_status rbe_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y, rbe_accuracy accuracy,
                      const rbe_parallel *threads, rbe_error *err) {
    const rbe_kernels *kernels;
    rbe_status status = rbe_choose_kernels(&kernels, err);
    if (status == RBE_OK) status = rbe_check_weight(w, err);
    if (status == RBE_OK) status = rbe_check_matrix(w, "x", x, -1, w->cols, err);
    if (status == RBE_OK) status = rbe_check_matrix(w, "y", y, x->rows, w->rows, err);
    if (status != RBE_OK) return status;
    if (x->dtype != y->dtype) return rbe_fail(err, RBE_BAD_ARGUMENT, "y: must have the dtype of x");
    if ((unsigned)accuracy > RBE_ACCURACY_FAST)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "accuracy: %d is not auto, exact or fast", (int)accuracy);
    if (x->rows == 0) return RBE_OK;
    if (w->real == RBE_F64) {
        rbe_reference_linear(w, x, bias, y);
        return RBE_OK;
    }
    rbe_job job = {.kernels = kernels, .w = w, .x = x, .y = y, .bias = bias, .threads = threads};
    job.fast = rbe_is_fast(accuracy, x->dtype);
    return run(&job, err);
}
