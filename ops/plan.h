// Which path a product takes.
#ifndef RBE_PLAN_H
#define RBE_PLAN_H

#include "../kernels/kernels.h"
#include "rbe.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum rbe_path {
    RBE_PATH_PLANNED,      // as the cost model says
    RBE_PATH_TABLE,        // P for a tile of tokens, then a sum over codes
    RBE_PATH_TABLE_HALF,   // the same in float16
    RBE_PATH_TABLE_TOKEN,  // a few tokens: P token by token, gathered
    RBE_PATH_LUT8,         // P in bytes
    RBE_PATH_FEW,          // P for 4 or 8 tokens in L1
    RBE_PATH_LOOKUP,       // W from the basis in L1, multiplied on the way
    RBE_PATH_LOOKUP_SPLIT, // the same, multiplied on the matrix unit
    RBE_PATH_DIGITS,       // digits of bytes on the matrix unit
    RBE_PATH_DECODE_DOT,   // a decoded row against few tokens
    RBE_PATH_DECODE,       // a decoded tile in a dense product
} rbe_path;

// How codes are given.
typedef enum rbe_form { RBE_FORM_WORDS, RBE_FORM_PACKED, RBE_FORM_INTERLEAVED } rbe_form;

rbe_path rbe_plan_linear(const rbe_kernels *kernels, const rbe_layout *layout, int64_t rows, int64_t cols, int64_t tokens, bool fast,
                         rbe_form form);
rbe_path rbe_plan_backward(const rbe_kernels *kernels, const rbe_layout *layout, int64_t rows, int64_t cols, int64_t tokens, bool fast);

// Whether a product of these activations may round tables and weights: auto is exact for float32 and fast for the half types.
static inline bool rbe_is_fast(rbe_accuracy accuracy, rbe_dtype x) {
    return accuracy == RBE_ACCURACY_FAST || (accuracy == RBE_ACCURACY_AUTO && (x == RBE_BF16 || x == RBE_F16));
}

// Digits of W on the path of digits: one where making it dominates, unless the stages leave a digit too few steps.
int rbe_weight_digits(const rbe_layout *layout, int64_t tokens);

// From now on this path wherever the layout has it, for tests: not while a product is computed.
void rbe_use_path(rbe_path path);

#ifdef __cplusplus
}
#endif
#endif
