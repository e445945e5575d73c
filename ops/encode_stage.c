// The codes of groups with one stage: the joint minimum of |v - scale b_j|^2 over idx j and scale in float64; ties to the lowest word.
//
// With t = <v, b> / |b|^2 the error is |v|^2 - t^2 |b|^2 + |b|^2 (scale - t)^2, so an idx is tried only if its error at scale = t, its bound, can win.
// Scores in float32 say which idx that may be, eight rows at a time; those few are decided in float64.
#include <math.h>

#include "encode.h"
#include "encode_scale.h"

static const double SLACK = 1e-12;  // what rounding may put between two errors that are one: a tie must be seen

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

static double dot_of(const rbe_encoder *s, int64_t j, int64_t depth, const double *v) {
    double sum = 0;
    if (s->w->layout.field == RBE_FIELD_RBE16S)
        for (int64_t e = 0; e < depth; ++e) sum += fabs(v[e]) * fabs(rbe_encoder_element(s, 0, j, e));
    else
        for (int64_t e = 0; e < depth; ++e) sum += v[e] * rbe_encoder_element(s, 0, j, e);
    return sum;
}

// The best word among `count` vectors; *least: its error.
static uint32_t best_of(const rbe_encoder *s, int64_t count, const int32_t *at, int64_t depth, const double *v, const double *square, double *least) {
    const bool scaled = rbe_field_has_scale(s->w->layout.field);
    double dot[RBE_BASIS_VECTORS], bound[RBE_BASIS_VECTORS], error;
    int64_t first = 0;
    dot[0] = bound[0] = 0;  // count is at least 1
    for (int64_t c = 0; c < count; ++c) {
        const int32_t j = at[c];
        dot[c] = dot_of(s, j, depth, v);
        bound[c] = !scaled ? square[j] - 2 * dot[c] : square[j] > 0 ? -dot[c] * dot[c] / square[j] : 0.0;
        if (bound[c] < bound[first]) first = c;
    }
    uint32_t best = rbe_encoder_word(s, 0, at[first], depth, v, dot[first], square[at[first]], least);
    for (int64_t c = 0; c < count; ++c) {
        if (c == first || bound[c] > *least + SLACK * fabs(*least)) continue;
        const uint32_t word = rbe_encoder_word(s, 0, at[c], depth, v, dot[c], square[at[c]], &error);
        if (error < *least || (error == *least && word < best)) {
            best = word;
            *least = error;
        }
    }
    return best;
}

// v in float32, without signs if `sizes`. Returns |v|^2, which scales an error bound: summed in any order.
HOT static double narrow(int64_t depth, const double *v, bool sizes, float *out) {
    double part[8] = {0};
    int64_t e = 0;
    for (; e + 8 <= depth; e += 8)
        for (int l = 0; l < 8; ++l) part[l] += v[e + l] * v[e + l];
    for (; e < depth; ++e) part[0] += v[e] * v[e];
    for (int l = 1; l < 8; ++l) part[0] += part[l];
    if (sizes)
        for (e = 0; e < depth; ++e) out[e] = (float)fabs(v[e]);
    else
        for (e = 0; e < depth; ++e) out[e] = (float)v[e];
    return part[0];
}

void rbe_encode_stage(const rbe_encoder *s, int64_t rows, int64_t depth, const double *v, const rbe_squares *squares, const int *only,
                      float *buffer, int32_t *const *words) {
    const rbe_field field = s->w->layout.field;
    const bool scaled = rbe_field_has_scale(field);
    const int64_t g = s->w->layout.group;
    float score[RBE_ENCODE_ROWS * RBE_BASIS_VECTORS], most[RBE_ENCODE_ROWS * RBE_SCORE_LANES], top[RBE_ENCODE_ROWS];
    int32_t at[RBE_BASIS_VECTORS];
    double least;
    if (rbe_field_seeded(field)) {
        for (int64_t r = 0; r < rows; ++r) {
            const double *target = v + r * g;
            words[r][0] = (int32_t)rbe_encoder_word(s, 0, only[r], depth, target, dot_of(s, only[r], depth, target), squares->square[only[r]], &least);
        }
        return;
    }
    double square[RBE_ENCODE_ROWS];
    for (int64_t r = 0; r < rows; ++r) square[r] = narrow(depth, v + r * g, field == RBE_FIELD_RBE16S, buffer + r * g);
    s->kernels->scores(rows, depth, buffer, g, s->columns32, scaled ? NULL : squares->guide, scaled ? squares->guide : NULL, score, most, top);
    for (int64_t r = 0; r < rows; ++r) {
        const double *target = v + r * g, size = top[r];
        const double slack = rbe_encoder_slack(depth, square[r], squares->largest[0]);
        const bool sees = rbe_encoder_sees(slack);
        const double limit = (scaled ? -size * size : -2 * size) + 2 * slack;
        const float *scores = score + r * RBE_BASIS_VECTORS;
        int64_t count = rbe_encoder_candidates(s, sees, scores, rbe_encoder_reach(scaled, limit), at);
        if (count == 1 && !scaled) {
            words[r][0] = (int32_t)rbe_encoder_word(s, 0, at[0], depth, target, 0, 0, &least);  // no error can make another one win
            continue;
        }
        uint32_t best = best_of(s, count, at, depth, target, squares->square, &least);
        const double wider = least + SLACK * fabs(least) + slack;
        if (sees && wider > limit) {  // scales so coarse that another idx can win
            count = rbe_encoder_candidates(s, sees, scores, rbe_encoder_reach(scaled, wider), at);
            best = best_of(s, count, at, depth, target, squares->square, &least);
        }
        words[r][0] = (int32_t)best;
    }
}
