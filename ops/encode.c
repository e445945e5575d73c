// rbe_encode: the codes that come nearest to a weight.
//
// One stage: the joint minimum of |v - scale b_j|^2 over idx j and scale, v = w / gain, in float64; ties to the lowest word. With
// t = <v, b> / |b|^2 the error is |v|^2 - t^2 |b|^2 + |b|^2 (scale - t)^2, so an idx is tried only if its error at scale = t can win.
//
// More stages: a beam over the stages in float32, then every stage again against what the others leave, until none improves. The order of the
// float operations is fixed (sums run over e, vectors over j, no fused operations), so codes do not depend on the ISA or the threads.
#include <math.h>

#include "../kernels/reference/reference.h"
#include "encode_scale.h"
#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HOT __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HOT
#endif

// stages a layout may have, and the elements of a group whose signs matter (rbe16s)
enum { BEAM = 8, ROUNDS = 4, RBE_ENCODE_STAGES = 16, RBE_ENCODE_WIDE = 8 };

typedef struct encoder {
    const rbe_weight *w;
    const rbe_matrix *dense;
    int32_t *words;
    double *basis;       // [M, g, 256], element-major; |basis| for rbe16s
    float *basis32;      // the same in float32
    double *square;      // [M, 256], |b|^2 over a whole group
    double *square_end;  // over the columns of a ragged last group
    float *square32, *square_end32;
    double unit;  // a power of two that brings the basis near 1, so that squares stay inside float32
    atomic_bool failed;
} encoder;

static double real_at(const void *data, rbe_dtype real, int64_t i) {
    return real == RBE_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

HOT static void dots64(int64_t depth, const double *v, const double *basis, double *out) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] = 0;
    for (int64_t e = 0; e < depth; ++e, basis += RBE_BASIS_VECTORS)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] += v[e] * basis[j];
}

HOT static void dots32(int64_t depth, const float *v, const float *basis, float *out) {
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] = 0;
    for (int64_t e = 0; e < depth; ++e, basis += RBE_BASIS_VECTORS)
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[j] += v[e] * basis[j];
}

static double original(const encoder *s, int64_t stage, int64_t j, int64_t e) {
    const int64_t g = s->w->layout.group;
    return s->unit * real_at(s->w->basis, s->w->real, (stage * RBE_BASIS_VECTORS + j) * g + e);
}

static uint32_t signs_of(const encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v) {
    uint32_t signs = 0;
    for (int64_t e = 0; e < depth; ++e) signs |= (uint32_t)(v[e] * original(s, stage, j, e) < 0) << e;
    return signs;
}

