// y = x W^T for more tokens on the matrix unit, codes of one byte in groups of 8: 64 rows of W at a time are summed from the basis straight into what the
// unit multiplies, exactly in three bfloat16 pieces, or one in the fast class.
#include "product.h"

enum {
    COLUMNS = 512,  // of W at a time: 64 rows of three pieces take 196 kB of L2, the tokens' beside them twice that
    TOKENS = 128,   // for which W is made once
    WIDTH = 32,     // tokens that are split together
};

typedef struct pass {
    rbe_job *job;
    int w_pieces, x_pieces;
    int64_t t0, tokens, width;  // width: in whole vectors of 16
    uint16_t *x;                // [ceil(n / COLUMNS)][rbe_split_size(width, COLUMNS)]
} pass;

static int64_t columns_of(const pass *s, int64_t chunk) { return rbe_min(COLUMNS, s->job->w->cols - chunk * COLUMNS); }

// A chunk of columns of all tokens at hand.
static void split_tokens(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_kernels *kernels = s->job->kernels;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *copy = rbe_scratch_take(COLUMNS * WIDTH, sizeof *copy);
    if (!copy) atomic_store(&s->job->failed, true);
    for (int64_t chunk = begin; copy && chunk < end; ++chunk) {
        const int64_t cols = columns_of(s, chunk);
        uint16_t *out = s->x + chunk * rbe_split_size(s->width, COLUMNS);
        for (int64_t t = 0; t < s->width; t += WIDTH) {
            const int64_t some = rbe_min(WIDTH, s->width - t);
            rbe_load_tile(kernels, s->job->x, s->t0 + t, rbe_max(0, rbe_min(some, s->tokens - t)), chunk * COLUMNS, cols, copy, some);
            kernels->split_cols(cols, some, copy, some, s->x_pieces, out + rbe_split_size(t, cols));
        }
    }
    rbe_scratch_end(mark);
}

// Tiles of 64 rows: all columns of a chunk after the other, so that its tokens stay in L2.
static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t stages = w->layout.stages, codes = rbe_codes_a_row(w), size = RBE_LANES * s->width;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    uint8_t *copy = w->interleaved ? NULL : rbe_scratch_take(COLUMNS / 8 * stages, RBE_LANES);
    uint16_t *rows = rbe_scratch_take(rbe_split_size(RBE_LANES, COLUMNS), sizeof *rows);
    float *y = rbe_scratch_take((end - begin) * size, sizeof *y);
    const bool ready = rows && y && (copy || w->interleaved);
    if (!ready) atomic_store(&s->job->failed, true);
    kernels->split_begin();
    for (int64_t chunk = 0; ready && chunk * COLUMNS < w->cols; ++chunk) {
        const int64_t cols = columns_of(s, chunk), q = chunk * COLUMNS / 8 * stages;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i * RBE_LANES;
            if (copy)
                rbe_interleave_tile(kernels, w->packed + first * w->packed_stride + q, w->packed_stride, rbe_min(RBE_LANES, w->rows - first),
                                    (cols + 7) / 8 * stages, copy);
            kernels->lookup_split(stages, cols, copy ? copy : w->interleaved + first * codes + q * RBE_LANES, w->basis, s->w_pieces, rows);
            kernels->gemm_split(RBE_LANES, cols, s->width, rows, s->w_pieces, s->x + chunk * rbe_split_size(s->width, COLUMNS), s->x_pieces,
                                y + (i - begin) * size, s->width, chunk > 0);
        }
    }
    kernels->split_end();
    for (int64_t i = begin; ready && i < end; ++i)
        rbe_finish_tile(s->job, s->t0, s->tokens, i * RBE_LANES, rbe_min(RBE_LANES, w->rows - i * RBE_LANES), y + (i - begin) * size, s->width);
    rbe_scratch_end(mark);
}

rbe_status rbe_linear_lookup_split(rbe_job *job, rbe_error *err) {
    const int64_t tiles = (job->w->rows + RBE_LANES - 1) / RBE_LANES, chunks = (job->w->cols + COLUMNS - 1) / COLUMNS;
    const int64_t most = (rbe_min(TOKENS, job->x->rows) + 15) / 16 * 16;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .w_pieces = rbe_weight_pieces(job), .x_pieces = rbe_activation_pieces(job),
              .x = rbe_scratch_take(chunks * rbe_split_size(most, COLUMNS), sizeof(uint16_t))};
    if (!s.x) atomic_store(&job->failed, true);
    for (; s.x && s.t0 < job->x->rows; s.t0 += s.tokens) {
        s.tokens = rbe_min(TOKENS, job->x->rows - s.t0);
        s.width = (s.tokens + 15) / 16 * 16;
        rbe_run(job->threads, chunks, 1, split_tokens, &s);
        rbe_run(job->threads, tiles, rbe_share(job->threads, tiles, 1), multiply_rows, &s);
    }
    rbe_scratch_end(mark);
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
