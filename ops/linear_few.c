// y = x W^T for a few tokens in float32: codes of one byte look entries of 4 or 8 tokens up in tables that stay in L1.
//
// Each thread makes the tables of a few codes and passes over all its rows with them; tokens beyond 8 are passes of their own.
#include "product.h"

enum { CODES_BY_FOUR = 8, CODES_BY_EIGHT = 8 };  // 32 kB of tables

typedef struct pass {
    rbe_job *job;
    const float *turned;  // the basis as [M][g][256]
    const float *x;       // [n][width]
    int64_t t0, tokens, width;
} pass;

static void sum_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t first = begin * RBE_LANES, rows = rbe_min(end * RBE_LANES, w->rows) - first, codes = rbe_codes_a_row(w), g = w->layout.group;
    const int64_t stages = w->layout.stages, width = s->width;
    const int64_t together = rbe_max(1, (width == 4 ? CODES_BY_FOUR : CODES_BY_EIGHT) / stages);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *p = rbe_scratch_take(together * stages * RBE_BASIS_VECTORS * width, sizeof *p), *y = rbe_scratch_take((end - begin) * RBE_LANES * width, sizeof *y);
    if (!p || !y) atomic_store(&s->job->failed, true);
    for (int64_t i = 0; p && y && i < (end - begin) * RBE_LANES * width; ++i) y[i] = 0.0f;
    for (int64_t k = 0; p && y && k < w->groups; k += together) {
        const int64_t groups = rbe_min(together, w->groups - k), q = k * stages;
        const int64_t full = rbe_min(groups, w->cols / g - k);  // the last group may be cut short
        kernels->few_tables(full, stages, g, g, width, s->x + k * g * width, s->turned, p);
        if (full < groups)
            kernels->few_tables(1, stages, g, w->cols % g, width, s->x + (k + full) * g * width, s->turned,
                                p + full * stages * RBE_BASIS_VECTORS * width);
        if (w->interleaved)
            kernels->few_interleaved(rows, groups * stages, w->interleaved + (begin * codes + q) * RBE_LANES, codes * RBE_LANES, width, p, y);
        else
            kernels->few_rows(rows, groups * stages, w->packed + first * w->packed_stride + q, w->packed_stride, width, p, y);
    }
    if (p && y) rbe_finish_tile(s->job, s->t0, s->tokens, first, rows, y, width);
    rbe_scratch_end(mark);
}

rbe_status rbe_linear_few(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, tiles = (w->rows + RBE_LANES - 1) / RBE_LANES;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *turned = rbe_scratch_take(stages * g * RBE_BASIS_VECTORS, sizeof *turned), *x = rbe_scratch_take(w->cols * 8, sizeof *x);
    if (!turned || !x) atomic_store(&job->failed, true);
    for (int64_t s = 0; turned && x && s < stages; ++s)
        job->kernels->transpose((const float *)w->basis + s * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g, turned + s * RBE_BASIS_VECTORS * g,
                                RBE_BASIS_VECTORS, RBE_BASIS_VECTORS);
    pass s = {.job = job, .turned = turned, .x = x};
    for (s.t0 = 0; turned && x && s.t0 < job->x->rows; s.t0 += s.tokens) {
        s.tokens = rbe_min(8, job->x->rows - s.t0);
        s.width = s.tokens <= 4 ? 4 : 8;
        rbe_load_tile(job->kernels, job->x, s.t0, s.tokens, 0, w->cols, x, s.width);
        rbe_run(job->threads, tiles, rbe_share(job->threads, tiles, 1), sum_rows, &s);
    }
    rbe_scratch_end(mark);
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