// The word with the best scale for idx j, dot = <v, b_j>; *error: what it adds to |v|^2.
static uint32_t word_for(const encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v, double dot, double square, double *error) {
    const rbe_field field = s->w->layout.field;
    const uint32_t idx = (uint32_t)j << RBE_IDX_SHIFT;
    if (field == RBE_FIELD_RBE8 || field == RBE_FIELD_RBE16S) {
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

// ---- one stage, exact ---------------------------------------------------------------------------------------------------------
static uint32_t best_word(const encoder *s, int64_t depth, const double *v, const double *square, int only) {
    const bool scaled = s->w->layout.field != RBE_FIELD_RBE8 && s->w->layout.field != RBE_FIELD_RBE16S;
    double dot[RBE_BASIS_VECTORS], bound[RBE_BASIS_VECTORS], size[RBE_ENCODE_WIDE];
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
    uint32_t best = word_for(s, 0, first, depth, v, dot[first], square[first], &least);
    if (only >= 0) return best;
    for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
        if (j == first || bound[j] > least) continue;
        const uint32_t word = word_for(s, 0, j, depth, v, dot[j], square[j], &error);
        if (error < least || (error == least && word < best)) {
            best = word;
            least = error;
        }
    }
    return best;
}

// ---- several stages, beam -----------------------------------------------------------------------------------------------------
typedef struct path {
    uint32_t words[RBE_ENCODE_STAGES];
    double error;
    float *rest;  // what the stages so far leave of v
} path;

typedef struct choice {
    float bound;
    int from, idx;
} choice;

static double scale_of(const encoder *s, uint32_t word) {
    const rbe_field field = s->w->layout.field;
    return field == RBE_FIELD_RBE8 || field == RBE_FIELD_RBE16S ? 1.0 : (double)rbe_reference_scale(field, word);
}

// to = from + factor * vector(word)
static void add_vector(const encoder *s, int64_t stage, uint32_t word, int64_t depth, float factor, const float *from, float *to) {
    const bool signs = s->w->layout.field == RBE_FIELD_RBE16S;
    const float scale = factor * (float)scale_of(s, word);
    for (int64_t e = 0; e < depth; ++e) {
        const float b = scale * (float)original(s, stage, rbe_word_idx(word), e);
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
static void bounds(const encoder *s, int64_t stage, int64_t depth, const float *rest, const float *square, float *bound) {
    const rbe_field field = s->w->layout.field;
    float size[8];
    if (field == RBE_FIELD_RBE16S)
        for (int64_t e = 0; e < depth; ++e) size[e] = fabsf(rest[e]);
    dots32(depth, field == RBE_FIELD_RBE16S ? size : rest, s->basis32 + stage * s->w->layout.group * RBE_BASIS_VECTORS, bound);
    const bool scaled = field != RBE_FIELD_RBE8 && field != RBE_FIELD_RBE16S;
    (scaled ? bounds_scaled : bounds_plain)(square + stage * RBE_BASIS_VECTORS, bound);
}

static double size_of(int64_t depth, const float *v) {
    double sum = 0;
    for (int64_t e = 0; e < depth; ++e) sum += (double)v[e] * v[e];
    return sum;
}

// The word of idx j against `rest`, with the scale that fits it best.
static uint32_t fitted(const encoder *s, int64_t stage, int j, int64_t depth, const float *rest, const float *square) {
    double v[RBE_ENCODE_WIDE], dot = 0, error;
    const bool sizes = s->w->layout.field == RBE_FIELD_RBE16S;
    for (int64_t e = 0; e < depth; ++e) {
        const double b = original(s, stage, j, e), value = rest[e];
        if (e < RBE_ENCODE_WIDE) v[e] = value;
        dot += sizes ? fabs(value * b) : value * b;
    }
    return word_for(s, stage, j, depth, v, dot, square[stage * RBE_BASIS_VECTORS + j], &error);
}

static int keep_choices(choice *best, int kept, int from, float base, const float *bound, int only) {
    const int end = only < 0 ? RBE_BASIS_VECTORS : only + 1;
    for (int j = only < 0 ? 0 : only; j < end; ++j) {
        if (kept == BEAM && only < 0 && j % 32 == 0) {  // most stretches hold nothing that could enter
            while (j < end && !below(bound + j, best[BEAM - 1].bound - base)) j += 32;
            if (j >= end) break;
        }
        const float value = base + bound[j];
        if (kept == BEAM && !(value < best[BEAM - 1].bound)) continue;
        int at = kept < BEAM ? kept++ : BEAM - 1;
        for (; at > 0 && value < best[at - 1].bound; --at) best[at] = best[at - 1];
        best[at] = (choice){value, from, j};
    }
    return kept;
}

// words: [M]. buffer: (2 BEAM + 1) * g floats.
static void best_words(const encoder *s, int64_t depth, const float *v, const float *square, const int *only, float *buffer, int32_t *words) {
    const int64_t stages = s->w->layout.stages, g = s->w->layout.group;
    path beams[2][BEAM];
    for (int b = 0; b < 2 * BEAM; ++b) beams[b / BEAM][b % BEAM].rest = buffer + b * g;
    float *rest = buffer + 2 * BEAM * g, bound[RBE_BASIS_VECTORS];
    path *now = beams[0], *next = beams[1];
    int live = 1;
    now[0].error = size_of(depth, v);
    for (int64_t e = 0; e < depth; ++e) now[0].rest[e] = v[e];
    for (int64_t stage = 0; stage < stages; ++stage) {
        choice best[BEAM];
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

// ---- rows -----------------------------------------------------------------------------------------------------------------------
static void encode_rows(int64_t begin, int64_t end, void *context) {
    encoder *s = context;
    const rbe_weight *w = s->w;
    const int64_t g = w->layout.group, stages = w->layout.stages;
    const bool seeded = w->layout.field == RBE_FIELD_RBE9R;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    double *v = rbe_scratch_take(g, sizeof *v);
    float *v32 = rbe_scratch_take(g, sizeof *v32), *buffer = rbe_scratch_take((2 * BEAM + 1) * g, sizeof *buffer);
    if (!v || !v32 || !buffer) {
        atomic_store(&s->failed, true);
        rbe_scratch_end(mark);
        return;
    }
    for (int64_t i = begin; i < end; ++i) {
        const double gain = real_at(w->gain, w->real, i);
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
                v[e] = real_at(s->dense->data, s->dense->dtype, i * s->dense->row_stride + (k * g + e) * s->dense->col_stride) / gain * s->unit;
                v32[e] = (float)v[e];
            }
            if (stages == 1) words[0] = (int32_t)best_word(s, depth, v, square, only[0]);
            else best_words(s, depth, v32, depth == g ? s->square32 : s->square_end32, only, buffer, words);
        }
    }
    rbe_scratch_end(mark);
}

static rbe_status check(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err) {
    const rbe_layout *l = &w->layout;
    if (l->stages < 1 || l->stages > RBE_ENCODE_STAGES || l->group < 1 || (l->field == RBE_FIELD_RBE16S && l->group != RBE_ENCODE_WIDE))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: has %d stages and groups of %d; must have 1 to %d stages, groups of at least 1, and of 8 for rbe16s",
                        (int)l->stages, (int)l->group, RBE_ENCODE_STAGES);
    if (w->rows < 0 || w->cols < 0 || w->groups != (w->cols + l->group - 1) / l->group)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "groups: was %lld; must be those of %lld columns", (long long)w->groups, (long long)w->cols);
    if (!words || !w->basis || !w->gain || !dense || (!dense->data && w->rows && w->cols))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "words, basis, gain or weight: is NULL; must not be");
    if (dense->dtype != RBE_F32 && dense->dtype != RBE_F64) return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: must be float32 or float64");
    if (dense->rows != w->rows || dense->cols != w->cols)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: is %lld x %lld; must be %lld x %lld", (long long)dense->rows, (long long)dense->cols,
                        (long long)w->rows, (long long)w->cols);
    for (int64_t i = 0; i < w->rows; ++i) {
        if (!isfinite(real_at(w->gain, w->real, i))) return rbe_fail(err, RBE_BAD_ARGUMENT, "gain: row %lld is not finite; must be", (long long)i);
        for (int64_t j = 0; j < w->cols; ++j)
            if (!isfinite(real_at(dense->data, dense->dtype, i * dense->row_stride + j * dense->col_stride)))
                return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: element [%lld, %lld] is not finite; must be", (long long)i, (long long)j);
    }
    const int64_t size = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    for (int64_t i = 0; i < size; ++i)
        if (!isfinite(real_at(w->basis, w->real, i))) return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: holds values that are not finite; must not");
    return RBE_OK;
}

