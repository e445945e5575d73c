// y = x W^T through tables, a tile of tokens at a time:
//
//     P[q, j, t] = sum over e of x[t, k*g + e] basis[s, j, e]                      a dense product, 256 rows a group and stage
//     y[t, i]    = gain[i] * sum over q of scale[i,q] P[q, idx[i,q], t] + bias[i]
//
// A block of groups has its P in the L2 cache while all rows pass over it. Threads that share a tile share its groups, then its rows: every y is the
// same chain of operations as on one thread.
#include "product.h"

enum { TABLE_BYTES = 512 << 10 };  // of P: what fits L2 beside the rows of y

typedef struct pass {
    rbe_job *job;
    rbe_codes codes;
    int64_t block;  // groups a block
    const uint16_t *basis;  // split for the matrix unit [M][rbe_split_size(256, g)], or NULL
    int pieces;             // of an activation
    // of the tile at hand
    int64_t t0, tokens, width;
    float *x, *p, *y;       // [n][width], [block * M][256][width], [m][width]
    int64_t k0, groups;     // of the block at hand
    bool first, last;
} pass;

static void load_columns(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    rbe_load_tile(s->job->kernels, s->job->x, s->t0, s->tokens, begin, end - begin, s->x + begin * s->width, s->width);
}

static void fill_table(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, size = RBE_BASIS_VECTORS * s->width;
    for (int64_t k = begin; k < end; ++k) {
        const int64_t column = (s->k0 + k) * g, depth = rbe_min(g, w->cols - column);
        for (int64_t m = 0; m < stages; ++m)
            s->job->kernels->gemm(RBE_BASIS_VECTORS, depth, s->width, (const float *)w->basis + m * RBE_BASIS_VECTORS * g, g, 1,
                                  s->x + column * s->width, s->width, s->p + (k * stages + m) * size, s->width, false);
    }
}

// The same on the matrix unit. The split basis has zeros for nothing but whole groups: a last group that n cuts short goes the other way.
static void fill_table_split(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, size = RBE_BASIS_VECTORS * s->width;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    uint16_t *x = rbe_scratch_take(rbe_split_size(s->width, g), sizeof *x);
    if (!x) atomic_store(&s->job->failed, true);
    s->job->kernels->split_begin();
    for (int64_t k = begin; x && k < end; ++k) {
        const int64_t column = (s->k0 + k) * g;
        if (w->cols - column < g) {
            fill_table(k, k + 1, context);
            continue;
        }
        s->job->kernels->split_cols(g, s->width, s->x + column * s->width, s->width, s->pieces, x);
        for (int64_t m = 0; m < stages; ++m)
            s->job->kernels->gemm_split(RBE_BASIS_VECTORS, g, s->width, s->basis + m * rbe_split_size(RBE_BASIS_VECTORS, g),
                                        rbe_float_pieces(s->job->fast), x, s->pieces,
                                        s->p + (k * stages + m) * size, s->width, false);
    }
    s->job->kernels->split_end();
    rbe_scratch_end(mark);
}

static void sum_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t at = s->k0 / s->block * s->codes.step + begin * s->codes.row;
    const float *gain = s->last ? (const float *)w->gain + begin : NULL, *bias = s->job->bias ? s->job->bias + begin : NULL;
    s->job->kernels->table_rows(end - begin, s->groups * w->layout.stages, s->codes.idx + at, s->codes.scale ? s->codes.scale + at : NULL,
                                s->codes.row, s->p, s->width, s->y + begin * s->width, s->first, gain, bias);
    if (s->last)
        rbe_store_tile(s->job->kernels, s->job->y, s->t0, s->tokens, begin, end - begin, s->y + begin * s->width, s->width);
}

// One tile of tokens; threads NULL: all on this thread.
static bool tile(pass *s, const rbe_parallel *threads) {
    const rbe_weight *w = s->job->w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    s->x = rbe_scratch_take(w->cols * s->width, sizeof(float));
    s->p = rbe_scratch_take(s->block * w->layout.stages * RBE_BASIS_VECTORS * s->width, sizeof(float));
    s->y = rbe_scratch_take(w->rows * s->width, sizeof(float));
    const bool room = s->x && s->p && s->y;
    if (room) rbe_run(threads, w->cols, rbe_share(threads, w->cols, 256), load_columns, s);
    for (int64_t k0 = 0; room && k0 < w->groups; k0 += s->block) {
        s->k0 = k0;
        s->groups = rbe_min(s->block, w->groups - k0);
        s->first = k0 == 0;
        s->last = k0 + s->groups == w->groups;
        rbe_run(threads, s->groups, rbe_share(threads, s->groups, 1), s->basis ? fill_table_split : fill_table, s);
        rbe_run(threads, w->rows, rbe_share(threads, w->rows, 32), sum_rows, s);
    }
    rbe_scratch_end(mark);
    return room;
}

// The tile of tokens from t0 on; the last one may be narrow.
static bool tile_at(const void *shared, int64_t t0, const rbe_parallel *threads) {
    pass s = *(const pass *)shared;
    const int64_t narrow = s.job->kernels->width;
    s.t0 = t0;
    s.tokens = rbe_min(2 * narrow, s.job->x->rows - t0);
    s.width = s.tokens <= narrow ? narrow : 2 * narrow;
    return tile(&s, threads);
}

rbe_status rbe_linear_table(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job};
    const int64_t wide = 2 * job->kernels->width;
    const int64_t group_bytes = w->layout.stages * RBE_BASIS_VECTORS * wide * (int64_t)sizeof(float);
    s.block = rbe_min(w->groups, rbe_max(1, TABLE_BYTES / group_bytes));
    rbe_status status = rbe_unpack_codes(job->kernels, w, s.block * w->layout.stages, false, job->threads, &s.codes, err);
    if (status == RBE_OK && rbe_wants_split(job->kernels, w->layout.group, 32)) {
        s.basis = rbe_split_basis(job->kernels, w);
        s.pieces = rbe_pieces(job->x->dtype, job->fast);
        if (!s.basis) status = rbe_out_of_memory(err);
    }
    if (status == RBE_OK) status = rbe_run_token_tiles(job, wide, tile_at, &s, err);
    rbe_scratch_end(mark);
    return status;
}
