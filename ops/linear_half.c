// y = x W^T through tables in half precision (the fast class), a tile of 64 tokens at a time, or of 32:
//
//     P[q, j, t] = float16(scale[t] x[t, k*g ..] . basis[s, j])          y[t, i] = gain[i] / scale[t] * sum over q of scale[i,q] P[q, idx[i,q], t] + bias[i]
//
// scale[t] is the power of two that keeps sums of RBE_HALF_CODES codes below float16's largest number whatever the codes are: |P| is at most
// max |x[t]| times the largest sum of |basis[s, j]|. It is a token's own, so that no token changes the result of another.
#include <math.h>

#include "product.h"

enum { TABLE_BYTES = 512 << 10, WIDTH = 64, CHUNK = 64, SIDE = 16 };  // P in L2; tokens; rows of y in L1; tokens that are loaded together

typedef struct pass {
    rbe_job *job;
    rbe_codes codes;
    int64_t block;          // groups a block
    const uint16_t *basis;  // for the matrix unit [M][rbe_half_size(256, g)], or NULL
    int pieces;             // of an activation
    int largest;            // 2^largest bounds the sum of |basis[s, j]|
    // of the tile at hand
    int64_t t0, tokens, width;
    float scale[WIDTH], unscale[WIDTH];
    uint16_t *x;  // with a matrix unit [K][rbe_half_size(width, g)]
    uint16_t *p;  // [block * M][256][width]
    uint16_t *sums;  // [m][width], of up to RBE_HALF_SUM codes
    float *y;        // [m][width] where there are more codes, or NULL
    int64_t k0, groups;
    bool fresh, full;  // the sums begin anew; and go into y
    bool first, last;  // y begins; is finished
} pass;

// Their scales, and for the matrix unit their operands of all groups, while they are in L2.
static void load_tokens(int64_t begin, int64_t end, void *context) {
    pass *s = context;
    const rbe_matrix *x = s->job->x;
    const rbe_kernels *kernels = s->job->kernels;
    const int64_t g = s->job->w->layout.group, n = x->cols, size = rbe_half_size(s->width, g);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *copy = rbe_is_rows(x) ? NULL : rbe_scratch_take(SIDE * n, sizeof *copy);
    if (!copy && !rbe_is_rows(x)) atomic_store(&s->job->failed, true);
    for (int64_t t = begin * SIDE; (copy || rbe_is_rows(x)) && t < end * SIDE; t += SIDE) {
        const int64_t some = rbe_max(0, rbe_min(SIDE, s->tokens - t)), row = copy ? n : x->row_stride;
        const float *rows = copy ? copy : (const float *)x->data + (s->t0 + t) * row;
        if (copy) rbe_load_rows(kernels, x, s->t0 + t, some, 0, n, copy, n);
        for (int64_t i = 0; i < SIDE; ++i) {
            const int power = rbe_half_power(i < some ? kernels->largest(n, rows + i * row) : 0.0f, s->largest, RBE_HALF_BOUND);
            s->scale[t + i] = ldexpf(1.0f, power);
            s->unscale[t + i] = ldexpf(1.0f, -power);
        }
        for (int64_t k = 0; s->basis && (k + 1) * g <= n; ++k)
            kernels->half_tokens(some, g, SIDE, rows + k * g, row, s->scale + t, s->pieces, s->x + k * size + t / SIDE * rbe_half_size(SIDE, g));
    }
    rbe_scratch_end(mark);
}

static void fill_floats(const pass *s, int64_t k, float *x, float *table) {
    const rbe_kernels *kernels = s->job->kernels;
    const rbe_weight *w = s->job->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, column = (s->k0 + k) * g, depth = rbe_min(g, w->cols - column);
    const int64_t size = RBE_BASIS_VECTORS * s->width;
    rbe_load_tile(kernels, s->job->x, s->t0, s->tokens, column, depth, x, s->width);
    for (int64_t e = 0; e < depth; ++e)
        for (int64_t t = 0; t < s->tokens; ++t) x[e * s->width + t] *= s->scale[t];
    for (int64_t m = 0; m < stages; ++m) {
        kernels->gemm(RBE_BASIS_VECTORS, depth, s->width, (const float *)w->basis + m * RBE_BASIS_VECTORS * g, g, 1, x, s->width, table, s->width, false);
        kernels->f32_to_f16(table, size, s->p + (k * stages + m) * size);
    }
}

static void fill_matrix_unit(const pass *s, int64_t k) {
    const rbe_layout *l = &s->job->w->layout;
    for (int64_t m = 0; m < l->stages; ++m)
        s->job->kernels->half_table(l->group, s->width, s->basis + m * rbe_half_size(RBE_BASIS_VECTORS, l->group),
                                    s->x + (s->k0 + k) * rbe_half_size(s->width, l->group), s->pieces, NULL,
                                    s->p + (k * l->stages + m) * RBE_BASIS_VECTORS * s->width);
}

