// rbe_linear_backward: check, choose a path for dx, D and dbasis, then turn D into dgain, dscale and damplitude. float64 takes the reference.
#include <string.h>

#include "../kernels/reference/reference.h"
#include "dispatch.h"
#include "product.h"

static rbe_status check(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out, rbe_error *err) {
    rbe_status status = rbe_check_weight(w, err);
    if (status == RBE_OK) status = rbe_check_matrix(w, "x", x, -1, w->cols, err);
    if (status == RBE_OK) status = rbe_check_matrix(w, "dy", dy, x->rows, w->rows, err);
    if (status == RBE_OK && !out) return rbe_fail(err, RBE_BAD_ARGUMENT, "gradients: are missing");
    if (status == RBE_OK && out->dx) status = rbe_check_matrix(w, "dx", out->dx, x->rows, w->cols, err);
    if (status != RBE_OK) return status;
    if (x->dtype != dy->dtype || (out->dx && out->dx->dtype != x->dtype))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: must have the dtype of x", x->dtype != dy->dtype ? "dy" : "dx");
    if (out->amplitude && !w->amplitude)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "amplitude: its gradient is wanted, but the weight has no amplitude");
    return RBE_OK;
}

typedef struct finish {
    rbe_backward_job *backward;
    const rbe_gradients *out;
} finish;

// dscale = gain D, damplitude = dscale * d scale/da, dgain = sum over the row's codes of scale D
static void finish_rows(int64_t begin, int64_t end, void *context) {
    const finish *f = context;
    const rbe_job *job = &f->backward->job;
    const rbe_weight *w = job->w;
    const int64_t codes = rbe_codes_a_row(w);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    float *dscale = rbe_scratch_take(codes, sizeof *dscale);
    if (!rbe_take_row_buffers(w, w->groups, &b) || !dscale) {
        atomic_store(&f->backward->job.failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        const rbe_code_row row = rbe_code_row_at(w, i);
        const float *d = f->backward->d + i * codes, gain = ((const float *)w->gain)[i];
        if (f->out->gain && !f->backward->gain) {
            float sum = 0.0f;
            if (b.scale) {
                job->kernels->unpack(&row, 0, codes, b.idx, b.scale, b.signs);
                job->kernels->dot_rows(1, codes, d, codes, b.scale, &sum);
            } else {
                for (int64_t q = 0; q < codes; ++q) sum += d[q];
            }
            ((float *)f->out->gain)[i] = sum;
        }
        if (!f->out->scale && !f->out->amplitude) continue;
        float *target = f->out->scale ? (float *)f->out->scale + i * codes : dscale;
        for (int64_t q = 0; q < codes; ++q) target[q] = gain * d[q];
        if (f->out->amplitude) job->kernels->amplitude_gradient(&row, target, (float *)f->out->amplitude + i * codes);
    }
    rbe_scratch_end(mark);
}

enum { STRETCH = 512 };

// dbias = sum over t of dy, a stretch of rows of W, token after token
static void sum_tokens(int64_t begin, int64_t end, void *context) {
    const finish *f = context;
    const rbe_job *job = &f->backward->job;
    const bool rows = rbe_is_rows(job->y);
    float copy[STRETCH], *out = f->out->bias;
    for (int64_t i = begin * STRETCH; i < rbe_min(end * STRETCH, job->w->rows); i += STRETCH) {
        const int64_t some = rbe_min(STRETCH, job->w->rows - i);
        memset(out + i, 0, (size_t)some * sizeof *out);
        for (int64_t t = 0; t < job->y->rows; ++t) {
            if (!rows) rbe_load_rows(job->kernels, job->y, t, 1, i, some, copy, STRETCH);
            job->kernels->add_scaled(some, 1.0f, rows ? (const float *)job->y->data + t * job->y->row_stride + i : copy, out + i);
        }
    }
}

static rbe_status run(const rbe_kernels *kernels, const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out,
                      bool fast, const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = RBE_OK;
    const rbe_path path = rbe_plan_backward(kernels, &w->layout, w->rows, w->cols, x->rows, fast);
    const bool by_table = path != RBE_PATH_DECODE;
    const bool wants_d = out->scale || out->amplitude || (out->gain && by_table);  // decoded, dgain needs no D of each code
    const int64_t places = w->rows * rbe_codes_a_row(w), basis = w->layout.stages * (int64_t)RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_backward_job backward = {.job = {.kernels = kernels, .w = w, .x = x, .y = dy, .threads = threads, .fast = fast},
                                 .dx = out->dx, .dbasis = out->basis};
    if (wants_d && !(backward.d = rbe_scratch_take(places, sizeof(float)))) status = rbe_out_of_memory(err);
    if (status == RBE_OK) {
        if (backward.d) memset(backward.d, 0, (size_t)places * sizeof(float));
        if (backward.dbasis) memset(backward.dbasis, 0, (size_t)basis * sizeof(float));
        if (!by_table && (backward.gain = out->gain)) memset(backward.gain, 0, (size_t)w->rows * sizeof(float));
        if (out->dx || backward.d || backward.dbasis || backward.gain)
            status = path == RBE_PATH_TABLE_HALF ? rbe_backward_half(&backward, err)
                     : by_table                  ? rbe_backward_table(&backward, err)
                                                 : rbe_backward_decode(&backward, err);
    }
    finish f = {&backward, out};
    if (status == RBE_OK && out->bias) rbe_run(threads, (w->rows + STRETCH - 1) / STRETCH, 1, sum_tokens, &f);
    if (status == RBE_OK && wants_d) rbe_run(threads, w->rows, 16, finish_rows, &f);
    if (status == RBE_OK && atomic_load(&backward.job.failed)) status = rbe_out_of_memory(err);
    rbe_scratch_end(mark);
    return status;
}

rbe_status rbe_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out,
                               rbe_accuracy accuracy, const rbe_parallel *threads, rbe_error *err) {
    const rbe_kernels *kernels;
    rbe_status status = rbe_choose_kernels(&kernels, err);
    if (status == RBE_OK) status = check(w, dy, x, out, err);
    if (status == RBE_OK && (unsigned)accuracy > RBE_ACCURACY_FAST)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "accuracy: %d is not auto, exact or fast", (int)accuracy);
    if (status != RBE_OK) return status;
    if (w->real == RBE_F64) {
        rbe_reference_linear_backward(w, dy, x, out);
        return RBE_OK;
    }
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_weight rows;
    status = rbe_as_packed(kernels, w, threads, &rows, err);
    if (status == RBE_OK) status = run(kernels, &rows, dy, x, out, rbe_is_fast(accuracy, x->dtype), threads, err);
    rbe_scratch_end(mark);
    return status;
}
