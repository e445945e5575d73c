// y = x W^T with W decoded to float32 a piece at a time: signs and residuals, small groups, and additive layouts at many tokens.
//
// Many tokens: a tile of rows x columns is decoded once for a block of tokens and multiplied by the dense micro-kernel.
// Few tokens: a stretch of a row is decoded and dotted with each token's.
#include "product.h"

enum {
    TOKENS = 512,   // a block of tokens, laid out once, shares each decoded tile
    ROWS = 96,      // of a tile: 384 kB at COLUMNS, beside 1 MB of x in L2
    COLUMNS = 1024  // of a tile, in whole groups
};

// With a matrix unit the tiles of x are split once a block of tokens, chunk of columns by chunk, and each decoded tile as it comes.

typedef struct pass {
    rbe_job *job;
    int64_t chunk;  // groups a tile
    int64_t t0, tokens, width;
    const float *x;  // dot: rows of tokens, x_row apart; else tiles [TOKENS / width][n][width]
    int64_t x_row;
    uint16_t *split;  // [TOKENS / width][chunks of columns][rbe_split_size(width, columns)], or NULL
} pass;

static int64_t chunk_columns(const pass *s) { return rbe_min(s->chunk * s->job->w->layout.group, s->job->w->cols); }
static int64_t split_chunk_size(const pass *s) { return rbe_split_size(s->width, chunk_columns(s)); }
static uint16_t *split_chunk(const pass *s, int64_t tile, int64_t k0) {
    const int64_t chunks = (s->job->w->groups + s->chunk - 1) / s->chunk;
    return s->split + (tile * chunks + k0 / s->chunk) * split_chunk_size(s);
}

static void load_tiles(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *copy = s->split ? rbe_scratch_take(chunk_columns(s) * s->width, sizeof *copy) : NULL;
    if (s->split && !copy) atomic_store(&s->job->failed, true);
    for (int64_t i = begin; i < end && (copy || !s->split); ++i) {
        const int64_t t = i * s->width, tokens = rbe_min(s->width, s->tokens - t);
        if (!s->split) rbe_load_tile(kernels, s->job->x, s->t0 + t, tokens, 0, w->cols, (float *)s->x + t * w->cols, s->width);
        for (int64_t k0 = 0; s->split && k0 < w->groups; k0 += s->chunk) {
            const int64_t j0 = k0 * w->layout.group, cols = rbe_min(chunk_columns(s), w->cols - j0);
            rbe_load_tile(kernels, s->job->x, s->t0 + t, tokens, j0, cols, copy, s->width);
            kernels->split_cols(cols, s->width, copy, s->width, rbe_activation_pieces(s->job), split_chunk(s, i, k0));
        }
    }
    rbe_scratch_end(mark);
}

typedef struct buffers {
    rbe_row_buffers row;
    float *tile, *y;  // decoded [ROWS][reach], sums [tiles][rows][width]
    uint16_t *split;  // the tile split by rows
    int64_t reach;
} buffers;

static bool take_buffers(const pass *s, int64_t rows, buffers *b) {
    const int64_t tiles = (s->tokens + s->width - 1) / s->width;
    b->reach = chunk_columns(s);
    b->tile = rbe_scratch_take(ROWS * b->reach, sizeof *b->tile);
    b->y = rbe_scratch_take(tiles * rows * s->width, sizeof *b->y);
    b->split = s->split ? rbe_scratch_take(rbe_split_size(ROWS, b->reach), sizeof *b->split) : NULL;
    return rbe_take_row_buffers(s->job->w, s->chunk, &b->row) && b->tile && b->y && (b->split || !s->split);
}

// Adds the products of `some` decoded rows, from row i0 of `rows`, with every tile of tokens.
static void multiply_tile(const pass *s, const buffers *b, int64_t i0, int64_t some, int64_t rows, int64_t k0, int64_t cols) {
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t width = s->width, tiles = (s->tokens + width - 1) / width, j0 = k0 * s->job->w->layout.group;
    if (s->split) kernels->split_rows(some, cols, b->tile, b->reach, rbe_weight_pieces(s->job), b->split);
    for (int64_t n = 0; n < tiles; ++n) {
        float *y = b->y + (n * rows + i0) * width;
        if (s->split)
            kernels->gemm_split(some, cols, width, b->split, rbe_weight_pieces(s->job), split_chunk(s, n, k0), rbe_activation_pieces(s->job), y, width,
                                true);
        else
            kernels->gemm(some, cols, width, b->tile, b->reach, 1, s->x + (n * s->job->w->cols + j0) * width, width, y, width, true);
    }
}