static double unit_of(const rbe_weight *w) {
    double most = 0;
    const int64_t size = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    for (int64_t i = 0; i < size; ++i) {  // not fmax: GCC 12 for aarch64 fails on its reduction
        const double value = fabs(real_at(w->basis, w->real, i));
        most = value > most ? value : most;
    }
    return most > 0 ? ldexp(1.0, -ilogb(most)) : 1.0;
}

rbe_status rbe_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = check(w, dense, words, err);
    if (status != RBE_OK) return status;
    const int64_t g = w->layout.group, stages = w->layout.stages, size = stages * g * RBE_BASIS_VECTORS;
    const int64_t ragged = w->cols - (w->groups - 1) * g;
    const bool sizes = w->layout.field == RBE_FIELD_RBE16S;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    encoder s = {.w = w, .dense = dense, .words = words, .unit = unit_of(w)};
    s.basis = rbe_scratch_take(size, sizeof *s.basis);
    s.basis32 = rbe_scratch_take(size, sizeof *s.basis32);
    s.square = rbe_scratch_take(stages * RBE_BASIS_VECTORS, sizeof *s.square);
    s.square_end = rbe_scratch_take(stages * RBE_BASIS_VECTORS, sizeof *s.square_end);
    s.square32 = rbe_scratch_take(stages * RBE_BASIS_VECTORS, sizeof *s.square32);
    s.square_end32 = rbe_scratch_take(stages * RBE_BASIS_VECTORS, sizeof *s.square_end32);
    if (!s.basis || !s.basis32 || !s.square || !s.square_end || !s.square32 || !s.square_end32) {
        status = rbe_out_of_memory(err);
    } else {
        for (int64_t t = 0; t < stages; ++t) {
            for (int64_t j = 0; j < RBE_BASIS_VECTORS; ++j) {
                double square = 0, end = 0;
                for (int64_t e = 0; e < g; ++e) {
                    const double b = original(&s, t, j, e);
                    s.basis[(t * g + e) * RBE_BASIS_VECTORS + j] = sizes ? fabs(b) : b;
                    s.basis32[(t * g + e) * RBE_BASIS_VECTORS + j] = (float)(sizes ? fabs(b) : b);
                    square += b * b;
                    if (e < ragged) end += b * b;
                }
                s.square[t * RBE_BASIS_VECTORS + j] = square;
                s.square_end[t * RBE_BASIS_VECTORS + j] = end;
                s.square32[t * RBE_BASIS_VECTORS + j] = (float)square;
                s.square_end32[t * RBE_BASIS_VECTORS + j] = (float)end;
            }
        }
        rbe_run(threads, w->rows, rbe_share(threads, w->rows, 1), encode_rows, &s);
        if (atomic_load(&s.failed)) status = rbe_out_of_memory(err);
    }
    rbe_scratch_end(mark);
    return status;
}
