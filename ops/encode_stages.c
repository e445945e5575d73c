// The codes of a group with several stages: a beam over the stages in float32, then every stage again against what the others leave, until none
// improves. Scores say which vectors may be among the best; the bounds of those few decide, sums over e in order, no operation fused.

#include "encode.h"

enum { ROUNDS = 4 };

typedef struct path {
    uint32_t words[RBE_ENCODE_STAGES];
    double error;
    float *rest;  // what the stages so far leave of v
} path;

typedef struct choice {
    float bound;
    int32_t tag;  // path * 256 + idx
} choice;

static bool with_signs(const rbe_encoder *s) { return s->w->layout.field == RBE_FIELD_RBE16S; }

// to = from + factor * vector(word)
static void add_vector(const rbe_encoder *s, int64_t stage, uint32_t word, int64_t depth, float factor, const float *from, float *to) {
    const float scale = factor * rbe_reference_scale(s->w->layout.field, word);
    const float *row = s->rows32 + (stage * RBE_BASIS_VECTORS + rbe_word_idx(word)) * s->w->layout.group;
    if (with_signs(s)) {
        for (int64_t e = 0; e < depth; ++e) {
            const float b = scale * row[e];
            to[e] = from[e] + (word >> e & 1 ? -b : b);
        }
    } else {
        for (int64_t e = 0; e < depth; ++e) to[e] = from[e] + scale * row[e];
    }
}

// The error that idx j of a stage would add to |rest|^2 with its best unquantised scale.
static float bound_of(const rbe_encoder *s, int64_t stage, int64_t j, int64_t depth, const float *rest, const rbe_squares *squares) {
    const float *row = s->rows32 + (stage * RBE_BASIS_VECTORS + j) * s->w->layout.group, square = squares->square32[stage * RBE_BASIS_VECTORS + j];
    float dot = 0;
    if (with_signs(s))
        for (int64_t e = 0; e < depth; ++e) dot += fabsf(rest[e]) * fabsf(row[e]);
    else
        for (int64_t e = 0; e < depth; ++e) dot += rest[e] * row[e];
    if (!rbe_field_has_scale(s->w->layout.field)) return square - 2 * dot;
    return square > 0 ? -dot * dot / square : 0.0f;
}

// Scores of all idx of a stage against `count` targets; sizes: room for the targets without signs.
static void scores_of(const rbe_encoder *s, int64_t stage, int64_t count, int64_t depth, const float *targets, const rbe_squares *squares, float *sizes,
                      float *score, float *most, float *top) {
    const int64_t g = s->w->layout.group;
    if (with_signs(s)) {
        for (int64_t i = 0; i < count * g; ++i) sizes[i] = fabsf(targets[i]);
        targets = sizes;
    }
    const float *guide = squares->guide + stage * RBE_BASIS_VECTORS;
    const bool scaled = rbe_field_has_scale(s->w->layout.field);
    s->kernels->scores(count, depth, targets, g, s->columns32 + stage * g * RBE_BASIS_VECTORS, scaled ? NULL : guide, scaled ? guide : NULL, score, most, top);
}

// The bound that a score stands for.
static double bound_at(bool scaled, float score) { return scaled ? -(double)score * score : -2.0 * score; }

static inline double size_of(int64_t depth, const float *v) {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e) sum += (double)v[e] * v[e];
    return sum;
}

// The word of idx j against `rest`, with the scale that fits it best.
static uint32_t fitted(const rbe_encoder *s, int64_t stage, int j, int64_t depth, const float *rest, const rbe_squares *squares) {
    const bool sizes = with_signs(s);
    if (!sizes && !rbe_field_has_scale(s->w->layout.field)) return (uint32_t)j << RBE_IDX_SHIFT;
    double v[RBE_ENCODE_SIGNS], dot = 0, error;
    for (int64_t e = 0; e < depth; ++e) {
        const double b = rbe_encoder_element(s, stage, j, e), value = rest[e];
        if (e < RBE_ENCODE_SIGNS) v[e] = value;
        dot += sizes ? fabs(value * b) : value * b;
    }
    return rbe_encoder_word(s, stage, j, depth, v, dot, squares->square32[stage * RBE_BASIS_VECTORS + j], &error);
}

