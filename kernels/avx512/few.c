// Additive codes of 8 bits and 4 or 8 tokens in float32: tables small enough for L1, a vector of tokens in each entry.
//
//     P[q, j, t] = sum over e of x[t, k g + e] basis[s, j, e],  q = k M + s;    y[i, t] += sum over q < count of P[q, idx[i, q], t]
//
// An entry is 16 or 32 bytes, so a lookup is one addition from memory. The codes of 64 rows come as columns of bytes; three rounds of unpacking
// put eight codes of a row side by side. Sums of a row run from the first code to the last.
#include <immintrin.h>
#include <string.h>

#include "places.h"

enum { TOGETHER = 4, AHEAD = 6 };  // groups that share a vector of the basis; tiles on that codes are asked for

static inline __attribute__((always_inline)) __m512 tokens_of(const float *x, const int width) {
    return width == 4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(x)) : _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
}

// Up to TOGETHER groups.
static inline __attribute__((always_inline)) void make(const int width, const int64_t groups, int64_t stages, int64_t g, int64_t depth, const float *x,
                                                       const float *turned, float *p) {
    const int64_t entries = 16 / width;  // in a vector
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i spread = width == 4 ? _mm512_srli_epi32(lane, 2) : _mm512_srli_epi32(lane, 3);
    for (int64_t s = 0; s < stages; ++s, turned += g * RBE_BASIS_VECTORS) {
        for (int64_t j = 0; j < RBE_BASIS_VECTORS; j += entries) {
            const __m512i pick = _mm512_add_epi32(spread, _mm512_set1_epi32((int)(j % 16)));
            __m512 sum[TOGETHER];
#pragma GCC unroll 4
            for (int64_t k = 0; k < groups; ++k) sum[k] = _mm512_setzero_ps();
            for (int64_t e = 0; e < depth; ++e) {
                const __m512 b = _mm512_permutexvar_ps(pick, _mm512_loadu_ps(turned + e * RBE_BASIS_VECTORS + j / 16 * 16));
#pragma GCC unroll 4
                for (int64_t k = 0; k < groups; ++k) sum[k] = _mm512_fmadd_ps(b, tokens_of(x + (k * g + e) * width, width), sum[k]);
            }
#pragma GCC unroll 4
            for (int64_t k = 0; k < groups; ++k) _mm512_storeu_ps(p + ((k * stages + s) * RBE_BASIS_VECTORS + j) * width, sum[k]);
        }
    }
}

static inline __attribute__((always_inline)) void make_all(const int width, int64_t groups, int64_t stages, int64_t g, int64_t depth, const float *x,
                                                           const float *turned, float *p) {
    for (; groups >= 4; groups -= 4, x += 4 * g * width, p += 4 * stages * RBE_BASIS_VECTORS * width) make(width, 4, stages, g, depth, x, turned, p);
    for (; groups >= 2; groups -= 2, x += 2 * g * width, p += 2 * stages * RBE_BASIS_VECTORS * width) make(width, 2, stages, g, depth, x, turned, p);
    if (groups) make(width, 1, stages, g, depth, x, turned, p);
}

void rbe_few_tables__avx512(int64_t groups, int64_t stages, int64_t g, int64_t depth, int64_t width, const float *x, const float *turned, float *p) {
    if (width == 4)
        make_all(4, groups, stages, g, depth, x, turned, p);
    else
        make_all(8, groups, stages, g, depth, x, turned, p);
}

static inline __attribute__((always_inline)) void add_row(const int width, const int64_t count, const uint16_t *place, const float *p, float *y) {
    __m256 sum = width == 4 ? _mm256_castps128_ps256(_mm_loadu_ps(y)) : _mm256_loadu_ps(y);
#pragma GCC unroll 8
    for (int64_t q = 0; q < count; ++q) {
        const float *entry = (const float *)(const void *)((const char *)(p + q * RBE_BASIS_VECTORS * width) + place[q]);
        if (width == 4)
            sum = _mm256_castps128_ps256(_mm_add_ps(_mm256_castps256_ps128(sum), _mm_loadu_ps(entry)));
        else
            sum = _mm256_add_ps(sum, _mm256_loadu_ps(entry));
    }
    if (width == 4)
        _mm_storeu_ps(y, _mm256_castps256_ps128(sum));
    else
        _mm256_storeu_ps(y, sum);
}

// 64 rows, in the order of turn_columns if `turned`.
static inline __attribute__((always_inline)) void add_tile(const int width, const int64_t count, const bool turned, const places *at, const float *p,
                                                           float *y) {
    for (int r = 0; r < 8; ++r) {
#pragma GCC unroll 8
        for (int l = 0; l < 8; ++l) add_row(width, count, at->of[8 * r + l], p, y + (turned ? row_of_place(8 * r + l) : 8 * r + l) * width);
    }
}

static inline __attribute__((always_inline)) void add_any(int64_t width, int64_t count, const bool turned, const places *at, const float *p, float *y) {
    if (width == 4 && count == 8)
        add_tile(4, 8, turned, at, p, y);
    else if (width == 4)
        add_tile(4, count, turned, at, p, y);
    else if (count == 4)
        add_tile(8, 4, turned, at, p, y);
    else if (count == 8)
        add_tile(8, 8, turned, at, p, y);
    else
        add_tile(8, count, turned, at, p, y);
}

void rbe_few_interleaved__avx512(int64_t rows, int64_t count, const uint8_t *idx, int64_t tile, int64_t width, const float *p, float *y) {
    const unsigned shift = width == 4 ? 4 : 5;  // an entry has 16 or 32 bytes
    places at;
    for (int64_t i = 0; i < rows; i += RBE_LANES, idx += tile) {
        for (int64_t q = 0; q < count; ++q)  // an integer, for it may lie outside the codes
            _mm_prefetch((const char *)((uintptr_t)idx + (uintptr_t)(AHEAD * tile + q * RBE_LANES)), _MM_HINT_T1);
        for (int64_t q = 0; q < count; q += 8) {
            const int64_t some = count - q < 8 ? count - q : 8;
            turn_columns(shift, idx + q * RBE_LANES, some, &at);
            add_any(width, some, true, &at, p + q * RBE_BASIS_VECTORS * width, y + i * width);
        }
    }
}

void rbe_few_rows__avx512(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t width, const float *p, float *y) {
    const unsigned shift = width == 4 ? 4 : 5;  // an entry has 16 or 32 bytes
    places at;
    for (int64_t i = 0; i < rows; i += RBE_LANES) {
        for (int64_t q = 0; q < count; q += 8) {
            const int64_t some = count - q < 8 ? count - q : 8;
            uint64_t line[RBE_LANES] = {0};  // rows that do not exist: nobody looks at their sums
            for (int64_t r = 0; r < RBE_LANES && i + r < rows; ++r) {
                const uint8_t *from = idx + (i + r) * idx_row + q;
                if (some == 8)
                    memcpy(&line[r], from, 8);
                else
                    memcpy(&line[r], from, (size_t)some);
            }
            for (int r = 0; r < RBE_LANES; r += 8) put_places(shift, _mm512_loadu_si512(line + r), r, &at);
            add_any(width, some, false, &at, p + q * RBE_BASIS_VECTORS * width, y + i * width);
        }
    }
}