// A last group that n cuts short must not meet what pads the basis: it goes without the matrix unit.
static void fill_table(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const int64_t g = s->job->w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *x = rbe_scratch_take(g * s->width, sizeof *x), *table = rbe_scratch_take(RBE_BASIS_VECTORS * s->width, sizeof *table);
    if (!x || !table) {
        atomic_store(&s->job->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    if (s->basis) s->job->kernels->split_begin();
    for (int64_t k = begin; k < end; ++k) {
        if (s->basis && (s->k0 + k + 1) * g <= s->job->w->cols)
            fill_matrix_unit(s, k);
        else
            fill_floats(s, k, x, table);
    }
    if (s->basis) s->job->kernels->split_end();
    rbe_scratch_end(mark);
}

static void sum_rows(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    const rbe_weight *w = s->job->w;
    const rbe_kernels *kernels = s->job->kernels;
    const float *gain = w->gain, *bias = s->job->bias;
    for (int64_t i = begin; i < end; i += CHUNK) {
        const int64_t rows = rbe_min(CHUNK, end - i), at = s->k0 / s->block * s->codes.step + i * s->codes.row;
        uint16_t *sums = s->sums + i * s->width;
        kernels->half_rows(rows, s->groups * w->layout.stages, s->codes.idx + at, s->codes.half ? s->codes.half + at : NULL, s->codes.row, s->p, s->width,
                           sums, s->fresh);
        if (!s->full && !s->last) continue;
        const rbe_half_finish finish = {s->unscale, gain + i, bias ? bias + i : NULL};
        float chunk[CHUNK * WIDTH], *y = s->y ? s->y + i * s->width : chunk;
        kernels->half_widen(rows, s->width, sums, s->last ? &finish : NULL, y, s->first);
        if (s->last) rbe_store_tile(kernels, s->job->y, s->t0, s->tokens, i, rows, y, s->width);
    }
}

// One tile of tokens; threads NULL: all on this thread.
static bool tile(pass *s, const rbe_parallel *threads) {
    const rbe_weight *w = s->job->w;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    s->p = rbe_scratch_take(s->block * w->layout.stages * RBE_BASIS_VECTORS * s->width, sizeof *s->p);
    s->sums = rbe_scratch_take(w->rows * s->width, sizeof *s->sums);
    const int64_t sum = rbe_max(s->block, RBE_HALF_SUM / w->layout.stages / s->block * s->block);  // groups that are summed in float16
    s->y = w->groups > sum ? rbe_scratch_take(w->rows * s->width, sizeof *s->y) : NULL;
    s->x = rbe_scratch_take(s->basis ? w->groups * rbe_half_size(s->width, w->layout.group) : 0, sizeof *s->x);
    const bool room = s->p && s->sums && s->x && (s->y || w->groups <= sum);
    if (room) rbe_run(threads, s->width / SIDE, 1, load_tokens, s);
    for (int64_t k0 = 0; room && k0 < w->groups; k0 += s->block) {
        s->k0 = k0;
        s->groups = rbe_min(s->block, w->groups - k0);
        s->fresh = k0 % sum == 0;
        s->first = k0 < sum;
        s->full = (k0 + s->block) % sum == 0;
        s->last = k0 + s->groups == w->groups;
        rbe_run(threads, s->groups, rbe_share(threads, s->groups, 1), fill_table, s);
        rbe_run(threads, w->rows, rbe_share(threads, w->rows, CHUNK), sum_rows, s);
    }
    rbe_scratch_end(mark);
    return room;
}

// The tile of tokens from t0 on; the last one may be narrow.
static bool tile_at(const void *shared, int64_t t0, const rbe_parallel *threads) {
    pass s = *(const pass *)shared;
    s.t0 = t0;
    s.tokens = rbe_min(WIDTH, s.job->x->rows - t0);
    s.width = s.tokens <= WIDTH / 2 ? WIDTH / 2 : WIDTH;
    return tile(&s, threads);
}

rbe_status rbe_linear_half(rbe_job *job, rbe_error *err) {
    const rbe_weight *w = job->w;
    const rbe_layout *l = &w->layout;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    pass s = {.job = job, .pieces = rbe_half_pieces(job->x->dtype), .largest = rbe_basis_exponent(w)};
    const int64_t codes_a_block = TABLE_BYTES / (RBE_BASIS_VECTORS * WIDTH * (int64_t)sizeof *s.p);
    s.block = rbe_min(w->groups, rbe_max(1, codes_a_block / l->stages));
    rbe_status status = rbe_unpack_codes(job->kernels, w, s.block * l->stages, true, job->threads, &s.codes, err);
    if (status == RBE_OK && job->kernels->half_table && rbe_wants_split(job->kernels, l->group, 32)) {
        s.basis = rbe_half_basis(job->kernels, w);
        if (!s.basis) status = rbe_out_of_memory(err);
    }
    if (status == RBE_OK) status = rbe_run_token_tiles(job, WIDTH, tile_at, &s, err);
    rbe_scratch_end(mark);
    return status;
}
