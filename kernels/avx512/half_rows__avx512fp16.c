// The sums over codes of the half-precision path, in float16:
//
//     y[i, 0..W) = (y[i] if not first) + sum over q of scale[i,q] P[q, idx[i,q], 0..W)        W is 32 or 64
//
// RBE_HALF_CODES codes are summed by themselves before they are added to y: a multiply-add is rounded at 2^-12 of the sum so far, and short sums are
// small. A line of P is half as long as in float32, and so is y: lines that come from L2 are what the time goes to.
#include <immintrin.h>

#include "../kernels.h"

#define INLINE static inline __attribute__((always_inline))

INLINE __m512h half_at(const uint16_t *p) { return _mm512_castsi512_ph(_mm512_loadu_si512(p)); }

// `rows` rows at once, so that several lines of P are on their way.
INLINE void rows_of(const int rows, const int vecs, const bool scaled, int64_t count, const uint8_t *idx, const uint16_t *scale, int64_t code_row,
                    const uint16_t *p, uint16_t *y, bool first) {
    const int64_t w = vecs * 32;
    for (int64_t q0 = 0; q0 < count; q0 += RBE_HALF_CODES, first = false) {
        const int64_t end = count - q0 < RBE_HALF_CODES ? count : q0 + RBE_HALF_CODES;
        __m512h acc[8][2];
        for (int r = 0; r < rows; ++r)
            for (int v = 0; v < vecs; ++v) acc[r][v] = _mm512_setzero_ph();
        for (int64_t q = q0; q < end; ++q, p += RBE_BASIS_VECTORS * w) {
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                const uint16_t *line = p + idx[r * code_row + q] * w;
                const __m512h s = _mm512_castsi512_ph(_mm512_set1_epi16(scaled ? (short)scale[r * code_row + q] : 0));
#pragma GCC unroll 2
                for (int v = 0; v < vecs; ++v)
                    acc[r][v] = scaled ? _mm512_fmadd_ph(s, half_at(line + v * 32), acc[r][v]) : _mm512_add_ph(half_at(line + v * 32), acc[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < vecs; ++v) {
                uint16_t *out = y + r * w + v * 32;
                _mm512_storeu_si512(out, _mm512_castph_si512(first ? acc[r][v] : _mm512_add_ph(half_at(out), acc[r][v])));
            }
        }
    }
}

INLINE void all_rows(const int vecs, const bool scaled, int64_t rows, int64_t count, const uint8_t *idx, const uint16_t *scale, int64_t code_row,
                     const uint16_t *p, uint16_t *y, bool first) {
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8)
        rows_of(8, vecs, scaled, count, idx + i * code_row, scaled ? scale + i * code_row : NULL, code_row, p, y + i * vecs * 32, first);
    for (; i < rows; ++i)
        rows_of(1, vecs, scaled, count, idx + i * code_row, scaled ? scale + i * code_row : NULL, code_row, p, y + i * vecs * 32, first);
}

void rbe_half_rows__avx512fp16(int64_t rows, int64_t count, const uint8_t *idx, const uint16_t *scale, int64_t code_row, const uint16_t *p, int64_t w,
                               uint16_t *y, bool first) {
    if (w == 64 && scale)
        all_rows(2, true, rows, count, idx, scale, code_row, p, y, first);
    else if (w == 64)
        all_rows(2, false, rows, count, idx, scale, code_row, p, y, first);
    else if (scale)
        all_rows(1, true, rows, count, idx, scale, code_row, p, y, first);
    else
        all_rows(1, false, rows, count, idx, scale, code_row, p, y, first);
}

void rbe_half_widen__avx512fp16(int64_t rows, int64_t w, const uint16_t *sums, const rbe_half_finish *finish, float *out, bool first) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t t = 0; t < w; t += 16, sums += 16, out += 16) {
            __m512 y = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)sums));
            if (!first) y = _mm512_add_ps(_mm512_loadu_ps(out), y);
            if (finish)
                y = _mm512_fmadd_ps(_mm512_mul_ps(y, _mm512_loadu_ps(finish->unscale + t)), _mm512_set1_ps(finish->gain[i]),
                                    _mm512_set1_ps(finish->bias ? finish->bias[i] : 0.0f));
            _mm512_storeu_ps(out, y);
        }
    }
}

// Bits are compared: NaN and infinity are larger than every number.
float rbe_largest__avx512fp16(int64_t count, const float *x) {
    const __m512i size = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i a = _mm512_setzero_si512(), b = a;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        a = _mm512_max_epi32(a, _mm512_and_si512(size, _mm512_loadu_si512(x + i)));
        b = _mm512_max_epi32(b, _mm512_and_si512(size, _mm512_loadu_si512(x + i + 16)));
    }
    for (; i < count; i += 16) {
        const __mmask16 mask = count - i >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << (count - i)) - 1u);
        a = _mm512_max_epi32(a, _mm512_and_si512(size, _mm512_maskz_loadu_epi32(mask, x + i)));
    }
    return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b)))));
}
