// Narrow floats to and from wide ones: bfloat16, float16 and float8 e4m3fn, one rounding to nearest even, NaN kept.
//
//     bfloat16   sign 1, exponent 8 (bias 127), mantissa 7          float16   sign 1, exponent 5 (bias 15), mantissa 10
//     e4m3fn     sign 1, exponent 4 (bias 7), mantissa 3; no infinity, 0x7F and 0xFF are NaN
#include <math.h>
#include <string.h>

#include "reference.h"

// sign, exponent and mantissa fields of a narrow float (not its infinity and NaN) as a value
static double widen(uint32_t magnitude, int mantissa_bits, int bias) {
    const int exponent = (int)(magnitude >> mantissa_bits);
    const uint32_t mantissa = magnitude & ((1u << mantissa_bits) - 1);
    if (exponent == 0) return ldexp(mantissa, 1 - bias - mantissa_bits);
    return ldexp(mantissa | 1u << mantissa_bits, exponent - bias - mantissa_bits);
}

// The 15 bits below the sign; infinity from `infinity` on.
static uint16_t narrow(double x, int mantissa_bits, int bias, uint16_t infinity) {
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    if (isnan(x)) return sign | infinity | (uint16_t)(1u << (mantissa_bits - 1));
    if (isinf(x)) return sign | infinity;
    const double size = fabs(x);
    const int smallest = 1 - bias, exponent = size > 0.0 ? ilogb(size) : smallest, place = exponent > smallest ? exponent : smallest;
    const double steps = rint(ldexp(size, mantissa_bits - place));  // of the last place; a carry moves on into the exponent field
    const double bits = steps + ldexp(place - smallest, mantissa_bits);
    return sign | (bits < infinity ? (uint16_t)bits : infinity);
}

float rbe_reference_bf16_to_f32(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

float rbe_reference_f16_to_f32(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFu;
    const double value = magnitude > 0x7C00u ? (double)NAN : magnitude == 0x7C00u ? (double)INFINITY : widen(magnitude, 10, 15);
    return (float)(bits >> 15 ? -value : value);
}

float rbe_reference_e4m3fn_to_f32(uint8_t bits) {
    const uint32_t magnitude = bits & 0x7Fu;
    const double value = magnitude == 0x7Fu ? (double)NAN : widen(magnitude, 3, 7);
    return (float)(bits >> 7 ? -value : value);
}

uint16_t rbe_reference_f64_to_bf16(double x) { return narrow(x, 7, 127, 0x7F80); }
uint16_t rbe_reference_f64_to_f16(double x) { return narrow(x, 10, 15, 0x7C00); }

double rbe_reference_load(const void *data, rbe_dtype dtype, int64_t index) {
    switch (dtype) {
        case RBE_F64: return ((const double *)data)[index];
        case RBE_BF16: return rbe_reference_bf16_to_f32(((const uint16_t *)data)[index]);
        case RBE_F16: return rbe_reference_f16_to_f32(((const uint16_t *)data)[index]);
        default: return ((const float *)data)[index];
    }
}

void rbe_reference_store(void *data, rbe_dtype dtype, int64_t index, double value) {
    switch (dtype) {
        case RBE_F64: ((double *)data)[index] = value; break;
        case RBE_BF16: ((uint16_t *)data)[index] = rbe_reference_f64_to_bf16(value); break;
        case RBE_F16: ((uint16_t *)data)[index] = rbe_reference_f64_to_f16(value); break;
        default: ((float *)data)[index] = (float)value; break;
    }
}
