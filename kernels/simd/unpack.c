// Stored codes of a row -> idx, scale, signs; and the gradient of amplitudes. Bit-identical to kernels/reference/decode.c.
//
//     scale = (-1)^sign (T[amp] + (T[amp+1] - T[amp]) amp_fine / 1024)       every operation rounded, no FMA
#include "codes.h"

V_INLINE vf point_scale(rbe_field field, points p) {
    const float *table = &rbe_curve_table[0][0];
    vf value = v_gather(table, p.at);
    if (field == RBE_FIELD_RBE32) {
        const vf step = v_sub(v_gather(table + 1, p.at), value);
        value = v_add(value, v_mul(step, v_mul(v_from_int(p.fine), v_set1(1.0f / 1024.0f))));
    }
    return v_of_bits(vi_or(vi_xor(v_bits(value), p.sign), p.nan));
}

V_INLINE void unpack_as(rbe_field field, const rbe_code_row *row, int64_t q0, int64_t count, uint8_t *idx, float *scale,
                        uint8_t *signs) {
    for (int64_t o = 0; o < count; o += V_WIDTH) {
        const int64_t lanes = count - o, q = q0 + o;
        const vi word = code_words(field, row, q);
        if (lanes >= V_WIDTH)
            vi_store_u8(idx + o, word_idx(word));
        else
            vi_store_u8_n(idx + o, word_idx(word), lanes);
        if (field == RBE_FIELD_RBE16S) vi_store_u8_n(signs + o, vi_and(word, vi_set1(255)), lanes);
        if (!scale) continue;
        const bool curved = rbe_field_has_scale(field);
        const vf value =
            curved ? point_scale(field, curve_points(field, word, row->amplitude ? row->amplitude + q : 0, lanes)) : v_set1(1.0f);
        v_store_n(scale + o, value, lanes);
    }
}

void RBE_KERNEL(unpack)(const rbe_code_row *row, int64_t q0, int64_t count, uint8_t *idx, float *scale, uint8_t *signs) {
    switch (row->field) {
        case RBE_FIELD_RBE32: unpack_as(RBE_FIELD_RBE32, row, q0, count, idx, scale, signs); break;
        case RBE_FIELD_RBE22: unpack_as(RBE_FIELD_RBE22, row, q0, count, idx, scale, signs); break;
        case RBE_FIELD_RBE8:
            if (row->packed && !scale)
                memcpy(idx, row->packed + q0, (size_t)count);
            else
                unpack_as(RBE_FIELD_RBE8, row, q0, count, idx, scale, signs);
            break;
        case RBE_FIELD_RBE16S: unpack_as(RBE_FIELD_RBE16S, row, q0, count, idx, scale, signs); break;
        case RBE_FIELD_RBE9R: unpack_as(RBE_FIELD_RBE9R, row, q0, count, idx, scale, signs); break;
        default: unpack_as(row->field, row, q0, count, idx, scale, signs); break;
    }
}

// dscale * d scale/da with d scale/da = 256 (T[amp+1] - T[amp]); zero where |a| >= 1 and descent would increase |a|.
void RBE_KERNEL(amplitude_gradient)(const rbe_code_row *row, const float *dscale, float *gradient) {
    const float *table = &rbe_curve_table[0][0];
    for (int64_t q = 0; q < row->count; q += V_WIDTH) {
        const int64_t lanes = row->count - q;
        const points p = curve_points(row->field, code_words(row->field, row, q), row->amplitude + q, lanes);
        const vf slope = v_mul(v_sub(v_gather(table + 1, p.at), v_gather(table, p.at)), v_set1(256.0f));
        const vf value = v_of_bits(vi_or(v_bits(v_mul(v_load_n(dscale + q, lanes), slope)), p.nan)), a = v_load_n(row->amplitude + q, lanes);
        const vi inside = v_lt(v_abs(a), v_set1(1.0f)), outward = v_lt(v_mul(a, value), v_zero());
        const vi keep = vi_or(inside, vi_xor(outward, vi_set1(-1)));
        v_store_n(gradient + q, v_of_bits(vi_and(v_bits(value), keep)), lanes);
    }
}
