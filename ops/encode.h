// What the two searches of rbe_encode share: the weight's basis turned for them, and the word that suits an idx.
#ifndef RBE_ENCODE_H
#define RBE_ENCODE_H

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
    RBE_ENCODE_STAGES = 16,  // a layout has at most
    RBE_ENCODE_DEPTH = 1024, // the largest group of calibrated encoding
    RBE_ENCODE_SIGNS = 8,    // elements of a group whose signs are stored (rbe16s)
};

typedef struct rbe_encoder {
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
} rbe_encoder;

// Element e of basis vector j, in units of s->unit.
static inline double rbe_encoder_element(const rbe_encoder *s, int64_t stage, int64_t j, int64_t e) {
    const int64_t g = s->w->layout.group;
    return s->unit * rbe_real_at(s->w->basis, s->w->real, (stage * RBE_BASIS_VECTORS + j) * g + e);
}

// The word with the best scale for idx j, dot = <v, b_j>; *error: what it adds to |v|^2.
uint32_t rbe_encoder_word(const rbe_encoder *s, int64_t stage, int64_t j, int64_t depth, const double *v, double dot, double square,
                          double *error);

// Arguments of an encoding (encode.c): all that can be said without reading values, and all.
rbe_status rbe_check_encoding_shape(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err);
rbe_status rbe_check_calibration_shape(const rbe_weight *w, const rbe_calibration *c, rbe_error *err);
rbe_status rbe_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const int32_t *words, rbe_error *err);
// Takes the tables of s->w's shape from scratch; false: out of memory. Fills them and the unit from s->w's basis.
bool rbe_encoder_take(rbe_encoder *s);
void rbe_encoder_fill(rbe_encoder *s);

// The one code of a group (encode_stage.c) and its M codes (encode_stages.c). v: what to encode, depth elements; square: [M, 256], |b|^2 over
// them; only: the idx of a seeded layout, else -1. buffer: (2 BEAM + 1) * g floats.
uint32_t rbe_encode_stage(const rbe_encoder *s, int64_t depth, const double *v, const double *square, int only);
void rbe_encode_stages(const rbe_encoder *s, int64_t depth, const float *v, const float *square, const int *only, float *buffer,
                       int32_t *words);

// The M codes of a group of rbe16s under a metric (encode_signs.c): least |v - sum of vectors F|^2, F upper triangular [depth, depth].
// basis: [M, 256, g] of w; v: depth elements, in units of the basis.
void rbe_encode_signs(const rbe_weight *w, int64_t depth, const double *factor, const double *v, int32_t *words);

#endif
