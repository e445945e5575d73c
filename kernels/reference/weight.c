// One element of a weight at a time: code word, scale, vector, residual, W[row, col].
//
//     W[i, k*g + e] = gain[i] * sum over s of scale(code[i,k,s]) * basis[s, idx, e] * (-1)^(bit e, rbe16s)  +  residual[i, k*g + e]
#include <math.h>

#include "reference.h"

static int64_t code_index(const rbe_weight *w, int64_t row, int64_t group, int64_t stage) {
    return (row * w->groups + group) * w->layout.stages + stage;
}

static uint32_t stored_bits(const uint8_t *row, int64_t first_bit, int bits) {
    uint32_t value = 0;
    for (int b = 0; b < bits; ++b) {
        const int64_t bit = first_bit + b;
        value |= (uint32_t)(row[bit >> 3] >> (bit & 7) & 1) << b;
    }
    return value;
}

uint32_t rbe_reference_word(const rbe_weight *w, int64_t row, int64_t group, int64_t stage) {
    if (w->words) return (uint32_t)w->words[code_index(w, row, group, stage)];
    const rbe_layout *l = &w->layout;
    if (w->interleaved) {
        const int64_t q = group * l->stages + stage, codes = w->groups * l->stages, tile = row / RBE_INTERLEAVED_ROWS;
        return (uint32_t)w->interleaved[(tile * codes + q) * RBE_INTERLEAVED_ROWS + row % RBE_INTERLEAVED_ROWS] << RBE_IDX_SHIFT;
    }
    const uint32_t b = stored_bits(w->packed + row * w->packed_stride, (group * l->stages + stage) * l->bits, l->bits);
    switch (l->field) {
        case RBE_FIELD_RBE8: return b << RBE_IDX_SHIFT;
        case RBE_FIELD_RBE16S: return b >> 8 << RBE_IDX_SHIFT | (b & 255u);
        case RBE_FIELD_RBE9R:
        case RBE_FIELD_RBE4R:
        case RBE_FIELD_RBE2R: {
            const int unstored = rbe_field_amp_unstored(l->field), amp = 8 - unstored;
            const uint32_t idx = rbe_seeded_idx(w->seed, (uint64_t)(w->row0 + row), (uint64_t)(w->k0 + group), (uint64_t)stage,
                                                (uint64_t)w->groups_total, (uint64_t)l->stages);
            return rbe_field_constant(l->field) | idx << RBE_IDX_SHIFT | b >> amp << RBE_SIGN_SHIFT | (b & ((1u << amp) - 1u)) << unstored;
        }
        default: return b;
    }
}

double rbe_reference_code_scale(const rbe_weight *w, int64_t row, int64_t group, int64_t stage) {
    const uint32_t word = rbe_reference_word(w, row, group, stage);
    if (!w->amplitude) return rbe_reference_scale(w->layout.field, word);
    const double a = rbe_reference_load(w->amplitude, w->real, code_index(w, row, group, stage));
    return rbe_reference_amplitude_scale(w->layout.field, word, a, w->rounded);
}

double rbe_reference_code_element(const rbe_weight *w, int64_t row, int64_t group, int64_t stage, int64_t e) {
    const uint32_t word = rbe_reference_word(w, row, group, stage);
    const int64_t vector = stage * RBE_BASIS_VECTORS + rbe_word_idx(word);
    const double value = rbe_reference_load(w->basis, w->real, vector * w->layout.group + e);
    return w->layout.field == RBE_FIELD_RBE16S && (word >> e & 1u) ? -value : value;
}

int64_t rbe_reference_sparse_count(const rbe_weight *w) {
    const double count = rint(w->layout.fraction * (double)w->cols);  // halves to even, as Python's round
    return count < 1.0 ? 1 : (int64_t)count;
}

double rbe_reference_residual(const rbe_weight *w, int64_t row, int64_t col) {
    const rbe_residual *r = &w->residual;
    switch (w->layout.residual) {
        case RBE_RESIDUAL_INT8: return (double)((const int8_t *)r->values)[row * w->cols + col] * r->scale[row];
        case RBE_RESIDUAL_FP8:
            return (double)rbe_reference_e4m3fn_to_f32(((const uint8_t *)r->values)[row * w->cols + col]) * r->scale[row];
        case RBE_RESIDUAL_LOWRANK: {
            const int8_t *a = (const int8_t *)r->values + row * w->layout.rank, *b = (const int8_t *)r->right + col;
            double sum = 0.0;
            for (int64_t p = 0; p < w->layout.rank; ++p) sum += (double)a[p] * r->scale[p] * ((double)b[p * w->cols] * r->right_scale[p]);
            return sum;
        }
        case RBE_RESIDUAL_SPARSE: {
            const int64_t count = rbe_reference_sparse_count(w);
            const int32_t *column = (const int32_t *)r->right + row * count;
            for (int64_t p = 0; p < count && column[p] <= col; ++p)
                if (column[p] == col) return rbe_reference_load(r->values, RBE_F16, row * count + p);
            return 0.0;
        }
        default: return 0.0;
    }
}

double rbe_reference_element(const rbe_weight *w, int64_t row, int64_t col) {
    const int64_t group = col / w->layout.group, e = col % w->layout.group;
    double sum = 0.0;
    for (int64_t s = 0; s < w->layout.stages; ++s)
        sum += rbe_reference_code_scale(w, row, group, s) * rbe_reference_code_element(w, row, group, s, e);
    return rbe_reference_load(w->gain, w->real, row) * sum + rbe_reference_residual(w, row, col);
}
