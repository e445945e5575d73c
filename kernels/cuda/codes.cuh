// Reading one code on the device: word, scale, amplitude, residual. Bit for bit kernels/reference/weight.c and decode.c.
#pragma once

#include "cu.h"
#include "launch.h"

// kernels/curve_table.c as device memory of the file that includes this
#define rbe_curve_table cu_curve_table
static __device__
#include "../curve_table.c"
#undef rbe_curve_table

CU_DEVICE uint32_t cu_seeded_idx(uint32_t seed, uint32_t c) {
    uint32_t h = seed + 0x9E3779B9u * (c + 1u);
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    h ^= h >> 16;
    return h >> 24;
}

CU_DEVICE uint32_t cu_stored_bits(const uint8_t *row, int64_t q, int bits) {
    if (bits == 8) return row[q];
    const int64_t bit = q * bits;
    const uint8_t *at = row + (bit >> 3);
    const int shift = (int)(bit & 7), bytes = (shift + bits + 7) >> 3;  // never past the row's last byte
    uint64_t value = 0;
    for (int b = 0; b < bytes; ++b) value |= (uint64_t)at[b] << (8 * b);
    value >>= shift;
    return (uint32_t)(bits == 32 ? value : value & ((1u << bits) - 1u));
}

// The interchange word of code q of row i.
CU_DEVICE uint32_t cu_word(const rbe_cu_codes &c, int64_t i, int64_t q) {
    if (c.words) return (uint32_t)c.words[i * (c.groups * c.stages) + q];
    const uint32_t b = cu_stored_bits(c.packed + i * c.packed_stride, q, c.bits);
    if (c.field == RBE_FIELD_RBE8) return b << RBE_IDX_SHIFT;
    if (c.field == RBE_FIELD_RBE16S) return (b >> 8) << RBE_IDX_SHIFT | (b & 255u);
    if (!c.seeded) return b;
    const int amp = 8 - c.unstored;
    return c.constant | (b >> amp) << RBE_SIGN_SHIFT | (b & ((1u << amp) - 1u)) << c.unstored |
           cu_seeded_idx(c.seed, c.first + (uint32_t)i * c.row_step + (uint32_t)q) << RBE_IDX_SHIFT;
}
CU_DEVICE uint32_t cu_idx(uint32_t word) { return word >> RBE_IDX_SHIFT & 255u; }

CU_DEVICE const float *cu_curve_point(uint32_t word) {
    const uint32_t curve = (word >> RBE_SUB_SHIFT & 15u) << 1 | (word >> RBE_DERIV_SHIFT & 1u);
    return cu_curve_table[curve] + (word & 255u);
}

CU_DEVICE float cu_word_scale(uint32_t word) {
    const float *point = cu_curve_point(word);
    const float step = point[1] - point[0];
    const float inside = step * ((float)(word >> RBE_FINE_SHIFT) / 1024.0f);
    const float value = point[0] + inside;
    return word >> RBE_SIGN_SHIFT & 1u ? -value : value;
}

template <class Real>
CU_DEVICE Real cu_clamped_size(Real a) {  // min(|a|, 1 - 2^-18), which float32 holds exactly
    const Real size = a < 0 ? -a : a, most = (Real)(1.0 - 1.0 / 262144.0);
    return size < most ? size : most;
}

// The word with sign, amp and amp_fine of amplitude a: rounded half up, or the middle of its cell where end bits are not stored.
template <class Real>
CU_DEVICE uint32_t cu_amplitude_word(const rbe_cu_codes &c, uint32_t word, Real a) {
    const bool fine_stored = c.field == RBE_FIELD_RBE32;
    const uint32_t steps = fine_stored ? 1u << 18 : 1u << (8 - c.unstored);
    const Real scaled = cu_clamped_size(a) * (Real)steps;
    uint32_t k = (uint32_t)scaled;  // truncation: scaled >= 0
    if (!c.unstored) k += scaled - (Real)k >= (Real)0.5;
    if (k > steps - 1u) k = steps - 1u;
    if (c.unstored) k = k << c.unstored | 1u << (c.unstored - 1);
    const uint32_t amp = fine_stored ? k >> 10 : k, fine = fine_stored ? k & 1023u : 0u;
    const uint32_t kept = word & ~(1023u << RBE_FINE_SHIFT | 1u << RBE_SIGN_SHIFT | 255u);
    return kept | fine << RBE_FINE_SHIFT | (uint32_t)(a < 0) << RBE_SIGN_SHIFT | amp;
}

