// Sums of products of bytes in tiles, and from there to y: what integer__avx512amx.c and digits_stream__avx512amx.c share.
#ifndef RBE_INTEGER_H
#define RBE_INTEGER_H

#include <immintrin.h>

#include "../kernels.h"

enum { TILE = 1024 };

typedef struct sums {
    int32_t of[4][16][16];
} __attribute__((aligned(64))) sums;

// 16 rows of W and a token: y (+)= unit step (s0 + s1 / base + s2 / base^2 + s3 / base^3)
static inline void put_line(int powers, const __m512i *sum, float factor, const float *inverse, float *y, bool first) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[0]), _mm512_set1_ps(factor));
    for (int p = 1; p < powers; ++p) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[p]), _mm512_set1_ps(factor * inverse[p]), value);
    _mm512_storeu_ps(y, first ? value : _mm512_add_ps(_mm512_loadu_ps(y), value));
}

static inline void inverse_powers(float base, float out[5]) {
    out[0] = 1.0f;
    for (int p = 1; p < 5; ++p) out[p] = out[p - 1] / base;
}

static inline __attribute__((always_inline)) void put(const rbe_digits *d, const int powers, const sums *s, const float *unit, float *y,
                                                      bool first) {
    float inverse[5];
    inverse_powers(d->base, inverse);
    for (int t = 0; t < 16; ++t) {
        __m512i sum[4];
        for (int p = 0; p < powers; ++p) sum[p] = _mm512_load_si512(s->of[p][t]);
        put_line(powers, sum, unit[t] * d->step, inverse, y + t * RBE_LANES, first);
    }
}

// The same of packed tokens: of[w] has rows of x's digit d at d * packed. Sums of a power are added as integers, exactly.
static inline __attribute__((always_inline)) void put_packed(const rbe_digits *d, const int w, const int x, const sums *s, const float *unit,
                                                             float *y, bool first) {
    float inverse[5];
    inverse_powers(d->base, inverse);
    for (int t = 0; t < d->packed; ++t) {
        __m512i sum[5];
        for (int p = 0; p < w + x - 1; ++p) sum[p] = _mm512_setzero_si512();
        for (int i = 0; i < w; ++i)
            for (int j = 0; j < x; ++j) sum[i + j] = _mm512_add_epi32(sum[i + j], _mm512_load_si512(s->of[i][j * d->packed + t]));
        put_line(w + x - 1, sum, unit[t] * d->step, inverse, y + t * RBE_LANES, first);
    }
}

#define ZERO4()    \
    _tile_zero(0); \
    _tile_zero(1); \
    _tile_zero(2); \
    _tile_zero(3)

static inline void put_packed_more(const rbe_digits *d, const sums *s, const float *unit, float *y, bool first) {
    if (d->w == 2)
        put_packed(d, 2, 2, s, unit, y, first);
    else
        put_packed(d, 3, 3, s, unit, y, first);
}

// Four o, packed tokens, one digit of W.
static inline void add_four(int64_t steps, const int8_t *x, const int8_t *w) {
    const int64_t part = steps * TILE;
    for (int64_t step = 0; step < steps; ++step, x += TILE, w += TILE) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, w, 64);
        _tile_dpbssd(0, 4, 5);
        _tile_loadd(6, w + part, 64);
        _tile_dpbssd(1, 4, 6);
        _tile_loadd(7, w + 2 * part, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_loadd(5, w + 3 * part, 64);
        _tile_dpbssd(3, 4, 5);
    }
}

// x of two digits, W of `digits`, two o. Tiles 0, 1: sums of first products; 2, 3: of mixed ones; 4, 5: x; 6, 7: W.
static inline __attribute__((always_inline)) void add_two(const int digits, int64_t steps, const int8_t *x, const int8_t *w) {
    const int64_t part = steps * digits * TILE;
    for (int64_t step = 0; step < steps; ++step, x += 2 * TILE, w += digits * TILE) {
        _tile_loadd(4, x, 64);
        _tile_loadd(6, w, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, w + part, 64);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, x + TILE, 64);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        if (digits == 1) continue;
        _tile_loadd(6, w + TILE, 64);
        _tile_dpbssd(2, 4, 6);
        _tile_loadd(7, w + part + TILE, 64);
        _tile_dpbssd(3, 4, 7);
    }
}

static inline void put_two(const rbe_digits *d, sums *s, const float *unit, float *y, bool first) {
    _tile_stored(0, s->of[0], 64);
    _tile_stored(2, s->of[1], 64);
    put(d, 2, s, unit, y, first);
    _tile_stored(1, s->of[0], 64);
    _tile_stored(3, s->of[1], 64);
    put(d, 2, s, unit, y + 16, first);
}

#endif
