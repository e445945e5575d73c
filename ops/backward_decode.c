// The backward with W decoded a tile at a time: signs, residuals, few rows or small groups.
//
//     dx += dy W         dW = dy^T x, a tile, from which   D[i,q] += dot(dW[i, k], basis[s, idx])   and   dbasis[s, idx] += gain scale dW[i, k]
//
// Columns are dealt to a fixed number of parts, each with its own dbasis, added up in order at the end: the result does not depend on the
// threads.
#include <string.h>

#include "product.h"

enum { PARTS = 16, TOKENS = 512, ROWS = 192, COLUMNS = 512 };  // a tile of W and dW; a block of tokens reuses the decoded tile

typedef struct pass {
    rbe_backward_job *backward;
    int64_t chunk, chunks, parts;  // groups a tile, tiles a row, parts
    float *dbasis, *gain;          // [parts][M][256][g], [parts][m]
    bool split;                    // products on the matrix unit
    // of the block of tokens at hand
    int64_t t0, tokens;
    const float *x, *dy;
    float *dx;
    int64_t x_stride, dy_stride, dx_stride;
} pass;

typedef struct buffers {
    rbe_row_buffers row;
    float *tile, *dy;              // W or dW [ROWS][reach], dy^T [ROWS][tokens]
    uint16_t *x, *left, *right;    // split: x of the columns at hand; dy or dy^T; the decoded tile
    int64_t reach;
} buffers;

static bool take_buffers(const pass *s, buffers *b) {
    const rbe_weight *w = s->backward->job.w;
    b->reach = rbe_min(s->chunk * w->layout.group, w->cols);
    b->tile = rbe_scratch_take(ROWS * b->reach, sizeof *b->tile);
    b->dy = rbe_scratch_take(ROWS * s->tokens, sizeof *b->dy);
    if (!rbe_take_row_buffers(w, s->chunk, &b->row) || !b->tile || !b->dy) return false;
    if (!s->split) return true;
    const int64_t left = rbe_max(rbe_split_size(ROWS, s->tokens), rbe_split_size(s->tokens, ROWS));
    b->x = rbe_scratch_take(rbe_split_size(b->reach, s->tokens), sizeof *b->x);
    b->left = rbe_scratch_take(left, sizeof *b->left);
    b->right = rbe_scratch_take(rbe_split_size(b->reach, ROWS), sizeof *b->right);
    return b->x && b->left && b->right;
}

// dx += dy W for the rows of a tile
static void tile_dx(const pass *s, const buffers *b, int64_t i0, int64_t rows, int64_t k0, int64_t groups, int64_t cols) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    const rbe_weight *w = s->backward->job.w;
    float *dx = s->dx + k0 * w->layout.group;
    for (int64_t i = 0; i < rows; ++i) rbe_decode_row(kernels, w, i0 + i, k0, groups, b->row, b->tile + i * b->reach);
    if (s->split) {
        const bool fast = s->backward->job.fast;
        const int dy = rbe_pieces(s->backward->job.y->dtype, fast), w = rbe_float_pieces(fast);
        kernels->split_rows(s->tokens, rows, s->dy + i0, s->dy_stride, dy, b->left);
        kernels->split_cols(rows, cols, b->tile, b->reach, w, b->right);
        kernels->gemm_split(s->tokens, rows, cols, b->left, dy, b->right, w, dx, s->dx_stride, i0 > 0);
    } else {
        kernels->gemm(s->tokens, rows, cols, s->dy + i0, s->dy_stride, 1, b->tile, b->reach, dx, s->dx_stride, i0 > 0);
    }
}

// dW = dy^T x
static void tile_dw(const pass *s, const buffers *b, int64_t i0, int64_t rows, int64_t j0, int64_t cols) {
    const rbe_kernels *kernels = s->backward->job.kernels;
    kernels->transpose(s->dy + i0, s->dy_stride, s->tokens, rows, b->dy, s->tokens, s->tokens);
    if (s->split) {
        // two pieces times two would leave out the product of the second ones, which only the fast class can spare
        const bool fast = s->backward->job.fast;
        const int x = rbe_pieces(s->backward->job.x->dtype, fast), dy = x == 2 && !fast ? RBE_WHOLE : x;
        kernels->split_rows(rows, s->tokens, b->dy, s->tokens, dy, b->left);
        kernels->gemm_split(rows, s->tokens, cols, b->left, dy, b->x, x, b->tile, b->reach, false);
    } else {
        kernels->gemm(rows, s->tokens, cols, b->dy, s->tokens, 1, s->x + j0, s->x_stride, b->tile, b->reach, false);
    }
}

