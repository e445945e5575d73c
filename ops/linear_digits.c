// y = x W^T on the matrix unit's bytes, for codes of one byte with and without signs: a tile of 64 rows is looked up once for a block of tokens.
//
// Fast class: x has two digits, an error of 2^-15 of the token's largest entry. W has one digit for few tokens, where making it dominates (an error
// of 1.5 % of the root mean square of W at two stages), else two (2e-4). Exact class: three digits of both, 24 bits of the largest entry, added with
// carry where there are stages. A token that is not finite has no digits: the other paths take over.
#include "product.h"

enum {
    TOKENS = 256,   // a block of tokens shares the decoded rows
    COLUMNS = 512,  // that pass over some rows before the next ones: a part of W's digits in L1, x's in L2
    COLUMNS_FEW = 2048,       // of one tile of tokens
    COLUMNS_STREAM = 32768,   // at most, in one go: three products of bytes a column still fit an int32
    SUMS = 8 * TOKENS,   // tokens x tiles of rows that pass together: 512 kB
    AHEAD = 48,          // lines of interleaved codes that are asked for before they are read
    TOKEN_TILE = 16,
    STEP_BYTES = 1024,
};

typedef struct pass {
    rbe_job *job;
    rbe_digits digits;
    int8_t *table;         // [w digits][M][g][256]
    int64_t t0, tokens;    // of the block
    int64_t steps, chunk;  // of x in all; groups that pass over the rows together, whole steps
    int8_t *x;             // [token tiles][steps][tiles of a step][1024]
    float *unit;           // [tokens rounded up to 16]
    atomic_bool infinite;
} pass;

static int64_t token_tiles(const pass *s) { return (s->tokens + TOKEN_TILE - 1) / TOKEN_TILE; }
static int64_t step_tiles(const pass *s) { return s->digits.packed ? 1 : s->digits.x; }
static int64_t group_bytes(const pass *s) { return s->digits.stages * (s->digits.flipped ? 2 : 1); }

static rbe_digits digits_of(const rbe_job *job) {
    const rbe_layout *l = &job->w->layout;
    rbe_digits d = {.stages = l->stages, .group = l->group, .flipped = l->field == RBE_FIELD_RBE16S};
    d.w = job->fast ? rbe_weight_digits(l, job->x->rows) : 3;
    d.x = job->fast ? 2 : 3;
    d.carry = !job->fast && l->stages > 1;
    // digits of the stages add up to 127 at most, high ones and low ones
    d.base = d.carry ? 256.0f : 2.0f * (float)(127 / l->stages);
    if (job->x->rows <= TOKEN_TILE / d.x) d.packed = TOKEN_TILE / d.x;
    return d;
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
        int8_t *out = s->x + i * s->steps * step_tiles(s) * STEP_BYTES;
        if (!s->job->kernels->digits_of_tokens(&s->digits, tokens, w->cols, x, w->cols, s->unit + t, out))
            atomic_store(&s->infinite, true);
    }
    rbe_scratch_end(mark);
}

// Interleaved codes of a chunk of groups and a tile of 64 rows, laid out in `copy` where the weight has packed ones.
static const uint8_t *codes_of(const pass *s, int64_t tile, int64_t k0, int64_t groups, uint8_t *copy) {
    const rbe_weight *w = s->job->w;
    const int64_t first = k0 * group_bytes(s), i0 = tile * RBE_LANES;
    if (w->interleaved) return w->interleaved + (tile * w->groups * group_bytes(s) + first) * RBE_LANES;
    rbe_interleave_tile(s->job->kernels, w->packed + i0 * w->packed_stride + first, w->packed_stride, rbe_min(RBE_LANES, w->rows - i0),
                        groups * group_bytes(s), copy);
    return copy;
}

// What to ask for meanwhile: the lines that follow, or of packed rows those of the next tile.
static rbe_ahead ahead_of(const pass *s, int64_t tile, int64_t k0, const uint8_t *codes) {
    const rbe_weight *w = s->job->w;
    if (w->interleaved) return (rbe_ahead){(uintptr_t)codes + AHEAD * RBE_LANES, RBE_LANES, RBE_LANES * RBE_LANES};
    const int64_t at = (tile + 1) * RBE_LANES * w->packed_stride + k0 * group_bytes(s);
    return (rbe_ahead){(uintptr_t)w->packed + (uintptr_t)at, w->packed_stride, RBE_LANES};
}

// y of 64 rows [tokens][64], in the order of the tiles.
static void store_tile(const pass *s, int64_t tile, const float *y, float *out) {
    const rbe_weight *w = s->job->w;
    const int64_t i0 = tile * RBE_LANES, rows = rbe_min(RBE_LANES, w->rows - i0);
    float gain[RBE_LANES], bias[RBE_LANES];
    for (int64_t i = 0; i < RBE_LANES; ++i) {
        gain[i] = i < rows ? ((const float *)w->gain)[i0 + i] : 0.0f;
        bias[i] = i < rows && s->job->bias ? s->job->bias[i0 + i] : 0.0f;
    }
    for (int64_t t = 0; t < s->tokens; t += TOKEN_TILE) {
        const int64_t tokens = rbe_min(TOKEN_TILE, s->tokens - t);
        s->job->kernels->digits_order(tokens, y + t * RBE_LANES, gain, bias, out);
        rbe_store_rows(s->job->kernels, s->job->y, s->t0 + t, tokens, i0, rows, out, RBE_LANES);
    }
}

