// The backward through tables, a tile of 4 vectors of tokens at a time, or of 2 where dy would not fit L2. With u[p] = gain * scale of the place p of a code in the sorted list:
//
//     P[j]   = x basis[s, j]          D[p]      += dot(dy[row[p]], P[j])         dP[j] = sum over the places p of code j of u[p] dy[row[p]]
//     dx     = sum over j of dP[j] basis[s, j]                                   dbasis[s, j] += sum over t of dP[j, t] x[t]
//
// With a matrix unit dx is made as its transpose, basis[s]^T dP, so that one split of dP by columns and one by rows serve both products.
//
// Rows are sorted by code once a call, so P[j] and dP[j] stay in registers while the rows of a code pass. Groups are dealt to a fixed number of
// parts, each with its own dbasis, added up in order at the end: the result does not depend on the threads.
#include <string.h>

#include "product.h"

enum {
    PARTS = 16,
    STRIP = 32,   // codes of dP that are split together
    DY_BYTES = 1280 << 10  // of a tile of dy, read at random: what L2 holds beside the rest
};

typedef struct pass {
    rbe_backward_job *backward;
    rbe_sorted sorted;
    float *dbasis;  // [parts][M][256][g]
    int64_t parts;
    const uint16_t *basis, *turned;  // the basis split for P and for dx, or NULL
    // of the tile at hand
    int64_t t0, tokens, width;
    float *x, *dy;                // [n][width], [m][width]
    const float *rows;            // x as rows
    float *dx;                    // as rows, or [n][width] with a matrix unit
    int64_t rows_stride, dx_stride;
} pass;

// Buffers of a thread for one group.
typedef struct buffers {
    float *p;                              // [256][width]: P, then dP in its place
    uint16_t *x, *rows, *dp_rows, *dp_cols;  // split; of the rows of dP a strip at a time
} buffers;

// Both tiles, cut into the same number of stretches.
static void load_tiles(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_job *job = &s->backward->job;
    const int64_t n = job->w->cols, m = job->w->rows;
    const int64_t x0 = n * begin / PARTS, x1 = n * end / PARTS, y0 = m * begin / PARTS, y1 = m * end / PARTS;
    rbe_load_tile(job->kernels, job->x, s->t0, s->tokens, x0, x1 - x0, s->x + x0 * s->width, s->width);
    rbe_load_tile(job->kernels, job->y, s->t0, s->tokens, y0, y1 - y0, s->dy + y0 * s->width, s->width);
    if (!rbe_is_rows(job->x)) rbe_load_rows(job->kernels, job->x, s->t0, s->tokens, x0, x1 - x0, (float *)s->rows + x0, n);
}

static void fill_table(const pass *s, const buffers *b, int64_t stage, int64_t column, int64_t depth) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group;
    const bool fast = s->backward->job.fast;
    const int x = rbe_pieces(s->backward->job.x->dtype, fast), whole = rbe_float_pieces(fast);
    if (s->basis && depth == g) {  // a last group that n cuts short must not meet what pads the basis
        if (stage == 0) kernels->split_cols(g, s->width, s->x + column * s->width, s->width, x, b->x);
        kernels->gemm_split(RBE_BASIS_VECTORS, g, s->width, s->basis + stage * rbe_split_size(RBE_BASIS_VECTORS, g), whole, b->x,
                            x, b->p, s->width, false);
    } else {
        kernels->gemm(RBE_BASIS_VECTORS, depth, s->width, (const float *)w->basis + stage * RBE_BASIS_VECTORS * g, g, 1, s->x + column * s->width,
                      s->width, b->p, s->width, false);
    }
}

// dP -> dx and dbasis of the group
static void spread(const pass *s, const buffers *b, int64_t stage, int64_t column, int64_t depth, float *dbasis) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group;
    if (s->dx)
        kernels->gemm(s->tokens, RBE_BASIS_VECTORS, depth, b->p, 1, s->width, (const float *)w->basis + stage * RBE_BASIS_VECTORS * g, g,
                      s->dx + column, s->dx_stride, stage > 0);
    if (dbasis)
        kernels->gemm(RBE_BASIS_VECTORS, s->tokens, depth, b->p, s->width, 1, s->rows + column, s->rows_stride, dbasis, g, true);
}