// All rows of groups k0 .. k0+groups.
static void backward_columns(const pass *s, const buffers *b, int64_t k0, int64_t groups, float *dbasis, float *gain) {
    const rbe_backward_job *backward = s->backward;
    const rbe_kernels *kernels = backward->job.kernels;
    const rbe_weight *w = backward->job.w;
    const int64_t g = w->layout.group, stages = w->layout.stages, j0 = k0 * g, cols = rbe_min(groups * g, w->cols - j0);
    const bool wants_dw = backward->d || dbasis || gain;
    if (s->split && wants_dw) kernels->split_cols(s->tokens, cols, s->x + j0, s->x_stride, rbe_pieces(backward->job.x->dtype, backward->job.fast), b->x);
    for (int64_t i0 = 0; i0 < w->rows; i0 += ROWS) {
        const int64_t rows = rbe_min(ROWS, w->rows - i0);
        if (s->dx) tile_dx(s, b, i0, rows, k0, groups, cols);
        if (!wants_dw) continue;
        tile_dw(s, b, i0, rows, j0, cols);
        for (int64_t i = i0; i < i0 + rows; ++i) {
            const rbe_code_row row = rbe_code_row_at(w, i);
            kernels->unpack(&row, k0 * stages, groups * stages, b->row.idx, b->row.scale, b->row.signs);
            const float sum = kernels->scatter_row(stages, g, cols, w->basis, b->row.idx, b->row.scale, b->row.signs,
                                                   ((const float *)w->gain)[i], b->tile + (i - i0) * b->reach,
                                                   backward->d ? backward->d + i * row.count + k0 * stages : NULL, dbasis);
            if (gain) gain[i] += sum;
        }
    }
}

static void backward_parts(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->backward->job.w;
    const int64_t basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    buffers b = {.x = NULL};
    if (!take_buffers(s, &b)) {
        atomic_store(&s->backward->job.failed, true);
        rbe_scratch_end(mark);
        return;
    }
    if (s->split) s->backward->job.kernels->split_begin();
    for (int64_t part = begin; part < end; ++part)
        for (int64_t c = s->chunks * part / s->parts; c < s->chunks * (part + 1) / s->parts; ++c)
            backward_columns(s, &b, c * s->chunk, rbe_min(s->chunk, w->groups - c * s->chunk), s->dbasis ? s->dbasis + part * basis : NULL,
                             s->gain ? s->gain + part * w->rows : NULL);
    if (s->split) s->backward->job.kernels->split_end();
    rbe_scratch_end(mark);
}

// tokens t0 .. of a matrix as rows, through `copy` where they are not that already
static const float *as_rows(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, float *copy, int64_t *stride) {
    *stride = copy ? a->cols : a->row_stride;
    if (!copy) return (const float *)a->data + t0 * a->row_stride;
    rbe_load_rows(kernels, a, t0, tokens, 0, a->cols, copy, a->cols);
    return copy;
}

static void run_blocks(pass *s, float *x, float *dy, float *dx) {
    const rbe_job *job = &s->backward->job;
    const rbe_matrix *out = s->backward->dx;
    for (s->t0 = 0; s->t0 < job->x->rows && !atomic_load(&job->failed); s->t0 += TOKENS) {
        s->tokens = rbe_min(TOKENS, job->x->rows - s->t0);
        s->x = as_rows(job->kernels, job->x, s->t0, s->tokens, x, &s->x_stride);
        s->dy = as_rows(job->kernels, job->y, s->t0, s->tokens, dy, &s->dy_stride);
        if (out) {
            s->dx = dx ? dx : (float *)out->data + s->t0 * out->row_stride;
            s->dx_stride = dx ? out->cols : out->row_stride;
        }
        rbe_run(job->threads, s->parts, 1, backward_parts, s);
        if (dx) rbe_store_rows(job->kernels, out, s->t0, s->tokens, 0, out->cols, dx, out->cols);
    }
}

rbe_status rbe_backward_decode(rbe_backward_job *backward, rbe_error *err) {
    rbe_job *job = &backward->job;
    const rbe_weight *w = job->w;
    const int64_t tokens = rbe_min(TOKENS, job->x->rows), basis = w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.backward = backward, .chunk = rbe_min(w->groups, rbe_max(1, COLUMNS / w->layout.group))};
    s.chunks = (w->groups + s.chunk - 1) / s.chunk;
    s.parts = rbe_min(PARTS, s.chunks);
    bool room = true;
    float *copy[3] = {NULL, NULL, NULL};
    const rbe_matrix *matrix[3] = {job->x, job->y, backward->dx};
    for (int i = 0; i < 3; ++i)
        if (matrix[i] && !rbe_is_rows(matrix[i]))
            room = (copy[i] = rbe_scratch_take(tokens * matrix[i]->cols, sizeof(float))) != NULL && room;
    if (backward->dbasis) room = (s.dbasis = rbe_scratch_take(s.parts * basis, sizeof(float))) != NULL && room;
    if (backward->gain) room = (s.gain = rbe_scratch_take(s.parts * w->rows, sizeof(float))) != NULL && room;
    s.split = rbe_wants_split(job->kernels, rbe_min(tokens, w->rows), 32) && rbe_wants_split(job->kernels, w->cols, 32);
    if (room) {
        if (s.gain) memset(s.gain, 0, (size_t)(s.parts * w->rows) * sizeof(float));
        if (s.dbasis) memset(s.dbasis, 0, (size_t)(s.parts * basis) * sizeof(float));
        run_blocks(&s, copy[0], copy[1], copy[2]);
        for (int64_t part = 0; part < s.parts; ++part) {
            if (s.dbasis) job->kernels->add_scaled(basis, 1.0f, s.dbasis + part * basis, backward->dbasis);
            if (s.gain) job->kernels->add_scaled(w->rows, 1.0f, s.gain + part * w->rows, backward->gain);
        }
    }
    rbe_scratch_end(mark);
    return room && !atomic_load(&job->failed) ? RBE_OK : rbe_out_of_memory(err);
}
