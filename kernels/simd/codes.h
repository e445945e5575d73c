// V_WIDTH codes of a row at a time: interchange words, and the curve point that a word and an amplitude select.
#ifndef RBE_SIMD_CODES_H
#define RBE_SIMD_CODES_H

#include "../kernels.h"
#include "simd.h"

typedef struct points {
    vi at, fine;  // curve * 257 + amp, amp_fine
    vi sign;      // 1 << 31 where the scale is negative
    vi nan;       // all ones where the amplitude is NaN
} points;

// The bit string of a row and where its code q lies: `bits` bits from bit q*bits, least significant first.
V_INLINE vi stored_codes(const rbe_code_row *row, int64_t q, int bits) {
    const int64_t count = row->count;
    const int64_t bytes = (count * bits + 7) / 8;
    if (bytes < 4 || bytes >= INT32_MAX / 8) {  // too short to load 4 bytes, or bit offsets that leave int32
        int32_t lane[V_WIDTH];
        for (int i = 0; i < V_WIDTH; ++i) {
            const int64_t bit = (q + i) * bits;
            uint64_t value = 0;
            for (int64_t b = 0; b < 5 && q + i < count && (bit >> 3) + b < bytes; ++b)
                value |= (uint64_t)row->packed[(bit >> 3) + b] << (8 * b);
            lane[i] = (int32_t)(uint32_t)(value >> (bit & 7) & ((1ull << bits) - 1));
        }
        return vi_load(lane);
    }
#ifdef V_HAS_FIELDS
    if ((q * bits & 7) == 0) return vi_load_fields(row->packed + q * bits / 8, bytes - q * bits / 8, bits);
#endif
    // The last codes are read from the row's last 4 bytes and shifted further, so that nothing behind the row is touched.
    const vi bit = vi_add(vi_set1((int32_t)(q * bits)), vi_mul(vi_iota(), vi_set1(bits)));
    const vi byte = vi_min(vi_shr(bit, 3), vi_set1((int32_t)(bytes - 4)));
    vi shift = vi_sub(bit, vi_shl(byte, 3));
    if (q + V_WIDTH > count) shift = vi_and(shift, vi_set1(31));  // lanes past the last code: any value will do
    const vi value = vi_shrv(vi_gather(row->packed, byte), shift);
    return bits == 32 ? value : vi_and(value, vi_set1((int32_t)((1u << (bits & 31)) - 1u)));
}

// rbe_seeded_idx of codes q .. q + V_WIDTH - 1
V_INLINE vi seeded_idx(const rbe_code_row *row, int64_t q) {
    const vi c = vi_add(vi_set1((int32_t)(row->first + (uint32_t)q + 1u)), vi_iota());
    vi h = vi_add(vi_set1((int32_t)row->seed), vi_mul(c, vi_set1((int32_t)0x9E3779B9u)));
    h = vi_mul(vi_xor(h, vi_shr(h, 16)), vi_set1((int32_t)0x85EBCA6Bu));
    h = vi_mul(vi_xor(h, vi_shr(h, 13)), vi_set1((int32_t)0xC2B2AE35u));
    return vi_shr(vi_xor(h, vi_shr(h, 16)), 24);
}

// Interchange words of codes q .. q + V_WIDTH - 1; lanes past the row's last code hold some valid word.
V_INLINE vi code_words(rbe_field field, const rbe_code_row *row, int64_t q) {
    if (row->words) return vi_load_n(row->words + q, row->count - q);
    const vi b = stored_codes(row, q, rbe_field_bits(field));
    switch (field) {
        case RBE_FIELD_RBE8: return vi_shl(b, RBE_IDX_SHIFT);
        case RBE_FIELD_RBE16S: return vi_or(vi_and(b, vi_set1(255)), vi_shl(vi_shr(b, 8), RBE_IDX_SHIFT));
        case RBE_FIELD_RBE9R:
        case RBE_FIELD_RBE4R:
        case RBE_FIELD_RBE2R: {
            const int unstored = rbe_field_amp_unstored(field), amp = 8 - unstored;
            const vi idx = vi_shl(seeded_idx(row, q), RBE_IDX_SHIFT), constant = vi_set1((int32_t)rbe_field_constant(field));
            const vi stored = vi_or(vi_shl(vi_and(b, vi_set1((1 << amp) - 1)), unstored), vi_shl(vi_shr(b, amp), RBE_SIGN_SHIFT));
            return vi_or(stored, vi_or(idx, constant));
        }
        default: return b;
    }
}

V_INLINE vi word_idx(vi word) { return vi_and(vi_shr(word, RBE_IDX_SHIFT), vi_set1(255)); }

// Where on its curve a code lies. amplitude: V_WIDTH values that replace sign, amp and amp_fine, rounded as kernels/reference/decode.c says; or NULL.
V_INLINE points curve_points(rbe_field field, vi word, const float *amplitude, int64_t lanes) {
    const vi curve = vi_or(vi_shl(vi_and(vi_shr(word, RBE_SUB_SHIFT), vi_set1(15)), 1), vi_and(vi_shr(word, RBE_DERIV_SHIFT), vi_set1(1)));
    points p = {vi_mul(curve, vi_set1(RBE_CURVE_POINTS)), vi_shr(word, RBE_FINE_SHIFT), vi_shl(vi_shr(word, RBE_SIGN_SHIFT), 31), vi_set1(0)};
    if (!amplitude) {
        p.at = vi_add(p.at, vi_and(word, vi_set1(255)));
        return p;
    }
    const int unstored = rbe_field_amp_unstored(field);
    const int32_t steps = field == RBE_FIELD_RBE32 ? 1 << 18 : 1 << (8 - unstored);
    const vf a = v_load_n(amplitude, lanes), scaled = v_mul(v_min(v_abs(a), v_set1(1.0f - 0x1p-18f)), v_set1((float)steps));
    const vi whole = v_to_int(scaled);
    const vf inside = v_sub(scaled, v_from_int(whole));
    const vi k = unstored ? vi_or(vi_shl(whole, unstored), vi_set1(1 << (unstored - 1)))
                          : vi_min(vi_add(whole, v_to_int(v_add(inside, inside))), vi_set1(steps - 1));  // one more if inside >= 1/2
    p.nan = v_nan(a);
    p.sign = vi_and(v_lt(a, v_zero()), vi_set1(INT32_MIN));
    p.at = vi_add(p.at, field == RBE_FIELD_RBE32 ? vi_shr(k, 10) : k);
    p.fine = vi_and(k, vi_set1(field == RBE_FIELD_RBE32 ? 1023 : 0));
    return p;
}

#endif
