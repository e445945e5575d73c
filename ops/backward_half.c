// The backward through tables in half precision (the fast class), a tile of some blocks of 128 tokens at a time: as many as have dy in L2. Blocks of 64 where
// not one of 128 fits, and for a last few tokens.
//
//     P[j]   = x basis[s, j]          D[p]      += dot(dy[row[p]], P[j])         dP[j] = sum over the places p of code j of u[p] dy[row[p]]
//     dx     = sum over j of dP[j] basis[s, j]                                   dbasis[s, j] += sum over t of dP[j, t] x[t]
//
// P, dy and u are float16, dP leaves as bfloat16. dy[t] is brought into range by a power of two of its token's own, dx[t] and the x[t] of dbasis undo
// it. D adds up tokens, so in its block all dy[t] P[t] need one power: P[t] is made smaller where |dy[t]| |x[t]| is below the largest of its block, by
// as much as it then counts less. Sorting, parts and threads are those of backward_table.c.
#include <math.h>
#include <string.h>

#include "product.h"

enum {
    PARTS = 16,
    WIDTH = RBE_HALF_WIDTH,
    TOKENS = 4 * WIDTH,  // of a tile
    SIDE = 32,           // tokens that are loaded together
    NARROW = RBE_TILE_MAX,  // tokens of a narrow block
    DY_BYTES = 1280 << 10,
    DY_BOUND = 7,  // |dy| <= 2^7 and |P| <= 2: sums of 32 places of |u| <= exp(2) = 7.4 and of 128 products stay below 65504
    P_BOUND = 1,
};

typedef struct pass {
    rbe_backward_job *backward;
    rbe_sorted sorted;
    float *dbasis;                   // [parts][M][256][g]
    int64_t parts;
    const uint16_t *basis, *turned;  // for the matrix unit
    int pieces, largest;             // of an activation; 2^largest bounds the sum of |basis[s, j]|
    // of the tile at hand
    int64_t t0, tokens, width, blocks;
    uint16_t *x, *columns, *dy;                              // [blocks][K][rbe_half_size(width, g)], [steps][K][rbe_half_step(g)], [blocks][m][width]
    float x_scale[TOKENS], dy_scale[TOKENS], back[TOKENS];   // back: dP in its own unit
    float lanes[TOKENS], unscale[TOKENS / NARROW];           // of P, and of D
    int power[TOKENS];                                       // of dy P
    bool counts[TOKENS];                                     // neither x nor dy is zero
} pass;

// Buffers of a thread for one group.
typedef struct buffers {
    uint16_t *p, *dp_rows, *dp_cols;  // [256][width], [blocks][256 * width], [256 * width]
    float *dx, *x, *table;            // [blocks][g in whole 32][width]; for a group that n cuts short [g][64], [256][64]
} buffers;

// Not finite entries spoil what they must; the others of their token stay in range.
static float largest_finite(const rbe_kernels *kernels, int64_t count, const float *a) {
    float most = kernels->largest(count, a);
    if (isfinite(most)) return most;
    most = 0.0f;
    for (int64_t i = 0; i < count; ++i)
        if (isfinite(a[i]) && fabsf(a[i]) > most) most = fabsf(a[i]);
    return most;
}

static const float *rows_of(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t, int64_t some, float *copy, int64_t *row) {
    *row = rbe_is_rows(a) ? a->row_stride : a->cols;
    if (rbe_is_rows(a)) return (const float *)a->data + t * a->row_stride;
    rbe_load_rows(kernels, a, t, some, 0, a->cols, copy, a->cols);
    return copy;
}

