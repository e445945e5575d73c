// The codes of a group with several stages: a beam over the stages in float32, then every stage again against what the others leave, until none
// improves. Sums run over e, vectors over j, and no operation is fused.
#include <math.h>

#include "encode.h"

enum { ROUNDS = 4 };

HOT static void dots32(int64_t depth, const float *v, const float *basis, float *out) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] = 0;
    for (int64_t e = 0; e < depth; ++e, basis += RBE_BASIS_VECTORS)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] += v[e] * basis[j];
}

typedef struct path {
    uint32_t words[RBE_ENCODE_STAGES];
    double error;
    float *rest;  // what the stages so far leave of v
} path;

typedef struct choice {
    float bound;
    int from, idx;
} choice;

// to = from + factor * vector(word)
static void add_vector(const rbe_encoder *s, int64_t stage, uint32_t word, int64_t depth, float factor, const float *from, float *to) {
    const bool signs = s->w->layout.field == RBE_FIELD_RBE16S;
    const float scale = factor * rbe_reference_scale(s->w->layout.field, word);
    for (int64_t e = 0; e < depth; ++e) {
        const float b = scale * (float)rbe_encoder_element(s, stage, rbe_word_idx(word), e);
        to[e] = from[e] + (signs && (word >> e & 1) ? -b : b);
    }
}

HOT static void bounds_plain(const float *square, float *bound) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) bound[j] = square[j] - 2 * bound[j];
}

HOT static void bounds_scaled(const float *square, float *bound) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) bound[j] = square[j] > 0 ? -bound[j] * bound[j] / square[j] : 0.0f;
}

// The first of the smallest. Lanes first: a running minimum of sixteen columns vectorises, one of all numbers does not.
HOT static int smallest(const float *bound) {
    float least[16];
    for (int l = 0; l < 16; ++l) least[l] = bound[l];
    for (int j = 16; j < RBE_BASIS_VECTORS; j += 16)
        for (int l = 0; l < 16; ++l) least[l] = bound[j + l] < least[l] ? bound[j + l] : least[l];
    float low = least[0];
    for (int l = 1; l < 16; ++l) low = least[l] < low ? least[l] : low;
    int at = 0;
    while (at < RBE_BASIS_VECTORS - 1 && bound[at] != low) ++at;
    return at;
}

// How many of the 32 numbers are below the limit.
HOT static int below(const float *bound, float limit) {
    int count = 0;
    for (int l = 0; l < 32; ++l) count += bound[l] < limit;
    return count;
}

// The error that every idx of a stage would add to |rest|^2 with its best unquantised scale.
static void bounds(const rbe_encoder *s, int64_t stage, int64_t depth, const float *rest, const float *square, float *bound) {
    const rbe_field field = s->w->layout.field;
    float size[RBE_ENCODE_SIGNS];
    if (field == RBE_FIELD_RBE16S)
        for (int64_t e = 0; e < depth; ++e) size[e] = fabsf(rest[e]);
    dots32(depth, field == RBE_FIELD_RBE16S ? size : rest, s->basis32 + stage * s->w->layout.group * RBE_BASIS_VECTORS, bound);
    const bool scaled = rbe_field_has_scale(field);
    (scaled ? bounds_scaled : bounds_plain)(square + stage * RBE_BASIS_VECTORS, bound);
}

static double size_of(int64_t depth, const float *v) {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e) sum += (double)v[e] * v[e];
    return sum;
}

// The word of idx j against `rest`, with the scale that fits it best.
static uint32_t fitted(const rbe_encoder *s, int64_t stage, int j, int64_t depth, const float *rest, const float *square) {
    double v[RBE_ENCODE_SIGNS], dot = 0, error;
    const bool sizes = s->w->layout.field == RBE_FIELD_RBE16S;
    for (int64_t e = 0; e < depth; ++e) {
        const double b = rbe_encoder_element(s, stage, j, e), value = rest[e];
        if (e < RBE_ENCODE_SIGNS) v[e] = value;
        dot += sizes ? fabs(value * b) : value * b;
    }
    return rbe_encoder_word(s, stage, j, depth, v, dot, square[stage * RBE_BASIS_VECTORS + j], &error);
}

static int keep_choices(choice *best, int kept, int from, float base, const float *bound, int only) {
    const int end = only < 0 ? RBE_BASIS_VECTORS : only + 1;
    for (int j = only < 0 ? 0 : only; j < end; ++j) {
        if (kept == RBE_ENCODE_BEAM && only < 0 && j % 32 == 0) {  // most stretches hold nothing that could enter
            while (j < end && !below(bound + j, best[RBE_ENCODE_BEAM - 1].bound - base)) j += 32;
            if (j >= end) break;
        }
        const float value = base + bound[j];
        if (kept == RBE_ENCODE_BEAM && !(value < best[RBE_ENCODE_BEAM - 1].bound)) continue;
        int at = kept < RBE_ENCODE_BEAM ? kept++ : RBE_ENCODE_BEAM - 1;
        for (; at > 0 && value < best[at - 1].bound; --at) best[at] = best[at - 1];
        best[at] = (choice){value, from, j};
    }
    return kept;
}

void rbe_encode_stages(const rbe_encoder *s, int64_t depth, const float *v, const float *square, const int *only, float *buffer, int32_t *words) {
    const int64_t stages = s->w->layout.stages, g = s->w->layout.group;
    path beams[2][RBE_ENCODE_BEAM];
    for (int b = 0; b < 2 * RBE_ENCODE_BEAM; ++b) beams[b / RBE_ENCODE_BEAM][b % RBE_ENCODE_BEAM].rest = buffer + b * g;
    float *rest = buffer + 2 * RBE_ENCODE_BEAM * g, bound[RBE_BASIS_VECTORS];
    path *now = beams[0], *next = beams[1];
    int live = 1;
    now[0].error = size_of(depth, v);
    for (int64_t e = 0; e < depth; ++e) now[0].rest[e] = v[e];
    for (int64_t stage = 0; stage < stages; ++stage) {
        choice best[RBE_ENCODE_BEAM];
        int kept = 0;
        for (int b = 0; b < live; ++b) {
            bounds(s, stage, depth, now[b].rest, square, bound);
            kept = keep_choices(best, kept, b, (float)now[b].error, bound, only[stage]);
        }
        for (int b = 0; b < kept; ++b) {
            const path *from = &now[best[b].from];
            for (int64_t t = 0; t < stage; ++t) next[b].words[t] = from->words[t];
            next[b].words[stage] = fitted(s, stage, best[b].idx, depth, from->rest, square);
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
            int j = only[stage];
            if (j < 0) {
                bounds(s, stage, depth, rest, square, bound);
                j = smallest(bound);
            }
            const uint32_t word = fitted(s, stage, j, depth, rest, square);
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
