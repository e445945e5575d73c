// What the two searches of rbe_encode share: the weight's basis turned for them, and the word that suits an idx.
#ifndef RBE_ENCODE_H
#define RBE_ENCODE_H

#include <math.h>

#include "../kernels/reference/reference.h"
#include "product.h"

// Clones for wider vectors of loops whose float operations have one order, so that codes do not depend on the ISA.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HOT __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HOT
#endif

enum {
    RBE_ENCODE_BEAM = 8,
    RBE_ENCODE_ROWS = 8,     // rows whose groups are searched together
    RBE_ENCODE_BUFFER = 3 * RBE_ENCODE_BEAM + 2,
    RBE_ENCODE_STAGES = 16,  // a layout has at most
    RBE_ENCODE_DEPTH = 1024, // the largest group of calibrated encoding
    RBE_ENCODE_SIGNS = 8,    // elements of a group whose signs are stored (rbe16s)
};

// |b|^2 of every vector [M, 256] over the columns of a group, and what `scores` wants of it: a half of it, or 1/|b| where codes have a scale.
typedef struct rbe_squares {
    double *square;
    float *square32, *guide;
    double largest[RBE_ENCODE_STAGES];  // of each stage
} rbe_squares;

typedef struct rbe_encoder {
    const rbe_weight *w;
    const rbe_matrix *dense;
    int32_t *words;
    const rbe_kernels *kernels;
    double *columns;  // the basis in units of `unit` [M, g, 256], element-major
    float *columns32; // the same in float32; |basis| for rbe16s
    float *rows32;    // [M, 256, g], signs kept
    rbe_squares whole, end;  // of a whole group, and of a ragged last one
    bool wide;    // float32 does not hold the basis
    double unit;  // a power of two that brings the basis near 1, so that squares stay inside float32
    atomic_bool failed;
} rbe_encoder;

// Element e of basis vector j, in units of s->unit.
static inline double rbe_encoder_element(const rbe_encoder *s, int64_t stage, int64_t j, int64_t e) {
    const int64_t g = s->w->layout.group;
    return s->wide ? s->columns[(stage * g + e) * RBE_BASIS_VECTORS + j] : s->rows32[(stage * RBE_BASIS_VECTORS + j) * g + e];
}

// The word with the best scale for idx j, dot = <v, b_j>; *error: what it adds to |v|^2.
uint32_t rbe_encoder_word(const rbe_encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v, double dot, double square,
                          double *error);

// Arguments of an encoding (encode.c): all that can be said without reading values, and all.
rbe_status rbe_check_encoding_shape(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err);
rbe_status rbe_check_calibration_shape(const rbe_weight *w, const rbe_calibration *c, rbe_error *err);
rbe_status rbe_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err);
// Takes the tables of s->w's shape from scratch; false: out of memory. Fills them and the unit from `columns`, which hold the basis as it is.
bool rbe_encoder_take(rbe_encoder *s);
void rbe_encoder_columns(const rbe_weight *w, double *columns);  // the basis as it is, element-major
void rbe_encoder_fill(rbe_encoder *s);

// Scores are sums in an order of their ISA's own. Two ways of summing a bound |v - b|^2 - |v|^2 in float32 differ by less than this, for |v|^2 and
// |b|^2 at most as given; not a number, or useless, where float32 could overflow or lose all: then every vector is a candidate.
static inline double rbe_encoder_slack(int64_t depth, double target, double vector) {
    const double size = target + vector + 2 * sqrt(target * vector);
    return (double)(2 * depth + 16) * 0x1p-23 * size;
}
static inline bool rbe_encoder_sees(double slack) { return slack > 1e-28 && slack < 1e28; }
// The score that a bound of at most `limit` needs.
static inline float rbe_encoder_reach(bool scaled, double limit) { return (float)(scaled ? limit < 0 ? sqrt(-limit) : 0.0 : -0.5 * limit); }
// The candidates among 256 vectors: those whose score reaches, or all; never none.
static inline int64_t rbe_encoder_candidates(const rbe_encoder *s, bool sees, const float *score, float reach, int32_t *at) {
    const int64_t found = sees ? s->kernels->at_least(score, reach, at) : 0;
    if (found > 0) return found;
    for (int32_t j = 0; j < RBE_BASIS_VECTORS; ++j) at[j] = j;
    return RBE_BASIS_VECTORS;
}

// The codes of a group of up to RBE_ENCODE_ROWS rows: v [rows, g] in units of the basis, of which `depth` elements count; only: the idx of a
// seeded layout [rows, M], else negative; words: where each row's go; buffer: RBE_ENCODE_BUFFER * g floats.
void rbe_encode_group(const rbe_encoder *s, int64_t rows, int64_t depth, const double *v, const rbe_squares *squares, const int *only,
                      float *buffer, int32_t *const *words);
// The same of layouts with one stage (encode_stage.c), and with several, a row at a time (encode_stages.c).
void rbe_encode_stage(const rbe_encoder *s, int64_t rows, int64_t depth, const double *v, const rbe_squares *squares, const int *only,
                      float *buffer, int32_t *const *words);
void rbe_encode_stages(const rbe_encoder *s, int64_t depth, const float *v, const rbe_squares *squares, const int *only, float *buffer,
                       int32_t *words);

// The M codes of a group of rbe16s under a metric (encode_signs.c): least |v - sum of vectors F|^2, F upper triangular [depth, depth].
// columns: the basis of w, element-major [M, g, 256]; v: depth elements, in units of the basis.
void rbe_encode_signs(const rbe_weight *w, int64_t depth, const double *factor, const double *columns, const double *v, int32_t *words);

#endif