static void load_dy(pass *s, int64_t t, int64_t some, float *copy) {
    const rbe_job *job = &s->backward->job;
    const int64_t m = job->w->rows;
    int64_t row;
    const float *rows = rows_of(job->kernels, job->y, s->t0 + t, some, copy, &row);
    for (int64_t i = 0; i < SIDE; ++i) {
        const float most = i < some ? largest_finite(job->kernels, m, rows + i * row) : 0.0f;
        const int power = rbe_half_power(most, 0, DY_BOUND);
        s->dy_scale[t + i] = ldexpf(1.0f, power);
        s->back[t + i] = ldexpf(1.0f, s->sorted.unit - power < 127 ? s->sorted.unit - power : 127);
        s->power[t + i] = power;
        s->counts[t + i] = most > 0.0f;
    }
    job->kernels->half_turn(some, m, rows, row, s->dy_scale + t, s->width, s->dy + t / s->width * m * s->width + t % s->width);
}

static void load_x(pass *s, int64_t t, int64_t some, float *copy) {
    const rbe_job *job = &s->backward->job;
    const rbe_kernels *kernels = job->kernels;
    const int64_t g = job->w->layout.group, n = job->w->cols, groups = job->w->groups;
    const int64_t size = rbe_half_size(s->width, g), part = rbe_half_size(SIDE, g), step = rbe_half_step(g);
    int64_t row;
    const float *rows = rows_of(kernels, job->x, s->t0 + t, some, copy, &row);
    for (int64_t i = 0; i < SIDE; ++i) {
        const float most = i < some ? largest_finite(kernels, n, rows + i * row) : 0.0f;
        const int power = rbe_half_power(most, s->largest, P_BOUND);
        s->x_scale[t + i] = ldexpf(1.0f, power);
        s->power[t + i] += power;
        s->counts[t + i] = s->counts[t + i] && most > 0.0f;
    }
    for (int64_t k = 0; k < groups; ++k) {
        const int64_t depth = rbe_min(g, n - k * g);
        if (s->backward->d && depth == g)
            kernels->half_tokens(some, g, SIDE, rows + k * g, row, s->x_scale + t, s->pieces,
                                 s->x + (t / s->width * groups + k) * size + t % s->width / SIDE * part);
        if (s->dbasis) kernels->half_columns(some, depth, rows + k * g, row, s->back + t, s->columns + (t / SIDE * groups + k) * step);
    }
}

// Some tokens of dy and x while they are in L2.
static void load_tokens(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *copy = rbe_scratch_take(SIDE * rbe_max(w->rows, w->cols), sizeof *copy);
    if (!copy) atomic_store(&s->backward->job.failed, true);
    for (int64_t t = begin * SIDE; copy && t < end * SIDE; t += SIDE) {
        const int64_t some = rbe_max(0, rbe_min(SIDE, s->tokens - t));
        load_dy(s, t, some, copy);
        load_x(s, t, some, copy);
    }
    rbe_scratch_end(mark);
}

static void choose_lanes(pass *s) {
    for (int64_t block = 0; block < s->blocks; ++block) {
        int least = 4 * RBE_HALF_RANGE;
        for (int64_t t = block * s->width; t < (block + 1) * s->width; ++t)
            if (s->counts[t] && s->power[t] < least) least = s->power[t];
        for (int64_t t = block * s->width; t < (block + 1) * s->width; ++t) s->lanes[t] = s->counts[t] ? ldexpf(1.0f, least - s->power[t]) : 1.0f;
        s->unscale[block] = least < 4 * RBE_HALF_RANGE ? ldexpf(1.0f, -least) : 1.0f;
    }
}

