// y = x W^T for few tokens through tables of bytes: packed rbe8 codes are read once, 64 rows looked up at a time.
//
// The tables' error is that of P rounded to 1/127 of the largest |P| of 64 codes. If any table is not finite the exact paths take over, so
// that NaN and infinity stay what they are and where they are.
#include "product.h"

enum {
    BLOCK = 64,   // codes that share a factor
    ROWS = 128,   // rows a token that pass over a block's tables before the next block: more tokens have more tables to bring in
};

typedef struct pass {
    rbe_job *job;
    const float *x, *turned;  // [T][n], the basis as [M][g][256]
    uint8_t *table;           // [T][K*M][256]
    float *factor;            // [T][ceil(K*M / 64)]
    atomic_bool infinite;
} pass;

// Blocks of 64 codes. A block may begin inside a group (M > 1): P is made for the groups that it touches.
static void fill_tables(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, codes = rbe_codes_a_row(w), blocks = (codes + BLOCK - 1) / BLOCK;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *p = rbe_scratch_take((BLOCK + 2 * stages) * RBE_BASIS_VECTORS, sizeof *p);
    if (!p) atomic_store(&s->job->failed, true);
    for (int64_t b = begin; p && b < end; ++b) {
        const int64_t q0 = b * BLOCK, count = rbe_min(BLOCK, codes - q0), k0 = q0 / stages, k1 = (q0 + count - 1) / stages + 1;
        for (int64_t t = 0; t < s->job->x->rows; ++t) {
            s->job->kernels->table_token(k1 - k0, stages, g, rbe_min(k1 * g, w->cols) - k0 * g, s->x + t * w->cols + k0 * g, s->turned, p);
            if (!s->job->kernels->lut8_quantise(count, p + (q0 - k0 * stages) * RBE_BASIS_VECTORS,
                                                s->table + (t * codes + q0) * RBE_BASIS_VECTORS, &s->factor[t * blocks + b]))
                atomic_store(&s->infinite, true);
        }
    }
    rbe_scratch_end(mark);
}

static void sum_rows(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t tokens = s->job->x->rows, codes = rbe_codes_a_row(w), pass_rows = rbe_min(ROWS * tokens, (end - begin + 63) / 64 * 64);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *y = rbe_scratch_take(tokens * pass_rows, sizeof *y);
    if (!y) atomic_store(&s->job->failed, true);
    for (int64_t i0 = begin; y && i0 < end; i0 += pass_rows) {
        const int64_t rows = rbe_min(pass_rows, end - i0);
        const uint8_t *idx = w->packed + i0 * w->packed_stride;
        for (int64_t i = 0; i < tokens * pass_rows; ++i) y[i] = 0.0f;
        s->job->kernels->lut8_rows(rows, codes, idx, w->packed_stride, tokens, s->table, s->factor, y, pass_rows);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < rows; ++i)
                y[t * pass_rows + i] = y[t * pass_rows + i] * ((const float *)w->gain)[i0 + i] + (s->job->bias ? s->job->bias[i0 + i] : 0.0f);
        rbe_store_rows(s->job->kernels, s->job->y, 0, tokens, i0, rows, y, pass_rows);
    }
    rbe_scratch_end(mark);
}

rbe_status rbe_linear_lut8(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, tokens = job->x->rows, codes = rbe_codes_a_row(w);
    const int64_t blocks = (codes + BLOCK - 1) / BLOCK;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *x = rbe_scratch_take(tokens * w->cols, sizeof *x), *turned = rbe_scratch_take(stages * g * RBE_BASIS_VECTORS, sizeof *turned);
    pass s = {.job = job, .x = x, .turned = turned, .table = rbe_scratch_take(tokens * codes, RBE_BASIS_VECTORS),
              .factor = rbe_scratch_take(tokens * blocks, sizeof(float))};
    if (x && turned && s.table && s.factor) {
        rbe_load_rows(job->kernels, job->x, 0, tokens, 0, w->cols, x, w->cols);
        for (int64_t m = 0; m < stages; ++m)
            job->kernels->transpose((const float *)w->basis + m * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g,
                                    turned + m * RBE_BASIS_VECTORS * g, RBE_BASIS_VECTORS, RBE_BASIS_VECTORS);
        rbe_run(job->threads, blocks, rbe_share(job->threads, blocks, 1), fill_tables, &s);
        if (!atomic_load(&s.infinite)) rbe_run(job->threads, w->rows, rbe_share(job->threads, w->rows, ROWS), sum_rows, &s);
    } else {
        atomic_store(&job->failed, true);
    }
    rbe_scratch_end(mark);
    if (atomic_load(&job->failed)) return rbe_out_of_memory(err);
    return atomic_load(&s.infinite) ? rbe_linear_exact(job, err) : RBE_OK;
}
