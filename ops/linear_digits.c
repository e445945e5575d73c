// y = x W^T on the matrix unit's bytes, additive codes of 8 bits in the fast class: a tile of 64 rows is looked up once for a block of tokens.
//
// x has two digits, an error of 2^-15 of the token's largest entry. W has one digit for few tokens, where making it dominates (an error of 1.5 % of
// the root mean square of W at two stages), else two (2e-4). A token that is not finite has no digits: the other paths take over.
#include <math.h>

#include "product.h"

enum {
    TOKENS = 256,     // a block of tokens shares the decoded rows
    COLUMNS = 2048,   // of x that pass over all rows before the next ones: with TOKENS, 1 MB of digits in L2
    TOKEN_TILE = 16,
    STEP = 64,
    STEP_BYTES = 1024,
};

typedef struct pass {
    rbe_job *job;
    int digits;
    float step, base;
    int8_t *table;         // [digits][M][g][256]
    const uint8_t *idx;    // interleaved
    int64_t t0, tokens, steps;  // of the block; of x in all
    int8_t *x;             // [tokens / 16][steps][2][1024]
    float *unit;           // [tokens rounded up to 16]
    float *y;              // [rows / 64][tokens rounded up][64], in the order of the tiles
    int64_t step0, here;   // the chunk of columns
    atomic_bool infinite;
} pass;

static int64_t token_tiles(const pass *s) { return (s->tokens + TOKEN_TILE - 1) / TOKEN_TILE; }

// Digits of the basis: the sum over stages of the high ones stays within 127, and so does that of the low ones.
static bool make_table(pass *s) {
    const rbe_layout *l = &s->job->w->layout;
    const float *basis = s->job->w->basis;
    const int64_t size = RBE_BASIS_VECTORS * (int64_t)l->group;
    float top = 0.0f;
    for (int64_t stage = 0; stage < l->stages; ++stage) {
        float largest = 0.0f;
        for (int64_t i = 0; i < size; ++i) {
            const float entry = fabsf(basis[stage * size + i]);
            if (!(entry <= 3.4e38f)) return false;
            if (entry > largest) largest = entry;
        }
        top += largest;
    }
    s->step = top / (127.0f - 0.5f * (float)l->stages);
    s->base = 2.0f * (float)(127 / l->stages);
    if (!(s->step < 1e37f)) return false;
    const float scale = s->step > 1e-37f ? 1.0f / s->step : 0.0f;
    for (int64_t stage = 0; stage < l->stages; ++stage) {
        for (int64_t e = 0; e < l->group; ++e) {
            int8_t *high = s->table + (stage * l->group + e) * RBE_BASIS_VECTORS, *low = high + l->stages * size;
            for (int64_t j = 0; j < RBE_BASIS_VECTORS; ++j) {
                const float value = basis[stage * size + j * l->group + e] * scale, whole = rintf(value);
                high[j] = (int8_t)whole;
                if (s->digits == 2) low[j] = (int8_t)rintf((value - whole) * s->base);
            }
        }
    }
    return true;
}

static void load_tokens(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *x = rbe_scratch_take(TOKEN_TILE * w->cols, sizeof *x);
    if (!x) atomic_store(&s->job->failed, true);
    for (int64_t i = begin; x && i < end; ++i) {
        const int64_t t = i * TOKEN_TILE, tokens = rbe_min(TOKEN_TILE, s->tokens - t);
        rbe_load_rows(s->job->kernels, s->job->x, s->t0 + t, tokens, 0, w->cols, x, w->cols);
        if (!s->job->kernels->digits_of_tokens(tokens, w->cols, x, w->cols, s->base, s->unit + t, s->x + i * s->steps * 2 * STEP_BYTES))
            atomic_store(&s->infinite, true);
    }
    rbe_scratch_end(mark);
}