// The BEAM best of `count` choices, sorted; of equal ones the first comes first. Returns how many there are.
HOT static int best_choices(const float *bound, const int32_t *tag, int64_t count, choice *best) {
    enum { FEW = 16 };
    int kept = 0;
    if (count > FEW) {
        for (int64_t c = 0; c < count; ++c) {
            if (kept == RBE_ENCODE_BEAM && !(bound[c] < best[RBE_ENCODE_BEAM - 1].bound)) continue;
            int at = kept < RBE_ENCODE_BEAM ? kept++ : RBE_ENCODE_BEAM - 1;
            for (; at > 0 && bound[c] < best[at - 1].bound; --at) best[at] = best[at - 1];
            best[at] = (choice){bound[c], tag[c]};
        }
        return kept;
    }
    float few[FEW];
    int32_t place[FEW] = {0};
    for (int c = 0; c < FEW; ++c) few[c] = c < count ? bound[c] : INFINITY;
    for (int a = 0; a < FEW; ++a)  // by counting: nothing to predict
        for (int c = 0; c < FEW; ++c) place[c] += (few[a] < few[c]) | ((few[a] == few[c]) & (a < c));
    for (int c = 0; c < count; ++c) {
        if (place[c] >= RBE_ENCODE_BEAM) continue;
        best[place[c]] = (choice){few[c], tag[c]};
        ++kept;
    }
    return kept;
}

// The BEAM best continuations of a beam by one code.
static int continue_beam(const rbe_encoder *s, int64_t stage, int64_t depth, const path *beam, int live, const rbe_squares *squares, int only,
                         float *sizes, choice *best) {
    const bool scaled = rbe_field_has_scale(s->w->layout.field);
    float bound[RBE_ENCODE_BEAM * RBE_BASIS_VECTORS];
    int32_t tag[RBE_ENCODE_BEAM * RBE_BASIS_VECTORS];
    int64_t count = 0;
    if (only >= 0) {
        for (int b = 0; b < live; ++b) {
            tag[b] = b * RBE_BASIS_VECTORS + only;
            bound[b] = (float)beam[b].error + bound_of(s, stage, only, depth, beam[b].rest, squares);
        }
        return best_choices(bound, tag, live, best);
    }
    float score[RBE_ENCODE_BEAM * RBE_BASIS_VECTORS], most[RBE_ENCODE_BEAM * RBE_SCORE_LANES], base[RBE_ENCODE_BEAM], top[RBE_ENCODE_BEAM];
    double largest = 0;
    scores_of(s, stage, live, depth, beam[0].rest, squares, sizes, score, most, top);
    for (int b = 0; b < live; ++b) {
        base[b] = (float)beam[b].error;
        largest = beam[b].error > largest ? beam[b].error : largest;
    }
    const double slack = rbe_encoder_slack(depth, largest, squares->largest[stage]);
    const double limit = s->kernels->score_limit(live, base, scaled, most, RBE_ENCODE_BEAM) + 2 * slack;
    const bool sees = rbe_encoder_sees(slack);
    for (int b = 0; b < live; ++b) {
        const float reach = rbe_encoder_reach(scaled, limit - beam[b].error);
        if (sees && top[b] < reach) continue;
        const int64_t end = count + rbe_encoder_candidates(s, sees, score + b * RBE_BASIS_VECTORS, reach, tag + count);
        for (; count < end; ++count) {
            bound[count] = base[b] + bound_of(s, stage, tag[count], depth, beam[b].rest, squares);
            tag[count] += b * RBE_BASIS_VECTORS;
        }
    }
    return best_choices(bound, tag, count, best);
}