template <class Real>
CU_DEVICE const float *cu_amplitude_point(const rbe_cu_codes &c, uint32_t word, Real a, Real *inside) {
    if (c.rounded) {
        *inside = 0;
        return cu_curve_point(cu_amplitude_word(c, word, a));
    }
    const Real u256 = cu_clamped_size(a) * (Real)256;
    const uint32_t amp = (uint32_t)u256;
    *inside = u256 - (Real)amp;
    return cu_curve_point((word & ~255u) | amp);
}

// Scale of code q of row i, whose word is given.
template <class Real>
CU_DEVICE Real cu_scale(const rbe_cu_codes &c, uint32_t word, int64_t i, int64_t q) {
    if (!c.scaled) return 1;
    if (!c.amplitude) return (Real)cu_word_scale(word);
    const Real a = ((const Real *)c.amplitude)[i * (c.groups * c.stages) + q];
    if (a != a) return a;
    if (c.rounded) return (Real)cu_word_scale(cu_amplitude_word(c, word, a));
    Real inside;
    const float *point = cu_amplitude_point(c, word, a, &inside);
    const Real value = (Real)point[0] + ((Real)point[1] - (Real)point[0]) * inside;
    return a < 0 ? -value : value;
}

// dscale * d scale/da, zero where |a| >= 1 and descent would increase |a|.
template <class Real>
CU_DEVICE Real cu_amplitude_gradient(const rbe_cu_codes &c, uint32_t word, Real a, Real dscale) {
    if (a != a) return a;
    Real inside;
    const float *point = cu_amplitude_point(c, word, a, &inside);
    const Real gradient = dscale * ((Real)256 * ((Real)point[1] - (Real)point[0]));
    const bool outside = a >= 1 || a <= -1;
    return outside && a * gradient < 0 ? (Real)0 : gradient;
}

// residual[i, col]
template <class Real>
CU_DEVICE Real cu_residual(const rbe_cu_residual &r, int64_t cols, int64_t i, int64_t col) {
    switch (r.kind) {
        case RBE_RESIDUAL_INT8: return (Real)((const int8_t *)r.at.values)[i * cols + col] * (Real)r.at.scale[i];
        case RBE_RESIDUAL_FP8: return (Real)cu_e4m3_to_f32(((const uint8_t *)r.at.values)[i * cols + col]) * (Real)r.at.scale[i];
        case RBE_RESIDUAL_LOWRANK: {
            const int8_t *a = (const int8_t *)r.at.values + i * r.count, *b = (const int8_t *)r.at.right + col;
            Real sum = 0;
            for (int64_t p = 0; p < r.count; ++p)
                sum += (Real)a[p] * (Real)r.at.scale[p] * ((Real)b[p * cols] * (Real)r.at.right_scale[p]);
            return sum;
        }
        case RBE_RESIDUAL_SPARSE: {  // columns rise in a row: bisection
            const int32_t *column = (const int32_t *)r.at.right + i * r.count;
            int64_t low = 0, high = r.count;
            while (low < high) {
                const int64_t middle = (low + high) >> 1;
                if (column[middle] < col) low = middle + 1;
                else high = middle;
            }
            const bool there = low < r.count && column[low] == col;
            return there ? (Real)cu_f16_to_f32(((const uint16_t *)r.at.values)[i * r.count + low]) : (Real)0;
        }
        default: return 0;
    }
}
