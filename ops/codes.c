// Code words <-> packed bytes, and the check that codes are ones the layout can hold. The bits are drawn in kernels/format.h.
//
// A row of K*M codes of `bits` bits is one little-endian bit string. Portable to either byte order: bytes are shifted in and out one at a
// time.
#include <string.h>

#include "product.h"

// Word <-> the code's stored bits, for the layouts that do not store the word as it is.
static inline uint32_t squeeze(rbe_field field, uint32_t w) {
    switch (field) {
        case RBE_FIELD_RBE8: return rbe_word_idx(w);
        case RBE_FIELD_RBE16S: return (w & 255u) | rbe_word_idx(w) << 8;
        case RBE_FIELD_RBE9R:
        case RBE_FIELD_RBE4R:
        case RBE_FIELD_RBE2R: {
            const int unstored = rbe_field_amp_unstored(field);
            return rbe_word_amp(w) >> unstored | rbe_word_sign(w) << (8 - unstored);
        }
        default: return w;
    }
}

static inline uint32_t stretch(rbe_field field, uint32_t stored, uint32_t idx) {
    switch (field) {
        case RBE_FIELD_RBE8: return stored << RBE_IDX_SHIFT;
        case RBE_FIELD_RBE16S: return (stored & 255u) | (stored >> 8) << RBE_IDX_SHIFT;
        case RBE_FIELD_RBE9R:
        case RBE_FIELD_RBE4R:
        case RBE_FIELD_RBE2R: {
            const int unstored = rbe_field_amp_unstored(field), amp = 8 - unstored;
            return (stored & ((1u << amp) - 1u)) << unstored | (stored >> amp) << RBE_SIGN_SHIFT | idx << RBE_IDX_SHIFT | rbe_field_constant(field);
        }
        default: return stored;
    }
}

static uint32_t seeded(const rbe_weight *w, int64_t row, int64_t q) {
    // c = (i*K + k)*M + s runs on with q = k*M + s, so stage 0 and one "stage" a group give the same c
    uint64_t stages = (uint64_t)w->layout.stages;
    return rbe_seeded_idx(w->seed, (uint64_t)(w->row0 + row) * stages, (uint64_t)w->k0 * stages + (uint64_t)q, 0, (uint64_t)w->groups_total,
                          1);
}

// Sizes must be positive, agree with each other and fit an int64 when multiplied out; also says where the shard lies.
rbe_status rbe_check_shape(const rbe_weight *w, rbe_error *err) {
    const rbe_layout *l = &w->layout;
    if ((unsigned)l->field >= RBE_FIELD_COUNT || l->bits != rbe_field_bits(l->field) || l->group < 1 || l->stages < 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: field %d, %d bits, group %d, %d stages is not a layout; rbe_layout_parse makes one",
                        (int)l->field, (int)l->bits, (int)l->group, (int)l->stages);
    if (w->rows < 1 || w->cols < 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: %lld rows and %lld columns, both must be at least 1", (long long)w->rows,
                        (long long)w->cols);
    if (w->groups != (w->cols - 1) / l->group + 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: %lld groups a row, but %lld columns in groups of %d make %lld", (long long)w->groups,
                        (long long)w->cols, (int)l->group, (long long)((w->cols - 1) / l->group + 1));
    if (w->groups > INT64_MAX / 64 / l->stages || w->rows > INT64_MAX / 64 / l->stages / w->groups)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: %lld rows of %lld groups of %d stages are more than can be addressed",
                        (long long)w->rows, (long long)w->groups, (int)l->stages);
    if (rbe_field_seeded(l->field) && (w->row0 < 0 || w->k0 < 0 || w->groups_total < w->groups || w->k0 > w->groups_total - w->groups))
        return rbe_fail(err, RBE_BAD_ARGUMENT,
                        "row0, k0: a shard of %lld groups that starts at row %lld, group %lld must lie inside the layer's %lld groups",
                        (long long)w->groups, (long long)w->row0, (long long)w->k0, (long long)w->groups_total);
    return RBE_OK;
}

// The hot loop of the check: bits that are always clear or always set, OR-ed over a row.
static uint32_t wrong_bits(const int32_t *words, int64_t count, uint32_t fixed, uint32_t constant) {
    uint32_t wrong = 0;
    for (int64_t q = 0; q < count; ++q) wrong |= ((uint32_t)words[q] ^ constant) & fixed;
    return wrong;
}

