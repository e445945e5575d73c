// rbe_linear: check, choose a path, run it. float64 takes the reference.
#include "dispatch.h"
#include "../kernels/reference/reference.h"
#include "product.h"

static rbe_path plan(const rbe_job *job, rbe_form form) {
    return rbe_plan_linear(job->kernels, &job->w->layout, job->w->rows, job->w->cols, job->x->rows, job->fast, form);
}

static rbe_status run_floats(rbe_job *job, rbe_path path, rbe_error *err) {
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_weight rows;
    rbe_status status = rbe_as_packed(job->kernels, job->w, job->threads, &rows, err);
    job->w = &rows;
    if (status == RBE_OK) {
        switch (path) {
            case RBE_PATH_TABLE: status = rbe_linear_table(job, err); break;
            case RBE_PATH_TABLE_HALF: status = rbe_linear_half(job, err); break;
            case RBE_PATH_TABLE_TOKEN: status = rbe_linear_token(job, err); break;
            case RBE_PATH_DECODE_DOT: status = rbe_linear_decode(job, true, err); break;
            default: status = rbe_linear_decode(job, false, err);
        }
    }
    rbe_scratch_end(mark);
    return status;
}

rbe_status rbe_linear_floats(rbe_job *job, rbe_error *err) { return run_floats(job, plan(job, RBE_FORM_WORDS), err); }

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
    const rbe_path path = plan(&job, w->interleaved ? RBE_FORM_INTERLEAVED : w->packed ? RBE_FORM_PACKED : RBE_FORM_WORDS);
    if (path == RBE_PATH_LUT8) return rbe_linear_lut8(&job, err);
    if (path == RBE_PATH_FEW) return rbe_linear_few(&job, err);
    if (path == RBE_PATH_LOOKUP) return rbe_linear_lookup(&job, err);
    if (path == RBE_PATH_LOOKUP_SPLIT) return rbe_linear_lookup_split(&job, err);
    return path == RBE_PATH_DIGITS ? rbe_linear_digits(&job, err) : run_floats(&job, path, err);
}
