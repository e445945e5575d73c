// The codes of a group of rbe16s (a vector and eight signs) under a metric: least |v - (sum of s o b) F|^2.
//
// Signs do not pass through F, so no table of transformed vectors helps. An idx is ranked by the metric's diagonal, where the best sign of an
// element is that of the target; for the best few the signs are then flipped one at a time while that lowers the true error.
#include <math.h>

#include "encode.h"

enum { CANDIDATES = 12, FLIP_ROUNDS = 4, STAGE_ROUNDS = 3 };

typedef struct metric {
    int64_t depth;
    const double *factor;                  // F [depth, depth], upper triangular
    double square[RBE_ENCODE_SIGNS];       // |row i of F|^2, the diagonal of F F^T
    const double *columns;                 // the basis element-major [M, g, 256]
} metric;

// rest += sign * (s o b) F
static void add_signed(const rbe_weight *w, const metric *f, int64_t stage, uint32_t word, double sign, double *rest) {
    for (int64_t i = 0; i < f->depth; ++i) {
        const double b = rbe_real_at(w->basis, w->real, (stage * RBE_BASIS_VECTORS + rbe_word_idx(word)) * RBE_ENCODE_SIGNS + i);
        const double value = sign * (word >> i & 1 ? -b : b);
        for (int64_t j = i; j < f->depth; ++j) rest[j] += value * f->factor[i * f->depth + j];
    }
}

static double square_of(int64_t depth, const double *v) {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e) sum += v[e] * v[e];
    return sum;
}

// Flips the word's signs while one flip lowers |rest|^2, where rest = v - (s o b) F; returns |rest|^2.
static double flip(const rbe_weight *w, const metric *f, int64_t stage, uint32_t *word, double *rest) {
    for (int round = 0, flipped = 1; flipped && round < FLIP_ROUNDS; ++round) {
        flipped = 0;
        for (int64_t i = 0; i < f->depth; ++i) {
            const double *row = f->factor + i * f->depth;
            const double b = rbe_real_at(w->basis, w->real, (stage * RBE_BASIS_VECTORS + rbe_word_idx(*word)) * RBE_ENCODE_SIGNS + i);
            const double value = *word >> i & 1 ? -b : b;
            double along = 0;
            for (int64_t j = i; j < f->depth; ++j) along += rest[j] * row[j];
            if (4 * value * along + 4 * value * value * f->square[i] < -1e-12 * f->square[i] * value * value) {
                for (int64_t j = i; j < f->depth; ++j) rest[j] += 2 * value * row[j];
                *word ^= 1u << i;
                flipped = 1;
            }
        }
    }
    return square_of(f->depth, rest);
}

// What every idx of a stage leaves of the target by the metric's diagonal.
HOT static void rank(const metric *f, const double *target, const double *columns, double *value) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) value[j] = 0;
    for (int64_t i = 0; i < f->depth; ++i, columns += RBE_BASIS_VECTORS) {
        const double size = fabs(target[i]), square = f->square[i];
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
            const double left = size - fabs(columns[j]);
            value[j] += square * left * left;
        }
    }
}

// The best code of one stage for v; leaves v - (s o b) F in rest and returns its square.
static double choose(const rbe_weight *w, const metric *f, int64_t stage, const double *v, uint32_t *word, double *rest) {
    double target[RBE_ENCODE_SIGNS], bound[CANDIDATES], values[RBE_BASIS_VECTORS], least = INFINITY;
    int idx[CANDIDATES], kept = 0;
    for (int64_t j = 0; j < f->depth; ++j) {  // target F = v
        double left = v[j];
        for (int64_t i = 0; i < j; ++i) left -= target[i] * f->factor[i * f->depth + j];
        target[j] = left / f->factor[j * f->depth + j];
    }
    rank(f, target, f->columns + stage * RBE_ENCODE_SIGNS * RBE_BASIS_VECTORS, values);
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
        const double value = values[j];
        if (kept == CANDIDATES && !(value < bound[CANDIDATES - 1])) continue;
        int at = kept < CANDIDATES ? kept++ : CANDIDATES - 1;
        for (; at > 0 && value < bound[at - 1]; --at) {
            bound[at] = bound[at - 1];
            idx[at] = idx[at - 1];
        }
        bound[at] = value;
        idx[at] = j;
    }
    for (int c = 0; c < kept; ++c) {
        uint32_t tried = (uint32_t)idx[c] << RBE_IDX_SHIFT;
        double left[RBE_ENCODE_SIGNS];
        for (int64_t i = 0; i < f->depth; ++i) {
            left[i] = v[i];
            tried |= (uint32_t)(target[i] * rbe_real_at(w->basis, w->real, (stage * RBE_BASIS_VECTORS + idx[c]) * RBE_ENCODE_SIGNS + i) < 0) << i;
        }
        add_signed(w, f, stage, tried, -1, left);
        const double error = flip(w, f, stage, &tried, left);
        if (error < least) {
            least = error;
            *word = tried;
            for (int64_t i = 0; i < f->depth; ++i) rest[i] = left[i];
        }
    }
    return least;
}

void rbe_encode_signs(const rbe_weight *w, int64_t depth, const double *factor, const double *columns, const double *v, int32_t *words) {
    metric f = {.depth = depth, .factor = factor, .columns = columns};
    double rest[RBE_ENCODE_SIGNS], error = 0;
    for (int64_t i = 0; i < depth; ++i) {
        rest[i] = v[i];
        for (int64_t j = i; j < depth; ++j) f.square[i] += factor[i * depth + j] * factor[i * depth + j];
    }
    const int64_t stages = w->layout.stages;
    for (int64_t stage = 0; stage < stages; ++stage) {
        double left[RBE_ENCODE_SIGNS];
        uint32_t word = 0;
        error = choose(w, &f, stage, rest, &word, left);
        words[stage] = (int32_t)word;
        for (int64_t i = 0; i < depth; ++i) rest[i] = left[i];
    }
    for (int round = 0; stages > 1 && round < STAGE_ROUNDS; ++round) {
        for (int64_t stage = 0; stage < stages; ++stage) {
            double v_stage[RBE_ENCODE_SIGNS], left[RBE_ENCODE_SIGNS];
            uint32_t word = 0;
            for (int64_t i = 0; i < depth; ++i) v_stage[i] = rest[i];
            add_signed(w, &f, stage, (uint32_t)words[stage], 1, v_stage);
            const double tried = choose(w, &f, stage, v_stage, &word, left);
            if (tried < error) {
                error = tried;
                words[stage] = (int32_t)word;
                for (int64_t i = 0; i < depth; ++i) rest[i] = left[i];
            }
        }
    }
}