static uint32_t wrong_idx(const rbe_weight *w, int64_t row, const int32_t *words, int64_t count) {
    uint32_t wrong = 0;
    for (int64_t q = 0; q < count; ++q) wrong |= rbe_word_idx((uint32_t)words[q]) ^ seeded(w, row, q);
    return wrong;
}

static rbe_status check_words(const rbe_weight *w, rbe_error *err) {
    const rbe_field field = w->layout.field;
    const int64_t count = w->groups * w->layout.stages;
    const uint32_t constant = rbe_field_constant(field), fixed = ~rbe_field_mask(field) | constant;
    for (int64_t row = 0; row < w->rows; ++row) {
        const int32_t *words = w->words + row * count;
        if (fixed && wrong_bits(words, count, fixed, constant)) {
            int64_t q = 0;
            while (!wrong_bits(words + q, 1, fixed, constant)) ++q;
            return rbe_fail(err, RBE_BAD_ARGUMENT,
                            "codes: word 0x%08x at row %lld, group %lld, stage %lld has bits that its layout of %d bits does not store; "
                            "(word & 0x%08x) must be 0x%08x",
                            (unsigned)words[q], (long long)row, (long long)(q / w->layout.stages), (long long)(q % w->layout.stages),
                            (int)w->layout.bits, (unsigned)fixed, (unsigned)constant);
        }
        if (rbe_field_seeded(field) && wrong_idx(w, row, words, count)) {
            int64_t q = 0;
            while (rbe_word_idx((uint32_t)words[q]) == seeded(w, row, q)) ++q;
            return rbe_fail(err, RBE_BAD_ARGUMENT,
                            "codes: word 0x%08x at row %lld, group %lld, stage %lld has idx %u, but seed %u gives idx %u there",
                            (unsigned)words[q], (long long)row, (long long)(q / w->layout.stages), (long long)(q % w->layout.stages),
                            (unsigned)rbe_word_idx((uint32_t)words[q]), (unsigned)w->seed, (unsigned)seeded(w, row, q));
        }
    }
    return RBE_OK;
}

static rbe_status check_packed(const rbe_weight *w, rbe_error *err) {
    const int64_t bytes = rbe_packed_row_bytes(&w->layout, w->groups);
    const int used = (int)(w->groups * w->layout.stages * w->layout.bits % 8);
    if (w->rows > 1 && w->packed_stride < bytes)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: packed rows are %lld bytes apart, but a row takes %lld", (long long)w->packed_stride,
                        (long long)bytes);
    for (int64_t row = 0; used && row < w->rows; ++row) {
        const unsigned last = w->packed[row * w->packed_stride + bytes - 1];
        if (last >> used)
            return rbe_fail(err, RBE_BAD_ARGUMENT,
                            "codes: the last byte of packed row %lld is 0x%02x, but its %d padding bits must be zero", (long long)row, last,
                            8 - used);
    }
    return RBE_OK;
}

rbe_status rbe_check_codes(const rbe_weight *w, rbe_error *err) {
    if (!w) return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: is NULL");
    rbe_status status = rbe_check_shape(w, err);
    if (status != RBE_OK) return status;
    const int given = !!w->words + !!w->packed + !!w->interleaved;
    if (given != 1) return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: must be given in exactly one form, words, packed or interleaved, not in %d", given);
    if (w->interleaved) {
        if (w->layout.field == RBE_FIELD_RBE8) return RBE_OK;
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: are interleaved, but only codes of one byte (rbe8) can be, not of %d bits",
                        (int)w->layout.bits);
    }
    return w->words ? check_words(w, err) : check_packed(w, err);
}

// The inner loops are instantiated once a layout, with the width a constant.
static inline void pack_row(rbe_field field, int bits, const int32_t *words, int64_t count, uint8_t *out) {
    uint64_t pending = 0;
    int have = 0;
    for (int64_t q = 0; q < count; ++q) {
        pending |= (uint64_t)squeeze(field, (uint32_t)words[q]) << have;
        for (have += bits; have >= 8; have -= 8, pending >>= 8) *out++ = (uint8_t)pending;
    }
    if (have) *out = (uint8_t)pending;
}

