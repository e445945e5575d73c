// y = x W^T with W decoded to float32 a piece at a time: signs and residuals, small groups, and additive layouts at many tokens.
//
// Many tokens: a tile of rows x columns is decoded once for a block of tokens and multiplied by the dense micro-kernel.
// Few tokens: a stretch of a row is decoded and dotted with each token's.
#include "product.h"

enum {
    TOKENS = 256,   // a block of tokens, laid out once, shares each decoded tile
    ROWS = 48,      // of a tile: 192 kB at COLUMNS, beside 1 MB of x in L2
    COLUMNS = 1024  // of a tile, in whole groups
};

typedef struct pass {
    rbe_job *job;
    int64_t chunk;  // groups a tile
    int64_t t0, tokens, width;
    const float *x;  // dot: rows of tokens, x_row apart; else tiles [TOKENS / width][n][width]
    int64_t x_row;
} pass;

static void load_tiles(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i * s->width;
        rbe_load_tile(s->job->kernels, s->job->x, s->t0 + t, rbe_min(s->width, s->tokens - t), 0, s->job->w->cols,
                      (float *)s->x + t * s->job->w->cols, s->width);
    }
}

static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t width = s->width, tiles = (s->tokens + width - 1) / width, rows = end - begin, reach = rbe_min(s->chunk * w->layout.group, w->cols);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    float *tile = rbe_scratch_take(ROWS * reach, sizeof *tile), *y = rbe_scratch_take(tiles * rows * width, sizeof *y);
    if (!rbe_take_row_buffers(w, s->chunk, &b) || !tile || !y) {
        atomic_store(&s->job->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = 0; i < tiles * rows; ++i)
        for (int64_t t = 0; t < width; ++t) y[i * width + t] = s->job->bias ? s->job->bias[begin + i % rows] : 0.0f;
    for (int64_t k0 = 0; k0 < w->groups; k0 += s->chunk) {
        const int64_t groups = rbe_min(s->chunk, w->groups - k0), j0 = k0 * w->layout.group;
        const int64_t cols = rbe_min(groups * w->layout.group, w->cols - j0);
        for (int64_t i0 = 0; i0 < rows; i0 += ROWS) {
            const int64_t some = rbe_min(ROWS, rows - i0);
            for (int64_t i = 0; i < some; ++i) rbe_decode_row(kernels, w, begin + i0 + i, k0, groups, b, tile + i * reach);
            for (int64_t n = 0; n < tiles; ++n)
                kernels->gemm(some, cols, width, tile, reach, 1, s->x + (n * w->cols + j0) * width, width, y + (n * rows + i0) * width, width,
                              true);
        }
    }
    for (int64_t n = 0; n < tiles; ++n)
        rbe_store_tile(kernels, s->job->y, s->t0 + n * width, rbe_min(width, s->tokens - n * width), begin, rows, y + n * rows * width, width);
    rbe_scratch_end(mark);
}

static void dot_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t tokens = s->job->x->rows, rows = end - begin, reach = rbe_min(s->chunk * w->layout.group, w->cols);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_row_buffers b;
    float *piece = rbe_scratch_take(reach, sizeof *piece), *y = rbe_scratch_take(tokens * rows, sizeof *y),
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
    if (!(s->x = rbe_scratch_take(block * job->w->cols, sizeof(float)))) return false;
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
