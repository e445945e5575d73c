// rbe_decode: W in full, row by row.
#include "dispatch.h"
#include "../kernels/reference/reference.h"
#include "product.h"

typedef struct pass {
    rbe_job *job;
    float *dense;
} pass;

static void decode_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    if (rbe_take_row_buffers(w, w->groups, &b)) {
        for (int64_t i = begin; i < end; ++i) rbe_decode_row(s->job->kernels, w, i, 0, w->groups, b, s->dense + i * w->cols);
    } else {
        atomic_store(&s->job->failed, true);
    }
    rbe_scratch_end(mark);
}

rbe_status rbe_decode(const rbe_weight *w, void *dense, const rbe_parallel *threads, rbe_error *err) {
    const rbe_kernels *kernels;
    rbe_status status = rbe_choose_kernels(&kernels, err);
    if (status == RBE_OK) status = rbe_check_weight(w, err);
    if (status != RBE_OK) return status;
    if (!dense) return rbe_fail(err, RBE_BAD_ARGUMENT, "dense: has no data");
    if (w->real == RBE_F64) {
        rbe_reference_decode(w, dense);
        return RBE_OK;
    }
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_weight rows;
    status = rbe_as_packed(kernels, w, threads, &rows, err);
    if (status == RBE_OK) {
        rbe_job job = {.kernels = kernels, .w = &rows, .threads = threads};
        pass s = {&job, dense};
        rbe_run(threads, w->rows, 16, decode_rows, &s);
        if (atomic_load(&job.failed)) status = rbe_out_of_memory(err);
    }
    rbe_scratch_end(mark);
    return status;
}
