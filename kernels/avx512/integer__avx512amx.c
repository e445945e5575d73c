// Products of bytes on the matrix unit, for codes of one byte: W and x as one to three signed digits.
//
//     x[t, j] = unit[t] (x0 + x1 / base + x2 / base^2),   W[i, j] = step (w0 + w1 / base + w2 / base^2)
//     y[t, i] (+)= unit[t] step (sum of x0 w0 + sum of (x0 w1 + x1 w0) / base + ...)
//
// Sums are exact int32, so an error comes from rounding to digits alone. Products of the same power of base share a tile of sums. Of two digits
// each the product of the second ones is left out, of three the product of the third ones. Few tokens are packed: the digits of x are rows of
// one tile, all products with a digit of W come at once, and none is left out.
//
//     x [16 tokens][step][tile][16][64],   W [o][step][digit][16 x 4 places][16 rows][4],   y [16 tokens][16][64 rows in the order of the tiles]
//
// All tokens pass over a part of W before the next part: it stays in L1, and x comes from L2.
#include <immintrin.h>

#include "integer.h"

static void packed_one(const rbe_digits *d, int64_t steps, const int8_t *x, const int8_t *w, const float *unit, float *y, bool first) {
    sums s;
    ZERO4();
    add_four(steps, x, w);
    _tile_stored(0, s.of[0], 64);
    put_packed(d, 1, 2, &s, unit, y, first);
    _tile_stored(1, s.of[0], 64);
    put_packed(d, 1, 2, &s, unit, y + 16, first);
    _tile_stored(2, s.of[0], 64);
    put_packed(d, 1, 2, &s, unit, y + 32, first);
    _tile_stored(3, s.of[0], 64);
    put_packed(d, 1, 2, &s, unit, y + 48, first);
}

static void packed_more(const rbe_digits *d, int64_t steps, const int8_t *x, const int8_t *w, const float *unit, float *y, bool first) {
    sums s;
    for (int o = 0; o < 4; ++o) {
        ZERO4();
        for (int64_t step = 0; step < steps; ++step, w += d->w * TILE) {
            _tile_loadd(4, x + step * TILE, 64);
            _tile_loadd(5, w, 64);
            _tile_dpbssd(0, 4, 5);
            _tile_loadd(6, w + TILE, 64);
            _tile_dpbssd(1, 4, 6);
            if (d->w == 2) continue;
            _tile_loadd(7, w + 2 * TILE, 64);
            _tile_dpbssd(2, 4, 7);
        }
        _tile_stored(0, s.of[0], 64);
        _tile_stored(1, s.of[1], 64);
        _tile_stored(2, s.of[2], 64);
        put_packed_more(d, &s, unit, y + o * 16, first);
    }
}

static inline __attribute__((always_inline)) void two_of_x(const rbe_digits *d, const int digits, int64_t steps, const int8_t *x, const int8_t *w,
                                                           const float *unit, float *y, bool first) {
    sums s;
    ZERO4();
    add_two(digits, steps, x, w);
    put_two(d, &s, unit, y, first);
}

// Three digits of both, one o. Tiles 0..3: sums by power; 4: x; 5, 6, 7: W.
static void three(const rbe_digits *d, int64_t steps, const int8_t *x, const int8_t *w, const float *unit, float *y, bool first) {
    sums s;
    ZERO4();
    for (int64_t step = 0; step < steps; ++step, x += 3 * TILE, w += 3 * TILE) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, w, 64);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, w + TILE, 64);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(7, w + 2 * TILE, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(4, x + TILE, 64);
        _tile_dpbssd(1, 4, 5);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(3, 4, 7);
        _tile_loadd(4, x + 2 * TILE, 64);
        _tile_dpbssd(2, 4, 5);
        _tile_dpbssd(3, 4, 6);
    }
    _tile_stored(0, s.of[0], 64);
    _tile_stored(1, s.of[1], 64);
    _tile_stored(2, s.of[2], 64);
    _tile_stored(3, s.of[3], 64);
    put(d, 4, &s, unit, y, first);
}

void rbe_digits_multiply__avx512amx(const rbe_digits *d, int64_t steps, int64_t tiles, const int8_t *x, int64_t x_tile, const int8_t *w,
                                    const float *unit, float *y, bool first) {
    if (d->packed) {
        (d->w == 1 ? packed_one : packed_more)(d, steps, x, w, unit, y, first);
        return;
    }
    const int64_t part = steps * d->w * TILE, together = d->x == 3 ? 1 : 2;
    for (int64_t o = 0; o < 4; o += together, w += together * part) {
        for (int64_t i = 0; i < tiles; ++i) {
            float *to = y + i * 16 * RBE_LANES + o * 16;
            if (d->x == 3)
                three(d, steps, x + i * x_tile, w, unit + i * 16, to, first);
            else if (d->w == 1)
                two_of_x(d, 1, steps, x + i * x_tile, w, unit + i * 16, to, first);
            else
                two_of_x(d, 2, steps, x + i * x_tile, w, unit + i * 16, to, first);
        }
    }
}

void rbe_digits_order__avx512amx(int64_t tokens, const float *y, const float *gain, const float *bias, float *out) {
    for (int64_t t = 0; t < tokens; ++t, y += RBE_LANES, out += RBE_LANES) {
        const __m512 a = _mm512_loadu_ps(y), b = _mm512_loadu_ps(y + 16), c = _mm512_loadu_ps(y + 32), d = _mm512_loadu_ps(y + 48);
        // lane L of register o -> lane o of register L
        const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x44), ab1 = _mm512_shuffle_f32x4(a, b, 0xEE);
        const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x44), cd1 = _mm512_shuffle_f32x4(c, d, 0xEE);
        const __m512 lines[4] = {_mm512_shuffle_f32x4(ab0, cd0, 0x88), _mm512_shuffle_f32x4(ab0, cd0, 0xDD),
                                 _mm512_shuffle_f32x4(ab1, cd1, 0x88), _mm512_shuffle_f32x4(ab1, cd1, 0xDD)};
        for (int l = 0; l < 4; ++l)
            _mm512_storeu_ps(out + l * 16, _mm512_fmadd_ps(lines[l], _mm512_loadu_ps(gain + l * 16), _mm512_loadu_ps(bias + l * 16)));
    }
}
