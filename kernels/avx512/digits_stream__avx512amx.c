// Few tokens: codes of 64 rows become digits a few steps at a time, which the matrix unit multiplies while the next ones are looked up.
//
// Sums stay in tiles from the first column to the last. Formulas and shapes are those of digits_w__avx512amx.c and integer__avx512amx.c.
#include <immintrin.h>

#include "integer.h"

enum { STEPS = 1, BUFFER = STEPS * 4 * 3 * TILE };

// Two o, packed tokens, two or three digits of W: tiles 0, 1, 2 and 3, 4, 5.
static inline void add_packed(int64_t steps, const int8_t *x, const int8_t *w, int digits) {
    const int64_t part = steps * digits * TILE;
    for (int64_t step = 0; step < steps; ++step, x += TILE, w += digits * TILE) {
        _tile_loadd(6, x, 64);
        _tile_loadd(7, w, 64);
        _tile_dpbssd(0, 6, 7);
        _tile_loadd(7, w + part, 64);
        _tile_dpbssd(3, 6, 7);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbssd(1, 6, 7);
        _tile_loadd(7, w + part + TILE, 64);
        _tile_dpbssd(4, 6, 7);
        if (digits == 2) continue;
        _tile_loadd(7, w + 2 * TILE, 64);
        _tile_dpbssd(2, 6, 7);
        _tile_loadd(7, w + part + 2 * TILE, 64);
        _tile_dpbssd(5, 6, 7);
    }
}

// Looks groups up, `together` at a time, and hands what it has made to `add` one turn later, when it has left the store buffer.
#define STREAM(o, end, add)                                                                                   \
    do {                                                                                                      \
        const int8_t *left = x;                                                                               \
        int64_t ready = 0;                                                                                    \
        int turn = 0;                                                                                         \
        for (int64_t k = 0; k < groups; k += together, turn ^= 1) {                                           \
            const int64_t some = groups - k < together ? groups - k : together;                               \
            rbe_digits_of_codes__avx512amx(d, o, end, some, idx + k * bytes, ahead, k * bytes / RBE_LANES, \
                                            table, buffer[turn]);                                         \
            if (ready) add(ready, left, buffer[turn ^ 1]);                                                    \
            left += ready * step_x;                                                                           \
            ready = rbe_digit_steps(d->group, some * d->group);                                               \
        }                                                                                                     \
        add(ready, left, buffer[turn ^ 1]);                                                                   \
    } while (0)

#define ADD_TWO_ONE(steps, left, right) add_two(1, steps, left, right)
#define ADD_TWO_TWO(steps, left, right) add_two(2, steps, left, right)
#define ADD_PACKED(steps, left, right) add_packed(steps, left, right, d->w)

bool rbe_digits_stream__avx512amx(const rbe_digits *d, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, const int8_t *table,
                                  const int8_t *x, const float *unit, float *y) {
    const int64_t whole = rbe_digit_whole(d->group), bytes = d->stages * (d->flipped ? 2 : 1) * RBE_LANES, step_x = d->packed ? TILE : d->x * TILE;
    const int64_t unit_steps = whole * d->group / 64, together = unit_steps < STEPS ? STEPS / unit_steps * whole : whole;
    if (unit_steps > STEPS || (!d->packed && d->x == 3)) return false;
    int8_t buffer[2][BUFFER] __attribute__((aligned(64)));
    sums s;
    if (d->packed && d->w == 1) {
        ZERO4();
        STREAM(0, 4, add_four);
        _tile_stored(0, s.of[0], 64);
        put_packed(d, 1, 2, &s, unit, y, true);
        _tile_stored(1, s.of[0], 64);
        put_packed(d, 1, 2, &s, unit, y + 16, true);
        _tile_stored(2, s.of[0], 64);
        put_packed(d, 1, 2, &s, unit, y + 32, true);
        _tile_stored(3, s.of[0], 64);
        put_packed(d, 1, 2, &s, unit, y + 48, true);
        return true;
    }
    for (int o = 0; o < 4; o += 2) {
        ZERO4();
        if (d->packed) {
            _tile_zero(4);
            _tile_zero(5);
            STREAM(o, o + 2, ADD_PACKED);
            _tile_stored(0, s.of[0], 64);
            _tile_stored(1, s.of[1], 64);
            _tile_stored(2, s.of[2], 64);
            put_packed_more(d, &s, unit, y + o * 16, true);
            _tile_stored(3, s.of[0], 64);
            _tile_stored(4, s.of[1], 64);
            _tile_stored(5, s.of[2], 64);
            put_packed_more(d, &s, unit, y + o * 16 + 16, true);
            continue;
        }
        if (d->w == 1)
            STREAM(o, o + 2, ADD_TWO_ONE);
        else
            STREAM(o, o + 2, ADD_TWO_TWO);
        put_two(d, &s, unit, y + o * 16, true);
    }
    return true;
}
