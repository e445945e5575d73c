// Reads a layout string: <fields>[x<stages>]_g<group>[+int8|+fp8|+lr<rank>|+sp<fraction>], for example "rbe8x2_g8+sp0.005".
//
// Locale-independent and never reads past text[length - 1]. Numbers are plain decimals without sign or leading zeros, so that a layout has
// one spelling (but for an explicit x1, which means the same as nothing).
#include <string.h>

#include "rbe.h"

enum { MAX_STAGES = 16, MAX_GROUP = 65536, MAX_RANK = 65535, MAX_FRACTION_DIGITS = 15, MAX_TEXT = 64 };

static const struct {
    const char *name;
    rbe_field field;
} fields[] = {
    {"rbe32", RBE_FIELD_RBE32},   {"rbe22", RBE_FIELD_RBE22}, {"rbe8", RBE_FIELD_RBE8},
    {"rbe16s", RBE_FIELD_RBE16S}, {"rbe9r", RBE_FIELD_RBE9R},
    {"rbe4r", RBE_FIELD_RBE4R},   {"rbe2r", RBE_FIELD_RBE2R},
};

typedef struct cursor {
    const char *at, *end;
} cursor;

static bool skip(cursor *c, const char *word) {
    size_t length = strlen(word);
    if ((size_t)(c->end - c->at) < length || memcmp(c->at, word, length) != 0) return false;
    c->at += length;
    return true;
}

static bool digit(const cursor *c) { return c->at < c->end && *c->at >= '0' && *c->at <= '9'; }

// A whole number 1 .. limit; -1 where there is none. Too large a one is limit + 1.
static int32_t whole(cursor *c, int32_t limit) {
    if (!digit(c) || *c->at == '0') return -1;
    int64_t value = 0;
    while (digit(c)) {
        value = value * 10 + (*c->at++ - '0');
        if (value > limit) value = (int64_t)limit + 1;
    }
    return (int32_t)value;
}

// 0.ddd: at most 15 digits, so that digits / 10^count is one correctly rounded division. Negative where it is anything else.
static double fraction(cursor *c) {
    if (!skip(c, "0.") || !digit(c)) return -1.0;
    double value = 0.0, scale = 1.0;
    for (int count = 0; digit(c); ++count) {
        if (count == MAX_FRACTION_DIGITS) return -1.0;
        value = value * 10.0 + (*c->at++ - '0');
        scale *= 10.0;
    }
    return value / scale;
}

static rbe_status parse_residual(cursor *c, const char *text, int shown, rbe_layout *out, rbe_error *err) {
    if (skip(c, "+int8")) {
        out->residual = RBE_RESIDUAL_INT8;
    } else if (skip(c, "+fp8")) {
        out->residual = RBE_RESIDUAL_FP8;
    } else if (skip(c, "+lr")) {
        out->residual = RBE_RESIDUAL_LOWRANK;
        out->rank = whole(c, MAX_RANK);
        if (out->rank < 1 || out->rank > MAX_RANK)
            return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: the rank after +lr in '%.*s' must be a whole number from 1 to %d", shown, text,
                            MAX_RANK);
    } else if (skip(c, "+sp")) {
        out->residual = RBE_RESIDUAL_SPARSE;
        out->fraction = fraction(c);
        if (!(out->fraction > 0.0 && out->fraction < 1.0))
            return rbe_fail(
                err, RBE_BAD_ARGUMENT,
                "layout: the fraction after +sp in '%.*s' must be a decimal between 0 and 1 such as 0.005, of at most %d digits", shown,
                text, MAX_FRACTION_DIGITS);
    }
    return RBE_OK;
}

rbe_status rbe_layout_parse(const char *text, size_t length, rbe_layout *out, rbe_error *err) {
    if (!text || !out) return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: %s is NULL", text ? "the result" : "the text");
    int shown = length < MAX_TEXT ? (int)length : MAX_TEXT;
    while (shown > 0 && (size_t)shown < length && (text[shown] & 0xC0) == 0x80) --shown;  // does not cut a UTF-8 character in two
    rbe_layout layout = {.stages = 1};
    cursor c = {text, text + length};
    bool known = false;
    for (size_t i = 0; i < sizeof fields / sizeof fields[0] && !known; ++i) {
        cursor next = c;
        if (!skip(&next, fields[i].name) || next.at == next.end || (*next.at != 'x' && *next.at != '_')) continue;
        known = true;
        layout.field = fields[i].field;
        c = next;
    }
    if (!known)
        return rbe_fail(err, RBE_BAD_ARGUMENT,
                        "layout: '%.*s' must be <fields>[x<stages>]_g<group>[+residual] with fields rbe32, rbe22, rbe8, rbe16s, rbe9r, rbe4r or rbe2r, "
                        "for example rbe22_g64 or rbe8x2_g8+int8",
                        shown, text);
    layout.bits = rbe_field_bits(layout.field);

    if (skip(&c, "x")) {
        layout.stages = whole(&c, MAX_STAGES);
        if (layout.stages < 1 || layout.stages > MAX_STAGES)
            return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: the stages after x in '%.*s' must be a whole number from 1 to %d", shown, text,
                            MAX_STAGES);
    }
    layout.group = skip(&c, "_g") ? whole(&c, MAX_GROUP) : -1;
    if (layout.group < 1 || layout.group > MAX_GROUP)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: the group size in '%.*s' must be _g and a whole number from 1 to %d", shown, text,
                        MAX_GROUP);
    if (layout.field == RBE_FIELD_RBE16S && layout.group != 8)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: '%.*s' has group size %d, but rbe16s has eight signs a code and must have g8",
                        shown, text, layout.group);

    rbe_status status = parse_residual(&c, text, shown, &layout, err);
    if (status != RBE_OK) return status;
    if (c.at != c.end)
        return rbe_fail(err, RBE_BAD_ARGUMENT,
                        "layout: '%.*s' goes on after its first %d characters; there must be nothing more or one of +int8, +fp8, "
                        "+lr<rank>, +sp<fraction>",
                        shown, text, (int)(c.at - text));
    *out = layout;
    return RBE_OK;
}