// A strip of dP at a time is split, for dx and for dbasis at once, which uses it while it is in L1.
static void spread_split(const pass *s, const buffers *b, int64_t stage, int64_t column, int64_t depth, float *dbasis) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    const int64_t g = s->backward->job.w->layout.group;
    const uint16_t *turned = s->turned + stage * rbe_split_size(g, RBE_BASIS_VECTORS);
    const bool fast = s->backward->job.fast;
    const int x = rbe_pieces(s->backward->job.x->dtype, fast), whole = rbe_float_pieces(fast);
    if (dbasis && stage == 0) kernels->split_cols(s->tokens, depth, s->rows + column, s->rows_stride, x, b->rows);
    for (int64_t j = 0; j < RBE_BASIS_VECTORS; j += STRIP) {
        kernels->split_both(s->tokens, b->p + j * s->width, s->width, whole, b->dp_rows, b->dp_cols + j / STRIP * rbe_split_size(1, STRIP),
                            rbe_split_size(1, RBE_BASIS_VECTORS));
        if (dbasis) kernels->gemm_split(STRIP, s->tokens, depth, b->dp_rows, whole, b->rows, x, dbasis + j * g, g, true);
    }
    if (s->dx)
        kernels->gemm_split(depth, RBE_BASIS_VECTORS, s->tokens, turned, whole, b->dp_cols, whole, s->dx + column * s->width, s->width, stage > 0);
}

static void backward_group(const pass *s, int64_t k, const buffers *b, float *dbasis) {
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group, column = k * g, depth = rbe_min(g, w->cols - column), m = w->rows;
    for (int64_t stage = 0; stage < w->layout.stages; ++stage) {
        const int64_t q = k * w->layout.stages + stage;
        if (s->backward->d) fill_table(s, b, stage, column, depth);
        s->backward->job.kernels->table_backward(s->sorted.start + q * (RBE_BASIS_VECTORS + 1), s->sorted.row + q * m, s->sorted.factor + q * m, s->dy,
                                                 b->p, s->width, s->sorted.d + q * m, b->p);
        (s->turned ? spread_split : spread)(s, b, stage, column, depth, dbasis ? dbasis + stage * RBE_BASIS_VECTORS * g : NULL);
    }
}

static bool take_buffers(const pass *s, buffers *b) {
    const int64_t size = RBE_BASIS_VECTORS * s->width, g = s->backward->job.w->layout.group;
    *b = (buffers){.p = rbe_scratch_take(size, sizeof(float))};
    if (!b->p) return false;
    memset(b->p, 0, (size_t)size * sizeof(float));  // stays in use as P, for sums nobody reads, where D is not wanted
    if (!s->turned) return true;
    b->x = rbe_scratch_take(rbe_split_size(s->width, g), sizeof(uint16_t));
    b->rows = rbe_scratch_take(rbe_split_size(g, s->width), sizeof(uint16_t));
    b->dp_rows = rbe_scratch_take(rbe_split_size(STRIP, s->width), sizeof(uint16_t));
    b->dp_cols = rbe_scratch_take(rbe_split_size(s->width, RBE_BASIS_VECTORS), sizeof(uint16_t));
    return b->x && b->rows && b->dp_rows && b->dp_cols;
}

static void backward_parts(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const int64_t basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    buffers b;
    if (!take_buffers(s, &b)) {
        atomic_store(&s->backward->job.failed, true);
        rbe_scratch_end(mark);
        return;
    }
    if (s->turned) s->backward->job.kernels->split_begin();
    for (int64_t part = begin; part < end; ++part)
        for (int64_t k = w->groups * part / s->parts; k < w->groups * (part + 1) / s->parts; ++k)
            backward_group(s, k, &b, s->dbasis ? s->dbasis + part * basis : NULL);
    if (s->turned) s->backward->job.kernels->split_end();
    rbe_scratch_end(mark);
}

