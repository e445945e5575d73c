// The code of a group with one stage: the joint minimum of |v - scale b_j|^2 over idx j and scale in float64; ties to the lowest word.
//
// With t = <v, b> / |b|^2 the error is |v|^2 - t^2 |b|^2 + |b|^2 (scale - t)^2, so an idx is tried only if its error at scale = t can win.
#include <math.h>

#include "encode.h"
#include "encode_scale.h"

static const double SLACK = 1e-12;  // what rounding may put between two errors that are one: a tie must be seen

HOT static void dots64(int64_t depth, const double *v, const double *basis, double *out) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] = 0;
    for (int64_t e = 0; e < depth; ++e, basis += RBE_BASIS_VECTORS)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] += v[e] * basis[j];
}

static uint32_t signs_of(const rbe_encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v) {
    uint32_t signs = 0;
    for (int64_t e = 0; e < depth; ++e) signs |= (uint32_t)(v[e] * rbe_encoder_element(s, stage, j, e) < 0) << e;
    return signs;
}

uint32_t rbe_encoder_word(const rbe_encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v, double dot, double square, double *error) {
    const rbe_field field = s->w->layout.field;
    const uint32_t idx = (uint32_t)j << RBE_IDX_SHIFT;
    if (!rbe_field_has_scale(field)) {
        *error = square - 2 * dot;
        return idx | (field == RBE_FIELD_RBE16S ? signs_of(s, stage, j, depth, v) : 0);
    }
    if (square == 0) {
        *error = 0;
        return idx | rbe_field_constant(field);
    }
    const rbe_nearest n = rbe_nearest_scale(field, dot / square);
    *error = square * n.scale * n.scale - 2 * n.scale * dot;
    return idx | n.word;
}

uint32_t rbe_encode_stage(const rbe_encoder *s, int64_t depth, const double *v, const double *square, int only) {
    const bool scaled = rbe_field_has_scale(s->w->layout.field);
    double dot[RBE_BASIS_VECTORS], bound[RBE_BASIS_VECTORS], size[RBE_ENCODE_SIGNS];
    const double *against = v;
    if (s->w->layout.field == RBE_FIELD_RBE16S) {
        for (int64_t e = 0; e < depth; ++e) size[e] = fabs(v[e]);
        against = size;
    }
    dots64(depth, against, s->basis, dot);
    int first = only < 0 ? 0 : only;
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
        bound[j] = !scaled ? square[j] - 2 * dot[j] : square[j] > 0 ? -dot[j] * dot[j] / square[j] : 0.0;
        if (only < 0 && bound[j] < bound[first]) first = j;
    }
    double least, error;
    uint32_t best = rbe_encoder_word(s, 0, first, depth, v, dot[first], square[first], &least);
    if (only >= 0) return best;
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
        if (j == first || bound[j] > least + SLACK * fabs(least)) continue;
        const uint32_t word = rbe_encoder_word(s, 0, j, depth, v, dot[j], square[j], &error);
        if (error < least || (error == least && word < best)) {
            best = word;
            least = error;
        }
    }
    return best;
}
