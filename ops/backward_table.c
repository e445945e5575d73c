// The backward through tables, a tile of 4 vectors of tokens at a time. With u[p] = gain * scale of the place p of a code in the sorted list:
//
//     P[j]   = x basis[s, j]          D[p]      += dot(dy[row[p]], P[j])         dP[j] = sum over the places p of code j of u[p] dy[row[p]]
//     dx     = sum over j of dP[j] basis[s, j]                                   dbasis[s, j] += sum over t of dP[j, t] x[t]
//
// Rows are sorted by code once a call, so P[j] and dP[j] stay in registers while the rows of a code pass. Groups are dealt to a fixed number of
// parts, each with its own dbasis, added up in order at the end: the result does not depend on the threads.
#include <string.h>

#include "product.h"

enum { PARTS = 16, SORTED = 16 };  // SORTED: codes of a row sorted together, so that a line of unpacked codes is read once

typedef struct pass {
    rbe_backward_job *backward;
    rbe_codes codes;
    int32_t *start, *row;  // [K*M][257], [K*M][m]
    float *factor, *d;     // [K*M][m]: gain * scale and D of a place
    float *dbasis;         // [parts][M][256][g]
    int64_t parts;
    // of the tile at hand
    int64_t t0, tokens, width;
    float *x, *dy;                // [n][width], [m][width]
    const float *rows;            // x as rows
    float *dx;                    // as rows
    int64_t rows_stride, dx_stride;
} pass;

static void sort_codes(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const float *gain = w->gain;
    const int64_t m = w->rows, codes = rbe_codes_a_row(w);
    int32_t next[SORTED][RBE_BASIS_VECTORS];
    for (int64_t q0 = begin * SORTED; q0 < rbe_min(end * SORTED, codes); q0 += SORTED) {
        const int64_t some = rbe_min(SORTED, codes - q0), at = q0 / SORTED * s->codes.step, stride = s->codes.row;
        memset(next, 0, sizeof next);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t q = 0; q < some; ++q) ++next[q][s->codes.idx[at + i * stride + q]];
        for (int64_t q = 0; q < some; ++q) {
            int32_t *start = s->start + (q0 + q) * (RBE_BASIS_VECTORS + 1), sum = 0;
            for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
                start[j] = sum;
                sum += next[q][j];
                next[q][j] = start[j];
            }
            start[RBE_BASIS_VECTORS] = sum;
        }
        for (int64_t i = 0; i < m; ++i) {
            const uint8_t *idx = s->codes.idx + at + i * stride;
            const float *scale = s->codes.scale ? s->codes.scale + at + i * stride : NULL;
            for (int64_t q = 0; q < some; ++q) {
                const int64_t place = (q0 + q) * m + next[q][idx[q]]++;
                s->row[place] = (int32_t)i;
                s->factor[place] = scale ? gain[i] * scale[q] : gain[i];
            }
        }
    }
}

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

static void backward_group(const pass *s, int64_t k, float *p, float *dp, float *dbasis) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    const rbe_weight *w = s->backward->job.w;
    const int64_t g = w->layout.group, column = k * g, depth = rbe_min(g, w->cols - column), m = w->rows;
    for (int64_t stage = 0; stage < w->layout.stages; ++stage) {
        const int64_t q = k * w->layout.stages + stage;
        const float *basis = (const float *)w->basis + stage * RBE_BASIS_VECTORS * g;
        if (s->backward->d)
            kernels->gemm(RBE_BASIS_VECTORS, depth, s->width, basis, g, 1, s->x + column * s->width, s->width, p, s->width, false);
        kernels->table_backward(s->start + q * (RBE_BASIS_VECTORS + 1), s->row + q * m, s->factor + q * m, s->dy, p, s->d + q * m, dp);
        if (s->dx)
            kernels->gemm(s->tokens, RBE_BASIS_VECTORS, depth, dp, 1, s->width, basis, g, s->dx + column, s->dx_stride, stage > 0);
        if (dbasis)
            kernels->gemm(RBE_BASIS_VECTORS, s->tokens, depth, dp, s->width, 1, s->rows + column, s->rows_stride,
                          dbasis + stage * RBE_BASIS_VECTORS * g, g, true);
    }
}

