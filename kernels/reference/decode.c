// What one code means: word -> float32 scale, amplitude -> word, and the slope of the scale in the amplitude.
//
//     scale = (-1)^sign (T[amp] + (T[amp+1] - T[amp]) amp_fine / 1024)      every operation rounded to float32, no FMA (-ffp-contract=off)
//
// An amplitude a is sign = a < 0, u = min(|a|, 1 - 2^-18), rounded half up to a multiple of 2^-8 (rbe22, rbe9r) or 2^-18 (rbe32); rbe4r and rbe2r cut
// [0, 1) into 8 or 2 cells and take the middle of the one that u is in.
#include <float.h>
#include <math.h>

#include "reference.h"

static_assert(FLT_EVAL_METHOD == 0, "float32 arithmetic must round every operation (no x87)");

static const double largest_u = 1.0 - 0x1p-18;

float rbe_reference_scale(rbe_field field, uint32_t word) {
    if (!rbe_field_has_scale(field)) return 1.0f;
    const float *point = rbe_curve_table[rbe_word_curve(word)] + rbe_word_amp(word);
    const float step = point[1] - point[0];
    const float inside = step * ((float)rbe_word_fine(word) / 1024.0f);
    const float value = point[0] + inside;
    return rbe_word_sign(word) ? -value : value;
}

uint32_t rbe_reference_amplitude_word(rbe_field field, uint32_t word, double a) {
    const int unstored = rbe_field_amp_unstored(field);
    const uint32_t steps = field == RBE_FIELD_RBE32 ? 1u << 18 : 1u << (8 - unstored);
    const double scaled = fmin(fabs(a), largest_u) * steps, whole = floor(scaled);  // both exact
    uint32_t k = (uint32_t)whole + (scaled - whole >= 0.5 && !unstored);            // scaled + 0.5 could round
    if (k > steps - 1) k = steps - 1;
    if (unstored) k = k << unstored | 1u << (unstored - 1);
    const uint32_t amp = field == RBE_FIELD_RBE32 ? k >> 10 : k, fine = field == RBE_FIELD_RBE32 ? k & 1023u : 0u;
    const uint32_t kept = word & ~(1023u << RBE_FINE_SHIFT | 1u << RBE_SIGN_SHIFT | 255u << RBE_AMP_SHIFT);
    return kept | fine << RBE_FINE_SHIFT | (uint32_t)(a < 0.0) << RBE_SIGN_SHIFT | amp << RBE_AMP_SHIFT;
}

double rbe_reference_amplitude_scale(rbe_field field, uint32_t word, double a, bool rounded) {
    if (isnan(a)) return a;
    if (rounded) return rbe_reference_scale(field, rbe_reference_amplitude_word(field, word, a));
    const double u256 = fmin(fabs(a), largest_u) * 256.0;
    const int amp = (int)u256;
    const float *point = rbe_curve_table[rbe_word_curve(word)] + amp;
    const double value = point[0] + ((double)point[1] - point[0]) * (u256 - amp);
    return a < 0.0 ? -value : value;
}

double rbe_reference_amplitude_slope(rbe_field field, uint32_t word, double a, bool rounded) {
    if (isnan(a)) return a;
    const uint32_t amp =
        rounded ? rbe_word_amp(rbe_reference_amplitude_word(field, word, a)) : (uint32_t)(fmin(fabs(a), largest_u) * 256.0);
    const float *point = rbe_curve_table[rbe_word_curve(word)] + amp;
    return 256.0 * ((double)point[1] - point[0]);  // d scale/d|a| and d|a|/da both carry the sign, which cancels
}

double rbe_reference_amplitude_gradient(rbe_field field, uint32_t word, double a, bool rounded, double dscale) {
    const double gradient = dscale * rbe_reference_amplitude_slope(field, word, a, rounded);
    return fabs(a) >= 1.0 && a * gradient < 0.0 ? 0.0 : gradient;
}
