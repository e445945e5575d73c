// The scalar specification: what a code means and what a layer computes, as plainly as C allows. SIMD and CUDA kernels are compared with
// it.
//
// Nothing here allocates, checks arguments (ops/ did) or keeps state. Products are computed in float64 from the float32 scales.
#ifndef RBE_REFERENCE_H
#define RBE_REFERENCE_H

#include "../../ops/rbe.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- codes (decode.c) -------------------------------------------------------------------------------------------------------
// Bit-exact float32 scale of a word, sign included; 1 for rbe8 and rbe16s. fine is 0 in words of every layout but rbe32.
float rbe_reference_scale(rbe_field field, uint32_t word);

// The word with sign, amp and amp_fine of amplitude a: layouts whose codes have a scale only. a must not be NaN.
uint32_t rbe_reference_amplitude_word(rbe_field field, uint32_t word, double a);

// The scale that amplitude a gives: that of the word above, or (not rounded) the table interpolated at |a| in float64. NaN stays NaN.
double rbe_reference_amplitude_scale(rbe_field field, uint32_t word, double a, bool rounded);

// d scale / d a: the slope of the cell that u = |a| lies in after rounding (or without it). NaN stays NaN.
double rbe_reference_amplitude_slope(rbe_field field, uint32_t word, double a, bool rounded);

// dscale * slope, or zero where |a| >= 1 and descent would increase |a|.
double rbe_reference_amplitude_gradient(rbe_field field, uint32_t word, double a, bool rounded, double dscale);

// ---- tensors (convert.c) ----------------------------------------------------------------------------------------------------
float rbe_reference_bf16_to_f32(uint16_t bits);
float rbe_reference_f16_to_f32(uint16_t bits);
float rbe_reference_e4m3fn_to_f32(uint8_t bits);
uint16_t rbe_reference_f64_to_bf16(double x);  // one rounding, to nearest even; NaN stays NaN
uint16_t rbe_reference_f64_to_f16(double x);

double rbe_reference_load(const void *data, rbe_dtype dtype, int64_t index);
void rbe_reference_store(void *data, rbe_dtype dtype, int64_t index, double value);
static inline double rbe_reference_at(const rbe_matrix *a, int64_t row, int64_t col) {
    return rbe_reference_load(a->data, a->dtype, row * a->row_stride + col * a->col_stride);
}

// ---- weights (weight.c) -----------------------------------------------------------------------------------------------------
// The interchange word of code [row, group, stage], from words or packed bytes; the amplitude is not put in.
uint32_t rbe_reference_word(const rbe_weight *w, int64_t row, int64_t group, int64_t stage);

// Its scale with the amplitude, if there is one.
double rbe_reference_code_scale(const rbe_weight *w, int64_t row, int64_t group, int64_t stage);

// Element e of vector(code) without the scale: the basis vector's, negated where rbe16s says so.
double rbe_reference_code_element(const rbe_weight *w, int64_t row, int64_t group, int64_t stage, int64_t e);

// W[row, col], residual included.
double rbe_reference_element(const rbe_weight *w, int64_t row, int64_t col);

// The residual's part of W[row, col].
double rbe_reference_residual(const rbe_weight *w, int64_t row, int64_t col);

// Entries a row of a sparse residual.
int64_t rbe_reference_sparse_count(const rbe_weight *w);

// ---- operations (linear.c) --------------------------------------------------------------------------------------------------
void rbe_reference_decode(const rbe_weight *w, void *dense);  // m x n of type w->real
void rbe_reference_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y);
void rbe_reference_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out);

#ifdef __cplusplus
}
#endif
#endif