// Tiles of 64 rows.
static void multiply_rows(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t codes = rbe_codes_a_row(w), g = w->layout.group, tiles = token_tiles(s), room = tiles * TOKEN_TILE * RBE_LANES;
    const int64_t column = s->step0 * STEP, columns = rbe_min(s->here * STEP, w->groups * g - column);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    int8_t *digits = rbe_scratch_take(s->here * s->digits * 4, STEP_BYTES);
    if (!digits) atomic_store(&s->job->failed, true);
    kernels->split_begin();
    for (int64_t r = begin; digits && r < end; ++r) {
        const uint8_t *idx = s->idx + (r * codes + column / g * w->layout.stages) * RBE_LANES;
        kernels->digits_of_codes(columns, w->layout.stages, g, idx, s->table, s->digits, digits);
        for (int64_t i = 0; i < tiles; ++i)
            kernels->digits_multiply(s->here, s->x + (i * s->steps + s->step0) * 2 * STEP_BYTES, digits, s->digits, s->step, s->base,
                                     s->unit + i * TOKEN_TILE, s->y + r * room + i * TOKEN_TILE * RBE_LANES, s->step0 == 0);
    }
    kernels->split_end();
    rbe_scratch_end(mark);
}

static void store_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const int64_t room = token_tiles(s) * TOKEN_TILE * RBE_LANES;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *out = rbe_scratch_take(TOKEN_TILE * RBE_LANES, sizeof *out), gain[RBE_LANES], bias[RBE_LANES];
    if (!out) atomic_store(&s->job->failed, true);
    for (int64_t r = begin; out && r < end; ++r) {
        const int64_t i0 = r * RBE_LANES, rows = rbe_min(RBE_LANES, w->rows - i0);
        for (int64_t i = 0; i < RBE_LANES; ++i) {
            gain[i] = i < rows ? ((const float *)w->gain)[i0 + i] : 0.0f;
            bias[i] = i < rows && s->job->bias ? s->job->bias[i0 + i] : 0.0f;
        }
        for (int64_t t = 0; t < s->tokens; t += TOKEN_TILE) {
            const int64_t tokens = rbe_min(TOKEN_TILE, s->tokens - t);
            s->job->kernels->digits_order(tokens, s->y + r * room + t * RBE_LANES, gain, bias, out);
            rbe_store_rows(s->job->kernels, s->job->y, s->t0 + t, tokens, i0, rows, out, RBE_LANES);
        }
    }
    rbe_scratch_end(mark);
}

static bool take_buffers(pass *s) {
    const rbe_weight *w = s->job->w;
    const int64_t tokens = (rbe_min(TOKENS, s->job->x->rows) + TOKEN_TILE - 1) / TOKEN_TILE * TOKEN_TILE, tiles = rbe_interleaved_tiles(w->rows);
    s->steps = (w->cols + STEP - 1) / STEP;
    s->table = rbe_scratch_take((int64_t)s->digits * w->layout.stages * w->layout.group, RBE_BASIS_VECTORS);
    s->x = rbe_scratch_take(tokens / TOKEN_TILE * s->steps * 2, STEP_BYTES);
    s->unit = rbe_scratch_take(tokens, sizeof *s->unit);
    s->y = rbe_scratch_take(tiles * tokens * RBE_LANES, sizeof *s->y);
    s->idx = rbe_as_interleaved(s->job->kernels, w, s->job->threads);
    return s->table && s->x && s->unit && s->y && s->idx;
}

rbe_status rbe_linear_digits(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t tiles = rbe_interleaved_tiles(w->rows), share = rbe_share(job->threads, tiles, 1);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .digits = rbe_weight_digits(&w->layout, job->x->rows)};
    if (!take_buffers(&s)) atomic_store(&job->failed, true);
    bool possible = !atomic_load(&job->failed) && make_table(&s);
    for (; possible && s.t0 < job->x->rows; s.t0 += TOKENS) {
        s.tokens = rbe_min(TOKENS, job->x->rows - s.t0);
        rbe_run(job->threads, token_tiles(&s), 1, load_tokens, &s);
        if (!(possible = !atomic_load(&s.infinite))) break;
        for (s.step0 = 0; s.step0 < s.steps; s.step0 += s.here) {
            s.here = rbe_min(COLUMNS / STEP, s.steps - s.step0);
            rbe_run(job->threads, tiles, share, multiply_rows, &s);
        }
        rbe_run(job->threads, tiles, share, store_rows, &s);
    }
    rbe_scratch_end(mark);
    if (atomic_load(&job->failed)) return rbe_out_of_memory(err);
    return possible ? RBE_OK : rbe_linear_floats(job, err);
}
