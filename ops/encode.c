// rbe_encode: checks, turns the basis for the searches, and hands every group of every row to the one that its number of stages needs.
#include <float.h>

#include "dispatch.h"
#include "encode.h"

void rbe_encode_group(const rbe_encoder *s, int64_t rows, int64_t depth, const double *v, const rbe_squares *squares, const int *only,
                      float *buffer, int32_t *const *words) {
    const int64_t g = s->w->layout.group, stages = s->w->layout.stages;
    if (stages == 1) {
        rbe_encode_stage(s, rows, depth, v, squares, only, buffer, words);
        return;
    }
    float *target = buffer + (3 * RBE_ENCODE_BEAM + 1) * g;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t e = 0; e < depth; ++e) target[e] = (float)v[r * g + e];
        rbe_encode_stages(s, depth, target, squares, only + r * stages, buffer, words[r]);
    }
}

// v = the weights of a group of row i, over gain, in units of the basis
HOT static void targets_of(const rbe_encoder *s, int64_t i, int64_t first, int64_t depth, double gain, double *v) {
    const rbe_matrix *d = s->dense;
    const int64_t at = i * d->row_stride + first * d->col_stride;
    if (d->dtype == RBE_F32 && d->col_stride == 1) {
        const float *row = (const float *)d->data + at;
        for (int64_t e = 0; e < depth; ++e) v[e] = row[e] / gain * s->unit;
    } else {
        for (int64_t e = 0; e < depth; ++e) v[e] = rbe_real_at(d->data, d->dtype, at + e * d->col_stride) / gain * s->unit;
    }
}

static void encode_rows(int64_t begin, int64_t end, void *context) {
    rbe_encoder *s = context;
    const rbe_weight *w = s->w;
    const int64_t g = w->layout.group, stages = w->layout.stages;
    const bool seeded = rbe_field_seeded(w->layout.field);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    double *v = rbe_scratch_take(RBE_ENCODE_ROWS * g, sizeof *v);
    float *buffer = rbe_scratch_take(RBE_ENCODE_BUFFER * g, sizeof *buffer);
    if (!v || !buffer) {
        atomic_store(&s->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t tile = begin; tile < end; tile += RBE_ENCODE_ROWS) {
        for (int64_t k = 0; k < w->groups; ++k) {
            const int64_t depth = rbe_min(g, w->cols - k * g);
            int only[RBE_ENCODE_ROWS * RBE_ENCODE_STAGES];
            int32_t *to[RBE_ENCODE_ROWS];
            int64_t rows = 0;
            for (int64_t i = tile; i < rbe_min(tile + RBE_ENCODE_ROWS, end); ++i) {
                const double gain = rbe_real_at(w->gain, w->real, i);
                int *idx = only + rows * stages;
                to[rows] = s->words + (i * w->groups + k) * stages;
                for (int64_t t = 0; t < stages; ++t) {
                    idx[t] = seeded ? (int)rbe_seeded_idx(w->seed, (uint64_t)(w->row0 + i), (uint64_t)(w->k0 + k), (uint64_t)t, (uint64_t)w->groups_total, (uint64_t)stages) : -1;
                    // where the gain is 0 every code gives the same weight: the lowest word
                    if (gain == 0) to[rows][t] = (int32_t)(rbe_field_constant(w->layout.field) | (seeded ? (uint32_t)idx[t] << RBE_IDX_SHIFT : 0));
                }
                if (gain == 0) continue;
                targets_of(s, i, k * g, depth, gain, v + rows * g);
                ++rows;
            }
            rbe_encode_group(s, rows, depth, v, depth == g ? &s->whole : &s->end, only, buffer, to);
        }
    }
    rbe_scratch_end(mark);
}

rbe_status rbe_check_encoding_shape(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err) {
    rbe_status status = rbe_check_shape(w, err);
    if (status != RBE_OK) return status;
    const rbe_layout *l = &w->layout;
    if (l->stages > RBE_ENCODE_STAGES || (l->field == RBE_FIELD_RBE16S && l->group != RBE_ENCODE_SIGNS))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: has %d stages and groups of %d; must have at most %d stages, and groups of 8 for rbe16s",
                        (int)l->stages, (int)l->group, RBE_ENCODE_STAGES);
    if (!words || !w->basis || !w->gain || !dense || !dense->data)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "words, basis, gain or weight: is NULL; must not be");
    if (dense->dtype != RBE_F32 && dense->dtype != RBE_F64) return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: must be float32 or float64");
    if (dense->rows != w->rows || dense->cols != w->cols)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: is %lld x %lld; must be %lld x %lld", (long long)dense->rows, (long long)dense->cols,
                        (long long)w->rows, (long long)w->cols);
    return RBE_OK;
}

// Whether a row of float32 numbers side by side is finite; false also where it is anything else.
HOT static bool finite_row(const rbe_matrix *dense, int64_t i) {
    if (dense->dtype != RBE_F32 || dense->col_stride != 1) return false;
    const float *row = (const float *)dense->data + i * dense->row_stride;
    int bad = 0;
    for (int64_t j = 0; j < dense->cols; ++j) bad |= !(fabsf(row[j]) <= FLT_MAX);
    return !bad;
}

rbe_status rbe_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err) {
    const rbe_status status = rbe_check_encoding_shape(w, dense, words, err);
    if (status != RBE_OK) return status;
    const rbe_layout *l = &w->layout;
    for (int64_t i = 0; i < w->rows; ++i) {
        if (finite_row(dense, i)) continue;
        for (int64_t j = 0; j < w->cols; ++j)
            if (!isfinite(rbe_real_at(dense->data, dense->dtype, i * dense->row_stride + j * dense->col_stride)))
                return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: element [%lld, %lld] is not finite; must be", (long long)i, (long long)j);
    }
    const int64_t size = (int64_t)l->stages * RBE_BASIS_VECTORS * l->group;
    for (int64_t i = 0; i < size; ++i)
        if (!isfinite(rbe_real_at(w->basis, w->real, i))) return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: holds values that are not finite; must not");
    return rbe_check_gain(w, err);
}

