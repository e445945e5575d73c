// Products of bytes on the matrix unit, for additive codes of 8 bits in the fast class: W and x as one or two signed digits.
//
//     x[t, j] = unit[t] (xh + xl / base),  W[i, j] = step (wh + wl / base),  y[t, i] (+)= unit[t] step (sum of xh wh + sum of (xh wl + xl wh) / base)
//
// Sums are exact int32, so an error comes from rounding to digits alone. Without wl the last product is left out.
//
// A matrix of W's digits is made straight from interleaved codes: 64 rows are looked up at once in a table of 256 digits for every element of a
// group, and the stages are added as bytes (their digits leave room for that). A tile of the matrix unit holds 16 rows of W, and pairs of
// columns' bytes move side by side by unpacking within 128-bit lanes, so tile o has the rows
//
//     16 L + 4 o + j   in column 4 L + j,    L, j = 0..3,    o = 0..3
//
// and y is put in order at the end. A step is 64 columns:  x [step][2 digits][16 tokens][64],  W [step][digit][o][16 x 4 columns][16 rows][4].
#include <immintrin.h>

#include "../kernels.h"

enum { TILE = 1024 };

static inline __mmask16 first(int64_t n) { return n >= 16 ? (__mmask16)0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1u); }

bool rbe_digits_of_tokens__avx512amx(int64_t tokens, int64_t cols, const float *x, int64_t x_row, float base, float *unit, int8_t *out) {
    const int64_t steps = (cols + 63) / 64;
    bool finite = true;
    for (int64_t t = 0; t < 16; ++t) {
        const int64_t here = t < tokens ? cols : 0;
        __m512i top = _mm512_setzero_si512();
        for (int64_t j = 0; j < here; j += 16) {
            const __m512i entry = _mm512_maskz_loadu_epi32(first(here - j), x + t * x_row + j);
            top = _mm512_max_epu32(top, _mm512_and_si512(entry, _mm512_set1_epi32(0x7FFFFFFF)));
        }
        const uint32_t largest = _mm512_reduce_max_epu32(top);
        finite &= largest < 0x7F800000u;
        // a token of nothing but numbers below 1e-36 counts as zero: the inverse of its unit is not a float
        unit[t] = largest < 0x03AA2425u ? 0.0f : _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)largest))) / 126.0f;
        const __m512 scale = _mm512_set1_ps(unit[t] > 0.0f ? 1.0f / unit[t] : 0.0f);
        for (int64_t j = 0; j < steps * 64; j += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(first(here - j), x + t * x_row + j), scale);
            const __m512i high = _mm512_cvtps_epi32(value);
            const __m512 rest = _mm512_sub_ps(value, _mm512_cvtepi32_ps(high));
            const __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(rest, _mm512_set1_ps(base)));
            int8_t *to = out + j / 64 * 2 * TILE + t * 64 + j % 64;
            _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(void *)(to + TILE), _mm512_cvtepi32_epi8(low));
        }
    }
    return finite;
}

// 64 rows: the digit of one element of a group, stages added
static inline __m512i digit(int64_t stages, const uint8_t *column, const int8_t *table, int64_t stage_table) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t s = 0; s < stages; ++s, table += stage_table) {
        const __m512i code = _mm512_loadu_si512(column + s * RBE_LANES);
        const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), code, _mm512_loadu_si512(table + 64));
        const __m512i up = _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), code, _mm512_loadu_si512(table + 192));
        sum = _mm512_add_epi8(sum, _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, up));
    }
    return sum;
}

void rbe_digits_of_codes__avx512amx(int64_t columns, int64_t stages, int64_t g, const uint8_t *idx, const int8_t *table, int digits, int8_t *out) {
    const int64_t steps = (columns + 63) / 64, stage_table = g * RBE_BASIS_VECTORS;
    for (int64_t j = 0; j < steps * 64; j += 4) {
        const uint8_t *column = idx + j / g * stages * RBE_LANES;
        for (int d = 0; d < digits; ++d) {
            int8_t *to = out + (j / 64 * digits + d) * 4 * TILE + j % 64 / 4 * 64;
            if (j >= columns) {
                for (int o = 0; o < 4; ++o) _mm512_storeu_si512(to + o * TILE, _mm512_setzero_si512());
                continue;
            }
            const int8_t *element = table + (d * stages * g + j % g) * RBE_BASIS_VECTORS;
            __m512i v[4];
#pragma GCC unroll 4
            for (int e = 0; e < 4; ++e) v[e] = digit(stages, column, element + e * RBE_BASIS_VECTORS, stage_table);
            const __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpacklo_epi8(v[2], v[3]);
            const __m512i c = _mm512_unpackhi_epi8(v[0], v[1]), e = _mm512_unpackhi_epi8(v[2], v[3]);
            _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
            _mm512_storeu_si512(to + TILE, _mm512_unpackhi_epi16(a, b));
            _mm512_storeu_si512(to + 2 * TILE, _mm512_unpacklo_epi16(c, e));
            _mm512_storeu_si512(to + 3 * TILE, _mm512_unpackhi_epi16(c, e));
        }
    }
}

// Tiles 0, 1: sums of high products for two o; 2, 3: of mixed ones; 4, 5: x; 6, 7: W.
static inline __attribute__((always_inline)) void multiply(int64_t steps, const int8_t *x, const int8_t *w, const int digits) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, x += 2 * TILE, w += digits * 4 * TILE) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + TILE, 64);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + TILE, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
        if (digits == 1) continue;
        _tile_loadd(6, w + 4 * TILE, 64);
        _tile_loadd(7, w + 5 * TILE, 64);
        _tile_dpbssd(2, 4, 6);
        _tile_dpbssd(3, 4, 7);
    }
}

void rbe_digits_multiply__avx512amx(int64_t steps, const int8_t *x, const int8_t *w, int digits, float step, float base, const float *unit,
                                    float *y, bool first) {
    int32_t sums[4][16][16] __attribute__((aligned(64)));
    for (int o = 0; o < 4; o += 2) {
        if (digits == 1)
            multiply(steps, x, w + o * TILE, 1);
        else
            multiply(steps, x, w + o * TILE, 2);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int t = 0; t < 16; ++t) {
            const __m512 high = _mm512_set1_ps(unit[t] * step), low = _mm512_set1_ps(unit[t] * step / base);
            for (int p = 0; p < 2; ++p) {
                float *to = y + t * RBE_LANES + (o + p) * 16;
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[p][t])), high);
                value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[2 + p][t])), low, value);
                _mm512_storeu_ps(to, first ? value : _mm512_add_ps(_mm512_loadu_ps(to), value));
            }
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
