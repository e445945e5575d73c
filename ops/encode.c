// rbe_encode: checks, turns the basis for the searches, and hands every group of every row to the one that its number of stages needs.
#include <math.h>

#include "encode.h"

static void encode_rows(int64_t begin, int64_t end, void *context) {
    rbe_encoder *s = context;
    const rbe_weight *w = s->w;
    const int64_t g = w->layout.group, stages = w->layout.stages;
    const bool seeded = rbe_field_seeded(w->layout.field);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    double *v = rbe_scratch_take(g, sizeof *v);
    float *v32 = rbe_scratch_take(g, sizeof *v32), *buffer = rbe_scratch_take((2 * RBE_ENCODE_BEAM + 1) * g, sizeof *buffer);
    if (!v || !v32 || !buffer) {
        atomic_store(&s->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        const double gain = rbe_real_at(w->gain, w->real, i);
        for (int64_t k = 0; k < w->groups; ++k) {
            const int64_t depth = rbe_min(g, w->cols - k * g);
            const double *square = depth == g ? s->square : s->square_end;
            int32_t *words = s->words + (i * w->groups + k) * stages;
            int only[RBE_ENCODE_STAGES];
            for (int64_t t = 0; t < stages; ++t)
                only[t] = seeded ? (int)rbe_seeded_idx(w->seed, (uint64_t)(w->row0 + i), (uint64_t)(w->k0 + k), (uint64_t)t, (uint64_t)w->groups_total, (uint64_t)stages) : -1;
            if (gain == 0) {  // every code gives the same weight: the lowest word
                for (int64_t t = 0; t < stages; ++t)
                    words[t] = (int32_t)(rbe_field_constant(w->layout.field) | (seeded ? (uint32_t)only[t] << RBE_IDX_SHIFT : 0));
                continue;
            }
            for (int64_t e = 0; e < depth; ++e) {
                v[e] = rbe_real_at(s->dense->data, s->dense->dtype, i * s->dense->row_stride + (k * g + e) * s->dense->col_stride) / gain * s->unit;
                v32[e] = (float)v[e];
            }
            if (stages == 1) words[0] = (int32_t)rbe_encode_stage(s, depth, v, square, only[0]);
            else rbe_encode_stages(s, depth, v32, depth == g ? s->square32 : s->square_end32, only, buffer, words);
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

rbe_status rbe_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err) {
    const rbe_status status = rbe_check_encoding_shape(w, dense, words, err);
    if (status != RBE_OK) return status;
    const rbe_layout *l = &w->layout;
    for (int64_t i = 0; i < w->rows; ++i) {
        for (int64_t j = 0; j < w->cols; ++j)
            if (!isfinite(rbe_real_at(dense->data, dense->dtype, i * dense->row_stride + j * dense->col_stride)))
                return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: element [%lld, %lld] is not finite; must be", (long long)i, (long long)j);
    }
    const int64_t size = (int64_t)l->stages * RBE_BASIS_VECTORS * l->group;
    for (int64_t i = 0; i < size; ++i)
        if (!isfinite(rbe_real_at(w->basis, w->real, i))) return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: holds values that are not finite; must not");
    return rbe_check_gain(w, err);
}

static double unit_of(const rbe_weight *w) {
    double most = 0;
    const int64_t size = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    for (int64_t i = 0; i < size; ++i) {  // not fmax: GCC 12 for aarch64 fails on its reduction
        const double value = fabs(rbe_real_at(w->basis, w->real, i));
        most = value > most ? value : most;
    }
    return most > 0 ? ldexp(1.0, -ilogb(most)) : 1.0;
}

bool rbe_encoder_take(rbe_encoder *s) {
    const int64_t vectors = (int64_t)s->w->layout.stages * RBE_BASIS_VECTORS, size = vectors * s->w->layout.group;
    s->basis = rbe_scratch_take(size, sizeof *s->basis);
    s->basis32 = rbe_scratch_take(size, sizeof *s->basis32);
    s->square = rbe_scratch_take(vectors, sizeof *s->square);
    s->square_end = rbe_scratch_take(vectors, sizeof *s->square_end);
    s->square32 = rbe_scratch_take(vectors, sizeof *s->square32);
    s->square_end32 = rbe_scratch_take(vectors, sizeof *s->square_end32);
    return s->basis && s->basis32 && s->square && s->square_end && s->square32 && s->square_end32;
}

void rbe_encoder_fill(rbe_encoder *s) {
    const rbe_weight *w = s->w;
    const int64_t g = w->layout.group, ragged = w->cols - (w->groups - 1) * g;
    const bool sizes = w->layout.field == RBE_FIELD_RBE16S;
    s->unit = unit_of(w);
    for (int64_t t = 0; t < w->layout.stages; ++t) {
        for (int64_t j = 0; j < RBE_BASIS_VECTORS; ++j) {
            double square = 0, end = 0;
            for (int64_t e = 0; e < g; ++e) {
                const double b = rbe_encoder_element(s, t, j, e);
                s->basis[(t * g + e) * RBE_BASIS_VECTORS + j] = sizes ? fabs(b) : b;
                s->basis32[(t * g + e) * RBE_BASIS_VECTORS + j] = (float)(sizes ? fabs(b) : b);
                square += b * b;
                if (e < ragged) end += b * b;
            }
            s->square[t * RBE_BASIS_VECTORS + j] = square;
            s->square_end[t * RBE_BASIS_VECTORS + j] = end;
            s->square32[t * RBE_BASIS_VECTORS + j] = (float)square;
            s->square_end32[t * RBE_BASIS_VECTORS + j] = (float)end;
        }
    }
}

rbe_status rbe_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = rbe_check_encoding(w, dense, words, err);
    if (status != RBE_OK) return status;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    rbe_encoder s = {.w = w, .dense = dense, .words = words};
    if (!rbe_encoder_take(&s)) {
        status = rbe_out_of_memory(err);
    } else {
        rbe_encoder_fill(&s);
        rbe_run(threads, w->rows, rbe_share(threads, w->rows, 1), encode_rows, &s);
        if (atomic_load(&s.failed)) status = rbe_out_of_memory(err);
    }
    rbe_scratch_end(mark);
    return status;
}