static void backward_parts(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const int64_t size = RBE_BASIS_VECTORS * s->width, basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *p = rbe_scratch_take(size, sizeof *p), *dp = rbe_scratch_take(size, sizeof *dp);
    if (!p || !dp) {
        atomic_store(&s->backward->job.failed, true);
        rbe_scratch_end(mark);
        return;
    }
    if (!s->backward->d) memset(p, 0, (size_t)size * sizeof *p);
    for (int64_t part = begin; part < end; ++part)
        for (int64_t k = w->groups * part / s->parts; k < w->groups * (part + 1) / s->parts; ++k)
            backward_group(s, k, p, dp, s->dbasis ? s->dbasis + part * basis : NULL);
    rbe_scratch_end(mark);
}

static void store_dx(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const int64_t n = s->backward->job.w->cols, x0 = n * begin / PARTS, x1 = n * end / PARTS;
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

// D back from the sorted lists to [m][K*M], a line of it at a time.
static void unsort(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const int64_t m = w->rows, codes = rbe_codes_a_row(w);
    for (int64_t q = begin * SORTED; q < rbe_min(end * SORTED, codes); ++q)
        for (int64_t p = q * m; p < (q + 1) * m; ++p) s->backward->d[s->row[p] * codes + q] = s->d[p];
}

rbe_status rbe_backward_table(rbe_backward_job *backward, rbe_error *err) {
    rbe_job *job = &backward->job;
    const rbe_weight *w = job->w;
    const int64_t codes = rbe_codes_a_row(w), places = codes * w->rows, blocks = (codes + SORTED - 1) / SORTED;
    const int64_t basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.backward = backward, .parts = rbe_min(PARTS, w->groups), .width = 4 * job->kernels->width};
    const rbe_status status = rbe_unpack_codes(job->kernels, w, SORTED, job->threads, &s.codes, err);
    s.start = rbe_scratch_take(codes * (RBE_BASIS_VECTORS + 1), sizeof *s.start);
    s.row = rbe_scratch_take(places, sizeof *s.row);
    s.factor = rbe_scratch_take(places, sizeof *s.factor);
    s.d = rbe_scratch_take(places, sizeof *s.d);
    s.x = rbe_scratch_take(w->cols * s.width, sizeof *s.x);
    s.dy = rbe_scratch_take(w->rows * s.width, sizeof *s.dy);
    if (backward->dbasis) s.dbasis = rbe_scratch_take(s.parts * basis, sizeof *s.dbasis);
    float *rows = rbe_is_rows(job->x) ? NULL : rbe_scratch_take(s.width * w->cols, sizeof *rows);
    float *dx = !backward->dx || rbe_is_rows(backward->dx) ? NULL : rbe_scratch_take(s.width * w->cols, sizeof *dx);
    const bool room = s.start && s.row && s.factor && s.d && s.x && s.dy && (s.dbasis || !backward->dbasis) && (rows || rbe_is_rows(job->x)) &&
                      (dx || !backward->dx || rbe_is_rows(backward->dx));
    if (status == RBE_OK && room) {
        rbe_run(job->threads, blocks, 1, sort_codes, &s);
        memset(s.d, 0, (size_t)places * sizeof *s.d);
        if (s.dbasis) memset(s.dbasis, 0, (size_t)(s.parts * basis) * sizeof *s.dbasis);
        run_tiles(&s, rows, dx);
        if (backward->d) rbe_run(job->threads, blocks, 1, unsort, &s);
        for (int64_t part = 0; s.dbasis && part < s.parts; ++part) job->kernels->add_scaled(basis, 1.0f, s.dbasis + part * basis, backward->dbasis);
    }
    rbe_scratch_end(mark);
    if (status != RBE_OK) return status;
    return room && !atomic_load(&job->failed) ? RBE_OK : rbe_out_of_memory(err);
}
