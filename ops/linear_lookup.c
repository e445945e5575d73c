// y = x W^T for up to 16 tokens in float32, codes of one byte in groups of 8: each row of W is summed from the basis and multiplied on the way.
#include <string.h>

#include "product.h"

enum { VECTOR = 16 };

typedef struct pass {
    rbe_job *job;
    float *x;  // [ceil(n / 16)][width][16], zeros for tokens and columns that do not exist
    int64_t t0, tokens, width;
} pass;

// Tiles of 64 rows.
static void multiply_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t codes = rbe_codes_a_row(w);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    uint8_t *copy = w->interleaved ? NULL : rbe_scratch_take(codes, RBE_LANES);
    float *y = rbe_scratch_take(RBE_LANES * s->width, sizeof *y);
    const bool ready = y && (copy || w->interleaved);
    if (!ready) atomic_store(&s->job->failed, true);
    for (int64_t i = begin; ready && i < end; ++i) {
        const int64_t first = i * RBE_LANES, rows = rbe_min(RBE_LANES, w->rows - first);
        if (copy) rbe_interleave_tile(kernels, w->packed + first * w->packed_stride, w->packed_stride, rows, codes, copy);
        kernels->lookup_rows(w->layout.stages, w->cols, copy ? copy : w->interleaved + first * codes, w->basis, s->x, s->width, y);
        rbe_finish_tile(s->job, s->t0, s->tokens, first, rows, y, s->width);
    }
    rbe_scratch_end(mark);
}

static bool load_tokens(pass *s) {
    const int64_t n = s->job->w->cols;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *rows = rbe_scratch_take(s->tokens * n, sizeof *rows);
    if (rows) rbe_load_rows(s->job->kernels, s->job->x, s->t0, s->tokens, 0, n, rows, n);
    for (int64_t t = 0; rows && t < s->width; ++t) {
        for (int64_t j = 0; j < n; j += VECTOR) {
            float *to = s->x + (j / VECTOR * s->width + t) * VECTOR;
            const int64_t some = t < s->tokens ? rbe_min(VECTOR, n - j) : 0;
            if (some < VECTOR) memset(to, 0, VECTOR * sizeof *to);
            if (some) memcpy(to, rows + t * n + j, (size_t)some * sizeof *to);
        }
    }
    rbe_scratch_end(mark);
    return rows;
}

rbe_status rbe_linear_lookup(rbe_job *job, rbe_error *err) {
    const int64_t tiles = (job->w->rows + RBE_LANES - 1) / RBE_LANES, vectors = (job->w->cols + VECTOR - 1) / VECTOR;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .x = rbe_scratch_take(vectors * VECTOR * 16, sizeof(float))};
    if (!s.x) atomic_store(&job->failed, true);
    for (s.t0 = 0; s.x && s.t0 < job->x->rows; s.t0 += s.tokens) {
        s.tokens = rbe_min(16, job->x->rows - s.t0);
        s.width = s.tokens == 1 ? 1 : s.tokens <= 4 ? 4 : s.tokens <= 8 ? 8 : 16;
        if (!load_tokens(&s)) atomic_store(&job->failed, true);
        else rbe_run(job->threads, tiles, rbe_share(job->threads, tiles, 1), multiply_rows, &s);
    }
    rbe_scratch_end(mark);
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
