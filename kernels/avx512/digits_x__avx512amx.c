// x and the basis as signed digits of bytes, in the order in which digits_of_codes makes those of W (digits_w__avx512amx.c).
//
//     x[t, j] = unit[t] (x0 + x1 / base + x2 / base^2),   basis[s, j, e] = step (b0 + b1 / base + b2 / base^2)
//
// Place 4 c + r of a token's columns is column (4 Q + r) g + e, c = Q g + e: four groups side by side, one element of each. A step is 64 places.
#include <immintrin.h>
#include <string.h>

#include "../kernels.h"

enum { TILE = 1024, PLACES = 64 };

static inline __mmask16 first(int64_t n) { return n >= 16 ? (__mmask16)0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1u); }

// The largest |x|, or what is not finite, as bits.
static uint32_t largest(int64_t count, const float *x) {
    __m512i top = _mm512_setzero_si512();
    for (int64_t j = 0; j < count; j += 16)
        top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_maskz_loadu_epi32(first(count - j), x + j), _mm512_set1_epi32(0x7FFFFFFF)));
    return _mm512_reduce_max_epu32(top);
}

static inline float float_of(uint32_t bits) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)bits))); }

// Where 16 columns of four groups come from: groups that divide 16 lie one after the other, and so do the 64 places.
typedef struct order {
    int64_t g, cols;
    bool dense;
    __m512i place;  // of the bytes of a step, read 16 by 16
} order;

static order order_of(int64_t g, int64_t cols) {
    order o = {.g = g, .cols = cols, .dense = 16 % g == 0};
    uint8_t place[PLACES];
    for (int64_t c = 0; c < 16; ++c)
        for (int64_t r = 0; r < 4; ++r) place[4 * c + r] = (uint8_t)(o.dense ? (c / g * 4 + r) * g + c % g : r * 16 + c);
    o.place = _mm512_loadu_si512(place);
    return o;
}

// Columns of the places r, r + 4, .. of a step that are not dense; -1 beyond the last.
static inline __m512i columns_of(const order *o, int64_t step, int64_t r) {
    int32_t column[16];
    for (int64_t c = 0; c < 16; ++c) {
        const int64_t at = step * 16 + c, j = (at / o->g * 4 + r) * o->g + at % o->g;
        column[c] = j < o->cols ? (int32_t)j : -1;
    }
    return _mm512_loadu_si512(column);
}

static inline __m512 read16(const order *o, const float *x, int64_t step, int64_t r, __m512i column) {
    if (o->dense) {
        const int64_t j = step * PLACES + r * 16;
        return _mm512_maskz_loadu_ps(first(o->cols - j), x + j);
    }
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), _mm512_cmpge_epi32_mask(column, _mm512_setzero_si512()), column, x, 4);
}

static inline void take_digits(__m512 value, int digits, float base, __m128i *out) {
    // a hair up: what is left is then within -base/2 .. base/2 - 1 of the next digit, or by one beyond, which one more digit makes good
    const __m512 hair = _mm512_set1_ps(0x1p-9f);
    for (int d = 0; d < digits; ++d) {
        const __m512i digit = _mm512_cvtps_epi32(d + 1 < digits ? _mm512_add_ps(value, hair) : value);
        out[d] = _mm512_cvtsepi32_epi8(digit);
        value = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(out[d]))), _mm512_set1_ps(base));
    }
}

bool rbe_digits_of_tokens__avx512amx(const rbe_digits *digits, int64_t tokens, int64_t cols, const float *x, int64_t x_row, float *unit,
                                     int8_t *out) {
    const order o = order_of(digits->group, cols);
    const int64_t steps = rbe_digit_steps(digits->group, cols), tiles = digits->packed ? 1 : digits->x;
    const int64_t apart = digits->packed ? digits->packed * PLACES : TILE;
    bool finite = true;
    if (tokens < 16 || digits->packed) memset(out, 0, (size_t)(steps * tiles * TILE));
    for (int64_t t = 0; t < 16; ++t) {
        const uint32_t top = t < tokens ? largest(cols, x + t * x_row) : 0;
        finite &= top < 0x7F800000u;
        // a token of nothing but numbers below 1e-36 counts as zero: the inverse of its unit is not a float
        unit[t] = top < 0x03AA2425u ? 0.0f : float_of(top) / 126.0f;
    }
    for (int64_t step = 0; step < steps; ++step) {
        __m512i column[4];
        for (int64_t r = 0; r < 4; ++r) column[r] = o.dense ? _mm512_setzero_si512() : columns_of(&o, step, r);
        for (int64_t t = 0; t < tokens; ++t) {
            const __m512 scale = _mm512_set1_ps(unit[t] > 0.0f ? 1.0f / unit[t] : 0.0f);
            __m128i bytes[4][3];
            for (int64_t r = 0; r < 4; ++r)
                take_digits(_mm512_mul_ps(read16(&o, x + t * x_row, step, r, column[r]), scale), digits->x, digits->base, bytes[r]);
            for (int d = 0; d < digits->x; ++d) {
                const __m256i low = _mm256_setr_m128i(bytes[0][d], bytes[1][d]), high = _mm256_setr_m128i(bytes[2][d], bytes[3][d]);
                const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
                _mm512_storeu_si512(out + step * tiles * TILE + d * apart + t * PLACES, _mm512_permutexvar_epi8(o.place, all));
            }
        }
    }
    return finite;
}

// 16 vectors: entry e of basis vectors j .. j + 15
static inline __m512 entries(const float *basis, int64_t g, int64_t j, int64_t e) {
    const __m512i at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32((int)g));
    return _mm512_i32gather_ps(at, basis + j * g + e, 4);
}

bool rbe_digits_of_basis__avx512amx(rbe_digits *digits, const float *basis, int8_t *table) {
    const int64_t g = digits->group, size = RBE_BASIS_VECTORS * g, plane = digits->stages * size;
    float top = 0.0f;
    for (int64_t s = 0; s < digits->stages; ++s) {
        const uint32_t bits = largest(size, basis + s * size);
        if (bits >= 0x7F800000u) return false;
        top += float_of(bits);
    }
    digits->step = top / (127.0f - 0.5f * (float)digits->stages);
    if (!(digits->step < 1e37f)) return false;
    const __m512 scale = _mm512_set1_ps(digits->step > 1e-37f ? 1.0f / digits->step : 0.0f);
    for (int64_t s = 0; s < digits->stages; ++s) {
        // bytes that carry are unsigned below the first; half their range is added once, so that less than nothing has them too
        const __m512i offset = _mm512_set1_epi32(digits->carry && s == 0 ? 0x8080 : 0);
        for (int64_t e = 0; e < g; ++e) {
            int8_t *to = table + (s * g + e) * RBE_BASIS_VECTORS;
            for (int64_t j = 0; j < RBE_BASIS_VECTORS; j += 16) {
                const __m512 value = _mm512_mul_ps(entries(basis + s * size, g, j, e), scale);
                __m128i bytes[3];
                if (digits->carry) {
                    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(value, _mm512_set1_ps(65536.0f))), offset);
                    for (int d = 0; d < 3; ++d) bytes[d] = _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, 16u - 8u * (unsigned)d));
                } else {
                    take_digits(value, digits->w, digits->base, bytes);
                }
                for (int d = 0; d < digits->w; ++d) _mm_storeu_si128((__m128i *)(void *)(to + d * plane + j), bytes[d]);
            }
        }
    }
    return true;
}