typedef struct buffers {
    int8_t *digits;  // of a chunk of W
    uint8_t *codes;
    float *y, *out;  // [tiles together][tokens rounded up][64], [16][64]
} buffers;

static bool take_tile_buffers(const pass *s, int64_t together, bool stream, buffers *b) {
    const rbe_weight *w = s->job->w;
    const int64_t groups = rbe_min(s->chunk, w->groups), steps = rbe_digit_steps(s->digits.group, groups * s->digits.group);
    b->digits = rbe_scratch_take(steps * s->digits.w * 4, STEP_BYTES);
    b->codes = w->interleaved ? NULL : rbe_scratch_take((stream ? w->groups : groups) * group_bytes(s), RBE_LANES);
    b->y = rbe_scratch_take(together * token_tiles(s) * TOKEN_TILE * RBE_LANES, sizeof *b->y);
    b->out = rbe_scratch_take(TOKEN_TILE * RBE_LANES, sizeof *b->out);
    return b->digits && (b->codes || w->interleaved) && b->y && b->out;
}

// Tiles of 64 rows.
static void multiply_rows(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t tiles = token_tiles(s), room = tiles * TOKEN_TILE * RBE_LANES, x_step = step_tiles(s) * STEP_BYTES, g = s->digits.group;
    const bool stream = tiles == 1 && (s->digits.packed || s->digits.x == 2) && w->cols <= COLUMNS_STREAM;
    const int64_t together = tiles == 1 ? 1 : rbe_max(1, SUMS / (tiles * TOKEN_TILE));
    const rbe_scratch_mark mark = rbe_scratch_begin();
    buffers b;
    const bool ready = take_tile_buffers(s, together, stream, &b);
    if (!ready) atomic_store(&s->job->failed, true);
    kernels->split_begin();
    for (int64_t r0 = begin; ready && r0 < end; r0 += together) {
        const int64_t rows = rbe_min(together, end - r0);
        if (stream) {
            const uint8_t *codes = codes_of(s, r0, 0, w->groups, b.codes);
            const rbe_ahead ahead = ahead_of(s, r0, 0, codes);
            if (kernels->digits_stream(&s->digits, w->groups, codes, &ahead, s->table, s->x, s->unit, b.y)) {
                store_tile(s, r0, b.y, b.out);
                continue;
            }
        }
        for (int64_t k0 = 0; k0 < w->groups; k0 += s->chunk) {
            const int64_t groups = rbe_min(s->chunk, w->groups - k0);
            const int8_t *x = s->x + k0 / 4 * g / TOKEN_TILE * x_step;
            for (int64_t r = 0; r < rows; ++r) {
                const uint8_t *codes = codes_of(s, r0 + r, k0, groups, b.codes);
                const rbe_ahead ahead = ahead_of(s, r0 + r, k0, codes);
                kernels->digits_of_codes(&s->digits, 0, 4, groups, codes, &ahead, 0, s->table, b.digits);
                kernels->digits_multiply(&s->digits, rbe_digit_steps(g, groups * g), tiles, x, s->steps * x_step, b.digits, s->unit,
                                         b.y + r * room, k0 == 0);
            }
        }
        for (int64_t r = 0; r < rows; ++r) store_tile(s, r0 + r, b.y + r * room, b.out);
    }
    kernels->split_end();
    rbe_scratch_end(mark);
}

static bool take_buffers(pass *s) {
    const rbe_weight *w = s->job->w;
    const int64_t tokens = (rbe_min(TOKENS, s->job->x->rows) + TOKEN_TILE - 1) / TOKEN_TILE * TOKEN_TILE;
    const int64_t g = w->layout.group, whole = rbe_digit_whole(g), columns = tokens > TOKEN_TILE ? COLUMNS : COLUMNS_FEW;  // groups of whole steps
    s->chunk = rbe_max(1, columns / (whole * g)) * whole;
    s->steps = rbe_digit_steps(g, w->cols);
    s->table = rbe_scratch_take(s->digits.w * s->digits.stages * g, RBE_BASIS_VECTORS);
    s->x = rbe_scratch_take(tokens / TOKEN_TILE * s->steps * step_tiles(s), STEP_BYTES);
    s->unit = rbe_scratch_take(tokens, sizeof *s->unit);
    return s->table && s->x && s->unit;
}

rbe_status rbe_linear_digits(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const int64_t tiles = rbe_interleaved_tiles(w->rows), share = rbe_share(job->threads, tiles, 1);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .digits = digits_of(job)};
    if (!take_buffers(&s)) atomic_store(&job->failed, true);
    bool possible = !atomic_load(&job->failed) && job->kernels->digits_of_basis(&s.digits, w->basis, s.table);
    for (; possible && s.t0 < job->x->rows; s.t0 += TOKENS) {
        s.tokens = rbe_min(TOKENS, job->x->rows - s.t0);
        rbe_run(job->threads, token_tiles(&s), 1, load_tokens, &s);
        if (!(possible = !atomic_load(&s.infinite))) break;
        rbe_run(job->threads, tiles, share, multiply_rows, &s);
    }
    rbe_scratch_end(mark);
    if (atomic_load(&job->failed)) return rbe_out_of_memory(err);
    return possible ? RBE_OK : rbe_linear_floats(job, err);
}