static void store_dx(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const int64_t n = s->backward->job.w->cols, x0 = n * begin / PARTS, x1 = n * end / PARTS;
    if (s->turned) {
        rbe_store_tile(s->backward->job.kernels, s->backward->dx, s->t0, s->tokens, x0, x1 - x0, s->dx + x0 * s->width, s->width);
        return;
    }
    rbe_store_rows(s->backward->job.kernels, s->backward->dx, s->t0, s->tokens, x0, x1 - x0, s->dx + x0, n);
}

static void run_tiles(pass *s, float *rows, float *dx) {
    const rbe_job *job = &s->backward->job;
    const rbe_matrix *out = s->backward->dx, *x = job->x;
    for (s->t0 = 0; s->t0 < x->rows && !atomic_load(&job->failed); s->t0 += s->width) {
        s->tokens = rbe_min(s->width, x->rows - s->t0);
        s->rows = rows ? rows : (const float *)x->data + s->t0 * x->row_stride;
        s->rows_stride = rows ? x->cols : x->row_stride;
        if (out) {
            s->dx = dx ? dx : (float *)out->data + s->t0 * out->row_stride;
            s->dx_stride = dx ? out->cols : out->row_stride;
        }
        rbe_run(job->threads, PARTS, 1, load_tiles, s);
        rbe_run(job->threads, s->parts, 1, backward_parts, s);
        if (dx) rbe_run(job->threads, PARTS, 1, store_dx, s);
    }
}

rbe_status rbe_backward_table(rbe_backward_job *backward, rbe_error *err) {
    rbe_job *job = &backward->job;
    const rbe_weight *w = job->w;
    const int64_t basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.backward = backward, .parts = rbe_min(PARTS, w->groups), .width = 4 * job->kernels->width};
    if (w->rows > DY_BYTES / 4 / s.width) s.width /= 2;
    const rbe_status status = rbe_sort_codes(job->kernels, w, false, job->threads, &s.sorted, err);
    s.x = rbe_scratch_take(w->cols * s.width, sizeof *s.x);
    s.dy = rbe_scratch_take(w->rows * s.width, sizeof *s.dy);
    if (backward->dbasis) s.dbasis = rbe_scratch_take(s.parts * basis, sizeof *s.dbasis);
    float *rows = rbe_is_rows(job->x) ? NULL : rbe_scratch_take(s.width * w->cols, sizeof *rows);
    const bool split = rbe_wants_split(job->kernels, w->layout.group, 16), copied = backward->dx && (split || !rbe_is_rows(backward->dx));
    float *dx = copied ? rbe_scratch_take(s.width * w->cols, sizeof *dx) : NULL;
    if (split) s.turned = rbe_split_basis_turned(job->kernels, w);
    const bool tables = rbe_wants_split(job->kernels, w->layout.group, 32);
    if (tables) s.basis = rbe_split_basis(job->kernels, w);
    const bool room = s.x && s.dy && (s.dbasis || !backward->dbasis) && (rows || rbe_is_rows(job->x)) &&
                      (dx || !copied) && (s.turned || !split) && (s.basis || !tables);
    if (status == RBE_OK && room) {
        if (s.dbasis) memset(s.dbasis, 0, (size_t)(s.parts * basis) * sizeof *s.dbasis);
        run_tiles(&s, rows, dx);
        if (backward->d) rbe_unsort(backward, &s.sorted);
        for (int64_t part = 0; s.dbasis && part < s.parts; ++part) job->kernels->add_scaled(basis, 1.0f, s.dbasis + part * basis, backward->dbasis);
    }
    rbe_scratch_end(mark);
    if (status != RBE_OK) return status;
    return room && !atomic_load(&job->failed) ? RBE_OK : rbe_out_of_memory(err);
}