static inline void unpack_row(rbe_field field, int bits, const rbe_weight *w, int64_t row, const uint8_t *in, int64_t count,
                              int32_t *words) {
    const uint64_t mask = (1ull << bits) - 1;
    uint64_t pending = 0;
    int have = 0;
    for (int64_t q = 0; q < count; ++q, pending >>= bits, have -= bits) {
        for (; have < bits; have += 8) pending |= (uint64_t)*in++ << have;
        words[q] = (int32_t)stretch(field, (uint32_t)(pending & mask), rbe_field_seeded(field) ? seeded(w, row, q) : 0);
    }
}

rbe_status rbe_pack(const rbe_weight *w, uint8_t *packed, rbe_error *err) {
    rbe_status status = rbe_check_codes(w, err);
    if (status != RBE_OK) return status;
    if (!w->words || !packed)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s", w->words ? "packed: is NULL" : "codes: pack takes words, not bytes");
    const int64_t count = w->groups * w->layout.stages, bytes = rbe_packed_row_bytes(&w->layout, w->groups);
    for (int64_t row = 0; row < w->rows; ++row) {
        const int32_t *words = w->words + row * count;
        uint8_t *out = packed + row * bytes;
        switch (w->layout.field) {
            case RBE_FIELD_RBE32: pack_row(RBE_FIELD_RBE32, 32, words, count, out); break;
            case RBE_FIELD_RBE22: pack_row(RBE_FIELD_RBE22, 22, words, count, out); break;
            case RBE_FIELD_RBE8: pack_row(RBE_FIELD_RBE8, 8, words, count, out); break;
            case RBE_FIELD_RBE16S: pack_row(RBE_FIELD_RBE16S, 16, words, count, out); break;
            case RBE_FIELD_RBE9R: pack_row(RBE_FIELD_RBE9R, 9, words, count, out); break;
            case RBE_FIELD_RBE4R: pack_row(RBE_FIELD_RBE4R, 4, words, count, out); break;
            default: pack_row(RBE_FIELD_RBE2R, 2, words, count, out); break;
        }
    }
    return RBE_OK;
}

rbe_status rbe_unpack(const rbe_weight *w, int32_t *words, rbe_error *err) {
    rbe_status status = rbe_check_codes(w, err);
    if (status != RBE_OK) return status;
    if (w->words || !words)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s", w->words ? "codes: unpack takes packed bytes, not words" : "words: is NULL");
    const int64_t count = w->groups * w->layout.stages;
    if (w->interleaved) {
        for (int64_t row = 0; row < w->rows; ++row) {
            const uint8_t *in = w->interleaved + row / RBE_INTERLEAVED_ROWS * count * RBE_INTERLEAVED_ROWS + row % RBE_INTERLEAVED_ROWS;
            for (int64_t q = 0; q < count; ++q) words[row * count + q] = (int32_t)stretch(RBE_FIELD_RBE8, in[q * RBE_INTERLEAVED_ROWS], 0);
        }
        return RBE_OK;
    }
    for (int64_t row = 0; row < w->rows; ++row) {
        const uint8_t *in = w->packed + row * w->packed_stride;
        int32_t *out = words + row * count;
        switch (w->layout.field) {
            case RBE_FIELD_RBE32: unpack_row(RBE_FIELD_RBE32, 32, w, row, in, count, out); break;
            case RBE_FIELD_RBE22: unpack_row(RBE_FIELD_RBE22, 22, w, row, in, count, out); break;
            case RBE_FIELD_RBE8: unpack_row(RBE_FIELD_RBE8, 8, w, row, in, count, out); break;
            case RBE_FIELD_RBE16S: unpack_row(RBE_FIELD_RBE16S, 16, w, row, in, count, out); break;
            case RBE_FIELD_RBE9R: unpack_row(RBE_FIELD_RBE9R, 9, w, row, in, count, out); break;
            case RBE_FIELD_RBE4R: unpack_row(RBE_FIELD_RBE4R, 4, w, row, in, count, out); break;
            default: unpack_row(RBE_FIELD_RBE2R, 2, w, row, in, count, out); break;
        }
    }
    return RBE_OK;
}
