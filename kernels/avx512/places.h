// Codes of 64 rows that stand side by side, turned into offsets of entries in tables, eight codes of a row together.
#ifndef RBE_PLACES_H
#define RBE_PLACES_H

#include <immintrin.h>

#include "../kernels.h"

// Where the entries of 64 rows and 8 codes lie in their tables, in bytes; an entry has 2^shift bytes.
typedef struct places {
    uint16_t of[RBE_LANES][8];
} __attribute__((aligned(64))) places;

// `lines`: eight rows of eight codes.
static inline void put_places(unsigned shift, __m512i lines, int at, places *out) {
    _mm512_store_si512(out->of[at], _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(lines)), shift));
    _mm512_store_si512(out->of[at + 4], _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(lines, 1)), shift));
}

// Up to eight columns of 64 bytes; row 16 L + 2 r + b goes to 8 r + 2 L + b.
static inline void turn_columns(unsigned shift, const uint8_t *column, int64_t count, places *out) {
    __m512i a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = i < count ? _mm512_loadu_si512(column + i * RBE_LANES) : _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_unpacklo_epi8(a[2 * i], a[2 * i + 1]);
        b[4 + i] = _mm512_unpackhi_epi8(a[2 * i], a[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm512_unpacklo_epi16(b[2 * i], b[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi16(b[2 * i], b[2 * i + 1]);
    }
    // of every 16 rows a has rows 0-3 of codes 0-3, rows 4-7 of those, rows 0-3 of codes 4-7, rows 4-7 of those, then the same of rows 8 on
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            put_places(shift, _mm512_unpacklo_epi32(a[4 * h + i], a[4 * h + 2 + i]), (4 * h + 2 * i) * 8, out);
            put_places(shift, _mm512_unpackhi_epi32(a[4 * h + i], a[4 * h + 2 + i]), (4 * h + 2 * i + 1) * 8, out);
        }
    }
}

static inline int64_t row_of_place(int64_t at) { return at % 8 / 2 * 16 + at / 8 * 2 + at % 2; }

#endif