static void fill_table(const pass *s, const buffers *b, int64_t k, int64_t stage, int64_t block) {
    const rbe_job *job = &s->backward->job;
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, width = s->width, depth = rbe_min(g, w->cols - k * g), t0 = block * width;
    if (depth == g) {
        job->kernels->half_table(g, width, s->basis + stage * rbe_half_size(RBE_BASIS_VECTORS, g), s->x + (block * w->groups + k) * rbe_half_size(width, g),
                                 s->pieces, s->lanes + t0, b->p);
        return;
    }
    // a last group that n cuts short must not meet what pads the basis
    for (int64_t t = 0; t < width; t += NARROW) {
        const int64_t tokens = rbe_max(0, rbe_min(NARROW, s->tokens - t0 - t));
        rbe_load_tile(job->kernels, job->x, s->t0 + t0 + t, tokens, k * g, depth, b->x, NARROW);
        for (int64_t e = 0; e < depth; ++e)
            for (int64_t i = 0; i < tokens; ++i) b->x[e * NARROW + i] *= s->x_scale[t0 + t + i] * s->lanes[t0 + t + i];
        job->kernels->gemm(RBE_BASIS_VECTORS, depth, NARROW, (const float *)w->basis + stage * RBE_BASIS_VECTORS * g, g, 1, b->x, NARROW, b->table, NARROW,
                           false);
        for (int64_t j = 0; j < RBE_BASIS_VECTORS; ++j) job->kernels->f32_to_f16(b->table + j * NARROW, NARROW, b->p + j * width + t);
    }
}

static void store_dx(const pass *s, const buffers *b, int64_t k, int64_t size) {
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group, width = s->width, depth = rbe_min(g, w->cols - k * g);
    for (int64_t block = 0; block < s->blocks; ++block) {
        float *dx = b->dx + block * size;
        const float *back = s->back + block * width;
        for (int64_t e = 0; e < depth; ++e)
            for (int64_t t = 0; t < width; ++t) dx[e * width + t] *= back[t];
        for (int64_t t = 0; t < width && block * width + t < s->tokens; t += NARROW)
            rbe_store_tile(s->backward->job.kernels, s->backward->dx, s->t0 + block * width + t, rbe_min(NARROW, s->tokens - block * width - t), k * g,
                           depth, dx + t, width);
    }
}

static void backward_group(const pass *s, int64_t k, const buffers *b, float *dbasis) {
    const rbe_weight *w = s->backward->job.w;
    const rbe_kernels *kernels = s->backward->job.kernels;
    const int64_t g = w->layout.group, m = w->rows, width = s->width, whole = (g + 31) / 32 * 32, step = rbe_half_step(g);
    for (int64_t stage = 0; stage < w->layout.stages; ++stage) {
        const int64_t q = k * w->layout.stages + stage;
        for (int64_t block = 0; block < s->blocks; ++block) {
            if (s->backward->d) fill_table(s, b, k, stage, block);
            kernels->half_backward(s->sorted.start + q * (RBE_BASIS_VECTORS + 1), s->sorted.half + q * m, s->dy + block * m * width, b->p, width,
                                   s->unscale[block], s->sorted.d + q * m, s->t0 + block == 0, b->dp_rows + block * RBE_BASIS_VECTORS * width, b->dp_cols);
            if (s->turned)
                kernels->half_dx(g, width, s->turned + stage * rbe_half_size(whole, RBE_BASIS_VECTORS), b->dp_cols, b->dx + block * whole * width, stage == 0);
        }
        if (dbasis)
            kernels->half_dbasis(s->blocks * width / 32, rbe_min(g, w->cols - k * g), b->dp_rows, s->columns + k * step, w->groups * step,
                                 dbasis + stage * RBE_BASIS_VECTORS * g, g);
    }
    if (s->turned) store_dx(s, b, k, whole * width);
}

static void backward_parts(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group, basis = w->layout.stages * RBE_BASIS_VECTORS * g, table = RBE_BASIS_VECTORS * s->width;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    const buffers b = {rbe_scratch_take(table, sizeof(uint16_t)), rbe_scratch_take(s->blocks * table, sizeof(uint16_t)),
                       rbe_scratch_take(table, sizeof(uint16_t)), rbe_scratch_take(s->blocks * ((g + 31) / 32 * 32) * s->width, sizeof(float)),
                       rbe_scratch_take(g * NARROW, sizeof(float)), rbe_scratch_take(RBE_BASIS_VECTORS * NARROW, sizeof(float))};
    if (b.p && b.dp_rows && b.dp_cols && b.dx && b.x && b.table) {
        memset(b.p, 0, (size_t)table * sizeof *b.p);  // stays in use as P, for sums nobody reads, where D is not wanted
        s->backward->job.kernels->split_begin();
        for (int64_t part = begin; part < end; ++part)
            for (int64_t k = w->groups * part / s->parts; k < w->groups * (part + 1) / s->parts; ++k)
                backward_group(s, k, &b, s->dbasis ? s->dbasis + part * basis : NULL);
        s->backward->job.kernels->split_end();
    } else {
        atomic_store(&s->backward->job.failed, true);
    }
    rbe_scratch_end(mark);
}