static bool take_squares(rbe_squares *squares, int64_t vectors) {
    squares->square = rbe_scratch_take(vectors, sizeof *squares->square);
    squares->square32 = rbe_scratch_take(vectors, sizeof *squares->square32);
    squares->guide = rbe_scratch_take(vectors, sizeof *squares->guide);
    return squares->square && squares->square32 && squares->guide;
}

bool rbe_encoder_take(rbe_encoder *s) {
    const int64_t vectors = (int64_t)s->w->layout.stages * RBE_BASIS_VECTORS, size = vectors * s->w->layout.group;
    s->columns = rbe_scratch_take(size, sizeof *s->columns);
    s->columns32 = rbe_scratch_take(size, sizeof *s->columns32);
    s->rows32 = rbe_scratch_take(size, sizeof *s->rows32);
    return s->columns && s->columns32 && s->rows32 && take_squares(&s->whole, vectors) && take_squares(&s->end, vectors);
}

void rbe_encoder_columns(const rbe_weight *w, double *columns) {
    const int64_t g = w->layout.group;
    for (int64_t b = 0; b < (int64_t)w->layout.stages * RBE_BASIS_VECTORS; ++b)
        for (int64_t e = 0; e < g; ++e)
            columns[(b / RBE_BASIS_VECTORS * g + e) * RBE_BASIS_VECTORS + b % RBE_BASIS_VECTORS] = rbe_real_at(w->basis, w->real, b * g + e);
}

// The power of two that brings the largest element near 1.
HOT static double unit_of(const double *columns, int64_t size) {
    double most[8] = {0};
    for (int64_t i = 0; i < size; i += 8) {  // size is a multiple of 256. Not fmax: GCC 12 for aarch64 fails on its reduction
        for (int l = 0; l < 8; ++l) {
            const double value = fabs(columns[i + l]);
            most[l] = value > most[l] ? value : most[l];
        }
    }
    for (int l = 1; l < 8; ++l) most[0] = most[l] > most[0] ? most[l] : most[0];
    return most[0] > 0 ? ldexp(1.0, -ilogb(most[0])) : 1.0;
}

HOT static void scale_columns(double unit, int64_t size, double *columns, float *columns32) {
    for (int64_t i = 0; i < size; ++i) {
        columns[i] *= unit;
        columns32[i] = (float)columns[i];
    }
}

HOT static void squares_of(bool scaled, int64_t depth, const double *columns, double *square, float *square32, float *guide) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) square[j] = 0;
    for (int64_t e = 0; e < depth; ++e, columns += RBE_BASIS_VECTORS)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) square[j] += columns[j] * columns[j];
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) square32[j] = (float)square[j];
    if (scaled)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) guide[j] = (float)(square[j] > 0 ? 1 / sqrt(square[j]) : 0);
    else
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) guide[j] = (float)(0.5 * square[j]);
}

static void fill_squares(const rbe_encoder *s, int64_t depth, rbe_squares *squares) {
    const int64_t g = s->w->layout.group;
    for (int64_t t = 0; t < s->w->layout.stages; ++t) {
        double *square = squares->square + t * RBE_BASIS_VECTORS, largest = 0;
        squares_of(rbe_field_has_scale(s->w->layout.field), depth, s->columns + t * g * RBE_BASIS_VECTORS, square, squares->square32 + t * RBE_BASIS_VECTORS,
                   squares->guide + t * RBE_BASIS_VECTORS);
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) largest = square[j] > largest ? square[j] : largest;
        squares->largest[t] = largest;
    }
}

void rbe_encoder_fill(rbe_encoder *s) {
    const rbe_weight *w = s->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, size = stages * g * RBE_BASIS_VECTORS, ragged = w->cols - (w->groups - 1) * g;
    s->unit = unit_of(s->columns, size);
    scale_columns(s->unit, size, s->columns, s->columns32);
    for (int64_t t = 0; t < stages; ++t) {
        const int64_t at = t * g * RBE_BASIS_VECTORS;
        s->kernels->transpose(s->columns32 + at, RBE_BASIS_VECTORS, g, RBE_BASIS_VECTORS, s->rows32 + at, g, g);
    }
    if (w->layout.field == RBE_FIELD_RBE16S)
        for (int64_t i = 0; i < size; ++i) s->columns32[i] = fabsf(s->columns32[i]);
    fill_squares(s, g, &s->whole);
    if (ragged < g) fill_squares(s, ragged, &s->end);
}

rbe_status rbe_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = rbe_check_encoding(w, dense, words, err);
    if (status != RBE_OK) return status;
    rbe_encoder s = {.w = w, .dense = dense, .words = words, .wide = w->real == RBE_F64};
    status = rbe_choose_kernels(&s.kernels, err);
    if (status != RBE_OK) return status;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    if (!rbe_encoder_take(&s)) {
        status = rbe_out_of_memory(err);
    } else {
        rbe_encoder_columns(w, s.columns);
        rbe_encoder_fill(&s);
        rbe_run(threads, w->rows, rbe_share(threads, w->rows, RBE_ENCODE_ROWS), encode_rows, &s);
        if (atomic_load(&s.failed)) status = rbe_out_of_memory(err);
    }
    rbe_scratch_end(mark);
    return status;
}
