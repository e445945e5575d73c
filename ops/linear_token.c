// y = x W^T for a few tokens through tables kept token by token, P[q, 256], which a vector gathers from by the codes of 16 columns at once.
//
// For one token nothing is amortised over tokens: P costs 256 products a column, every code is read once and never stored.
#include "product.h"

typedef struct pass {
    rbe_job *job;
    float *x;       // [T][n]
    float *turned;  // the basis as [M][g][256]
    float *p;       // [T][K*M][256]
} pass;

static void fill_tables(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, codes = rbe_codes_a_row(w);
    for (int64_t t = 0; t < s->job->x->rows; ++t)
        s->job->kernels->table_token(end - begin, stages, g, rbe_min(end * g, w->cols) - begin * g, s->x + t * w->cols + begin * g, s->turned,
                                     s->p + (t * codes + begin * stages) * RBE_BASIS_VECTORS);
}

static void sum_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t codes = rbe_codes_a_row(w), tokens = s->job->x->rows, rows = end - begin;
    const bool stored = w->packed && w->layout.field == RBE_FIELD_RBE8;  // a packed row is its idx
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    float *y = rbe_scratch_take(tokens * rows, sizeof *y);
    if (!rbe_take_row_buffers(w, w->groups, &b) || !y) {
        atomic_store(&s->job->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        const rbe_code_row row = rbe_code_row_at(w, i);
        if (!stored) s->job->kernels->unpack(&row, 0, codes, b.idx, b.scale, b.signs);
        for (int64_t t = 0; t < tokens; ++t) {
            const float sum = s->job->kernels->table_dot(codes, stored ? row.packed : b.idx, b.scale, s->p + t * codes * RBE_BASIS_VECTORS);
            y[t * rows + i - begin] = sum * ((const float *)w->gain)[i] + (s->job->bias ? s->job->bias[i] : 0.0f);
        }
    }
    rbe_store_rows(s->job->kernels, s->job->y, 0, tokens, begin, rows, y, rows);
    rbe_scratch_end(mark);
}

rbe_status rbe_linear_token(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, tokens = job->x->rows;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {job, rbe_scratch_take(tokens * w->cols, sizeof(float)), rbe_scratch_take(stages * g * RBE_BASIS_VECTORS, sizeof(float)),
              rbe_scratch_take(tokens * rbe_codes_a_row(w) * RBE_BASIS_VECTORS, sizeof(float))};
    if (s.x && s.turned && s.p) {
        rbe_load_rows(job->kernels, job->x, 0, tokens, 0, w->cols, s.x, w->cols);
        for (int64_t m = 0; m < stages; ++m)
            job->kernels->transpose((const float *)w->basis + m * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g,
                                    s.turned + m * RBE_BASIS_VECTORS * g, RBE_BASIS_VECTORS, RBE_BASIS_VECTORS);
        rbe_run(job->threads, w->groups, rbe_share(job->threads, w->groups, 1), fill_tables, &s);
        rbe_run(job->threads, w->rows, rbe_share(job->threads, w->rows, 64), sum_rows, &s);
    } else {
        atomic_store(&job->failed, true);
    }
    rbe_scratch_end(mark);
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