// The tile that begins at t0, of at most `most` tokens: whole blocks, then what is left.
static void choose_tile(pass *s, int64_t most, int64_t width) {
    const int64_t left = s->backward->job.x->rows - s->t0;
    s->tokens = left < width ? left : rbe_min(most, left / width * width);
    s->width = s->tokens <= NARROW ? NARROW : width;
    s->blocks = (s->tokens + s->width - 1) / s->width;
}

rbe_status rbe_backward_half(rbe_backward_job *backward, rbe_error *err) {
    rbe_job *job = &backward->job;
    const rbe_weight *w = job->w;
    const int64_t g = w->layout.group, basis = w->layout.stages * RBE_BASIS_VECTORS * g, T = job->x->rows;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.backward = backward, .parts = rbe_min(PARTS, w->groups), .pieces = rbe_half_pieces(job->x->dtype), .largest = rbe_basis_exponent(w)};
    const int64_t fit = DY_BYTES / (w->rows * (int64_t)sizeof *s.dy), width = fit < WIDTH || T <= NARROW ? NARROW : WIDTH;
    const int64_t most = rbe_max(width, rbe_min(rbe_min(fit, TOKENS), T + width - 1) / width * width);
    rbe_status status = rbe_sort_codes(job->kernels, w, true, job->threads, &s.sorted, err);
    s.dy = rbe_scratch_take(most * w->rows, sizeof *s.dy);
    s.x = rbe_scratch_take(backward->d ? most / width * w->groups * rbe_half_size(width, g) : 0, sizeof *s.x);
    s.columns = rbe_scratch_take(backward->dbasis ? most / SIDE * w->groups * rbe_half_step(g) : 0, sizeof *s.columns);
    if (backward->dbasis) s.dbasis = rbe_scratch_take(s.parts * basis, sizeof *s.dbasis);
    if (backward->dx) s.turned = rbe_half_basis_turned(job->kernels, w);
    s.basis = rbe_half_basis(job->kernels, w);
    const bool room = s.dy && s.x && s.columns && (s.dbasis || !backward->dbasis) && (s.turned || !backward->dx) && s.basis;
    if (status == RBE_OK && !room) status = rbe_out_of_memory(err);
    if (status == RBE_OK && s.dbasis) memset(s.dbasis, 0, (size_t)(s.parts * basis) * sizeof *s.dbasis);
    if (status == RBE_OK && T == 0) memset(s.sorted.d, 0, (size_t)(rbe_codes_a_row(w) * w->rows) * sizeof *s.sorted.d);
    for (; status == RBE_OK && s.t0 < T && !atomic_load(&job->failed); s.t0 += s.tokens) {
        choose_tile(&s, most, width);
        rbe_run(job->threads, s.blocks * s.width / SIDE, 1, load_tokens, &s);
        choose_lanes(&s);
        rbe_run(job->threads, s.parts, 1, backward_parts, &s);
    }
    if (status == RBE_OK && backward->d) rbe_unsort(backward, &s.sorted);
    for (int64_t part = 0; status == RBE_OK && s.dbasis && part < s.parts; ++part)
        job->kernels->add_scaled(basis, 1.0f, s.dbasis + part * basis, backward->dbasis);
    rbe_scratch_end(mark);
    if (status != RBE_OK) return status;
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}