static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t width = s->width, tiles = (s->tokens + width - 1) / width, rows = end - begin;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    buffers b;
    if (!take_buffers(s, rows, &b)) {
        atomic_store(&s->job->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = 0; i < tiles * rows; ++i)
        for (int64_t t = 0; t < width; ++t) b.y[i * width + t] = s->job->bias ? s->job->bias[begin + i % rows] : 0.0f;
    if (s->split) kernels->split_begin();
    for (int64_t k0 = 0; k0 < w->groups; k0 += s->chunk) {
        const int64_t groups = rbe_min(s->chunk, w->groups - k0), cols = rbe_min(groups * w->layout.group, w->cols - k0 * w->layout.group);
        for (int64_t i0 = 0; i0 < rows; i0 += ROWS) {
            const int64_t some = rbe_min(ROWS, rows - i0);
            for (int64_t i = 0; i < some; ++i) rbe_decode_row(kernels, w, begin + i0 + i, k0, groups, b.row, b.tile + i * b.reach);
            multiply_tile(s, &b, i0, some, rows, k0, cols);
        }
    }
    if (s->split) kernels->split_end();
    for (int64_t n = 0; n < tiles; ++n)
        rbe_store_tile(kernels, s->job->y, s->t0 + n * width, rbe_min(width, s->tokens - n * width), begin, rows, b.y + n * rows * width, width);
    rbe_scratch_end(mark);
}

static void dot_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t tokens = s->job->x->rows, rows = end - begin;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    float *piece = rbe_scratch_take(chunk_columns(s), sizeof *piece), *y = rbe_scratch_take(tokens * rows, sizeof *y),
          *sum = rbe_scratch_take(tokens, sizeof *sum);
    if (!rbe_take_row_buffers(w, s->chunk, &b) || !piece || !y || !sum) {
        atomic_store(&s->job->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        float *out = y + (i - begin);
        for (int64_t t = 0; t < tokens; ++t) out[t * rows] = s->job->bias ? s->job->bias[i] : 0.0f;
        for (int64_t k0 = 0; k0 < w->groups; k0 += s->chunk) {
            const int64_t groups = rbe_min(s->chunk, w->groups - k0), j0 = k0 * w->layout.group;
            rbe_decode_row(s->job->kernels, w, i, k0, groups, b, piece);
            s->job->kernels->dot_rows(tokens, rbe_min(groups * w->layout.group, w->cols - j0), s->x + j0, s->x_row, piece, sum);
            for (int64_t t = 0; t < tokens; ++t) out[t * rows] += sum[t];
        }
    }
    rbe_store_rows(s->job->kernels, s->job->y, 0, tokens, begin, rows, y, rows);
    rbe_scratch_end(mark);
}

static bool run_dot(pass *s) {
    rbe_job *job = s->job;
    const rbe_matrix *x = job->x;
    s->x = x->data;
    s->x_row = x->row_stride;
    if (!rbe_is_rows(x)) {
        float *copy = rbe_scratch_take(x->rows * x->cols, sizeof *copy);
        if (!copy) return false;
        rbe_load_rows(job->kernels, x, 0, x->rows, 0, x->cols, copy, x->cols);
        s->x = copy;
        s->x_row = x->cols;
    }
    rbe_run(job->threads, job->w->rows, rbe_share(job->threads, job->w->rows, 64), dot_rows, s);
    return true;
}

static bool run_tiles(pass *s) {
    rbe_job *job = s->job;
    const int64_t narrow = job->kernels->width, tokens = job->x->rows;
    s->width = tokens <= narrow ? narrow : 2 * narrow;
    const int64_t block = (rbe_min(TOKENS, tokens) + s->width - 1) / s->width * s->width;
    if (rbe_wants_split(job->kernels, chunk_columns(s), 32)) {
        const int64_t chunks = (job->w->groups + s->chunk - 1) / s->chunk;
        if (!(s->split = rbe_scratch_take(block / s->width * chunks * split_chunk_size(s), sizeof *s->split))) return false;
    } else if (!(s->x = rbe_scratch_take(block * job->w->cols, sizeof(float)))) {
        return false;
    }
    for (s->t0 = 0; s->t0 < tokens; s->t0 += block) {
        s->tokens = rbe_min(block, tokens - s->t0);
        rbe_run(job->threads, (s->tokens + s->width - 1) / s->width, 1, load_tiles, s);
        rbe_run(job->threads, job->w->rows, rbe_share(job->threads, job->w->rows, ROWS), multiply_rows, s);
    }
    return true;
}

rbe_status rbe_linear_decode(rbe_job *job, bool dot, rbe_error *err) {
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .chunk = rbe_min(job->w->groups, rbe_max(1, COLUMNS / job->w->layout.group))};
    if (!(dot ? run_dot(&s) : run_tiles(&s))) atomic_store(&job->failed, true);
    rbe_scratch_end(mark);
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