// The idx of a stage that is nearest to `rest`, the first of equal ones.
static int nearest(const rbe_encoder *s, int64_t stage, int64_t depth, const float *rest, const rbe_squares *squares, float *sizes) {
    const bool scaled = rbe_field_has_scale(s->w->layout.field);
    float score[RBE_BASIS_VECTORS], most[RBE_SCORE_LANES], top, least = INFINITY;
    int32_t at[RBE_BASIS_VECTORS];
    scores_of(s, stage, 1, depth, rest, squares, sizes, score, most, &top);
    const double slack = rbe_encoder_slack(depth, size_of(depth, rest), squares->largest[stage]);
    const float reach = rbe_encoder_reach(scaled, bound_at(scaled, top) + 2 * slack);
    const int64_t count = rbe_encoder_candidates(s, rbe_encoder_sees(slack), score, reach, at);
    if (count == 1) return at[0];
    int nearest = 0;
    for (int64_t c = 0; c < count; ++c) {
        const float bound = bound_of(s, stage, at[c], depth, rest, squares);
        if (bound < least) {
            least = bound;
            nearest = at[c];
        }
    }
    return nearest;
}

void rbe_encode_stages(const rbe_encoder *s, int64_t depth, const float *v, const rbe_squares *squares, const int *only, float *buffer,
                       int32_t *words) {
    const int64_t stages = s->w->layout.stages, g = s->w->layout.group;
    path beams[2][RBE_ENCODE_BEAM];
    for (int b = 0; b < 2 * RBE_ENCODE_BEAM; ++b) beams[b / RBE_ENCODE_BEAM][b % RBE_ENCODE_BEAM].rest = buffer + b * g;
    float *rest = buffer + 2 * RBE_ENCODE_BEAM * g, *sizes = rest + g;
    path *now = beams[0], *next = beams[1];
    int live = 1;
    now[0].error = size_of(depth, v);
    for (int64_t e = 0; e < depth; ++e) now[0].rest[e] = v[e];
    for (int64_t stage = 0; stage < stages; ++stage) {
        choice best[RBE_ENCODE_BEAM];
        const int kept = continue_beam(s, stage, depth, now, live, squares, only[stage], sizes, best);
        for (int b = 0; b < kept; ++b) {
            const path *from = &now[best[b].tag / RBE_BASIS_VECTORS];
            for (int64_t t = 0; t < stage; ++t) next[b].words[t] = from->words[t];
            next[b].words[stage] = fitted(s, stage, best[b].tag % RBE_BASIS_VECTORS, depth, from->rest, squares);
            add_vector(s, stage, next[b].words[stage], depth, -1.0f, from->rest, next[b].rest);
            next[b].error = size_of(depth, next[b].rest);
        }
        path *swap = now;
        now = next;
        next = swap;
        live = kept;
    }
    path *winner = now;
    for (int b = 1; b < live; ++b)
        if (now[b].error < winner->error) winner = &now[b];
    for (int round = 0, improved = 1; improved && round < ROUNDS; ++round) {
        improved = 0;
        for (int64_t stage = 0; stage < stages; ++stage) {
            add_vector(s, stage, winner->words[stage], depth, 1.0f, winner->rest, rest);
            const int j = only[stage] < 0 ? nearest(s, stage, depth, rest, squares, sizes) : only[stage];
            const uint32_t word = fitted(s, stage, j, depth, rest, squares);
            add_vector(s, stage, word, depth, -1.0f, rest, rest);
            const double error = size_of(depth, rest);
            if (error < winner->error * (1 - 1e-6)) {
                winner->words[stage] = word;
                winner->error = error;
                for (int64_t e = 0; e < depth; ++e) winner->rest[e] = rest[e];
                improved = 1;
            }
        }
    }
    for (int64_t stage = 0; stage < stages; ++stage) words[stage] = (int32_t)winner->words[stage];
}
