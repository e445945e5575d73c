// y = x W^T for few tokens through tables of bytes: packed or interleaved rbe8 codes are read once, 64 rows looked up at a time.
//
// P is rounded to a share of the largest |P| of 64 codes: to 1/127 in the fast class, one plane of bytes, to 2^-23 or better in the exact class,
// three planes. If any table is not finite the other paths take over, so that NaN and infinity stay what they are and where they are.
#include "product.h"

enum {
    BLOCK = 64,   // codes that share a factor
    ROWS = 128,   // packed rows a token that pass over a block's tables before the next block: more tokens have more tables to bring in
    FIRST_BLOCKS = 3, FIRST_LINES = 24 << 10,  // of codes, asked for while tables are made: of all rows, or row tile by row tile
    SUMS = 32 << 10,  // of interleaved rows that pass together: 128 kB stay in L2
};

typedef struct pass {
    rbe_job *job;
    const float *x, *turned;  // [T][n], the basis as [M][g][256]
    int planes;
    uint8_t *table;           // [T][K*M][planes][256]
    float *factor;            // [T][ceil(K*M / 64)]
    atomic_bool infinite;
} pass;

// Asks for a share of the codes that are looked up first, while tables are made: part `at` of `parts`, in the order of reading.
static void ask_ahead(const pass *s, int64_t at, int64_t parts) {
    const rbe_weight *w = s->job->w;
    const int64_t codes = rbe_codes_a_row(w), tiles = rbe_interleaved_tiles(w->rows), some = rbe_min(codes, FIRST_BLOCKS * BLOCK);
    const bool streams = rbe_lut8_streams(s->job->x->rows, codes, s->planes);
    const int64_t lines = streams ? rbe_min(tiles * codes, FIRST_LINES) : tiles * some;
    if (!w->interleaved) return;
    for (int64_t line = at * lines / parts; line < (at + 1) * lines / parts; ++line)
        __builtin_prefetch(w->interleaved + (streams ? line : line / some * codes + line % some) * RBE_LANES, 0, 2);
}

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
            for (int64_t k = k0; k < k1; ++k) {
                s->job->kernels->table_token(1, stages, g, rbe_min((k + 1) * g, w->cols) - k * g, s->x + t * w->cols + k * g, s->turned,
                                             p + (k - k0) * stages * RBE_BASIS_VECTORS);
                if (t == 0) ask_ahead(s, b * (k1 - k0) + k - k0, blocks * (k1 - k0));
            }
            if (!s->job->kernels->lut8_quantise(count, p + (q0 - k0 * stages) * RBE_BASIS_VECTORS, s->planes,
                                                s->table + (t * codes + q0) * s->planes * RBE_BASIS_VECTORS, &s->factor[t * blocks + b]))
                atomic_store(&s->infinite, true);
        }
    }
    rbe_scratch_end(mark);
}

// Tiles of 64 rows.
static void sum_rows(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t tokens = s->job->x->rows, codes = rbe_codes_a_row(w), first = begin * BLOCK, last = rbe_min(end * BLOCK, w->rows);
    const int64_t together = w->interleaved ? rbe_max(1, SUMS / BLOCK / tokens) * BLOCK : ROWS * tokens;
    const int64_t pass_rows = rbe_min(together, (end - begin) * BLOCK);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *y = rbe_scratch_take(tokens * pass_rows, sizeof *y);
    if (!y) atomic_store(&s->job->failed, true);
    for (int64_t i0 = first; y && i0 < last; i0 += pass_rows) {
        const int64_t rows = rbe_min(pass_rows, last - i0);
        for (int64_t i = 0; i < tokens * pass_rows; ++i) y[i] = 0.0f;
        if (w->interleaved)
            kernels->lut8_interleaved(rows, codes, w->interleaved + i0 * codes, tokens, s->planes, s->table, s->factor, y, pass_rows);
        else
            kernels->lut8_rows(rows, codes, w->packed + i0 * w->packed_stride, w->packed_stride, tokens, s->planes, s->table, s->factor, y,
                               pass_rows);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < rows; ++i)
                y[t * pass_rows + i] = y[t * pass_rows + i] * ((const float *)w->gain)[i0 + i] + (s->job->bias ? s->job->bias[i0 + i] : 0.0f);
        rbe_store_rows(kernels, s->job->y, 0, tokens, i0, rows, y, pass_rows);
    }
    rbe_scratch_end(mark);
}

rbe_status rbe_linear_lut8(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, tokens = job->x->rows, codes = rbe_codes_a_row(w);
    const int64_t blocks = (codes + BLOCK - 1) / BLOCK, tiles = (w->rows + BLOCK - 1) / BLOCK;
    const int planes = job->fast ? 1 : 3;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *x = rbe_scratch_take(tokens * w->cols, sizeof *x), *turned = rbe_scratch_take(stages * g * RBE_BASIS_VECTORS, sizeof *turned);
    pass s = {.job = job, .x = x, .turned = turned, .planes = planes,
              .table = rbe_scratch_take(tokens * codes * planes, RBE_BASIS_VECTORS),
              .factor = rbe_scratch_take(tokens * blocks, sizeof(float))};
    if (x && turned && s.table && s.factor) {
        rbe_load_rows(job->kernels, job->x, 0, tokens, 0, w->cols, x, w->cols);
        for (int64_t m = 0; m < stages; ++m)
            job->kernels->transpose((const float *)w->basis + m * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g,
                                    turned + m * RBE_BASIS_VECTORS * g, RBE_BASIS_VECTORS, RBE_BASIS_VECTORS);
        rbe_run(job->threads, blocks, rbe_share(job->threads, blocks, 1), fill_tables, &s);
        if (!atomic_load(&s.infinite)) rbe_run(job->threads, tiles, rbe_share(job->threads, tiles, 2), sum_rows, &s);
    } else {
        atomic_store(&job->failed, true);
    }
    rbe_scratch_end(mark);
    if (atomic_load(&job->failed)) return rbe_out_of_memory(err);
    return atomic_load(&s.infinite) ? rbe_linear_floats(job, err) : RBE_OK;
}
