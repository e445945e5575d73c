// Additive codes of 8 bits and 4 or 8 tokens in float32: tables small enough for L1, a vector of tokens in each entry.
//
//     P[q, j, t] = sum over e of x[t, k g + e] basis[s, j, e],  q = k M + s;    y[i, t] += sum over q < count of P[q, idx[i, q], t]
//
// An entry is 16 or 32 bytes, so a lookup is one addition from memory. The codes of 64 rows come as columns of bytes; three rounds of unpacking
// put eight codes of a row side by side. Sums of a row run from the first code to the last.
#include <immintrin.h>
#include <string.h>

#include "../kernels.h"

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

// Where the entries of 64 rows and 8 codes lie in their tables, in bytes.
typedef struct places {
    uint16_t of[RBE_LANES][8];
} __attribute__((aligned(64))) places;

// `lines`: eight rows of eight codes.
static inline void put_places(int width, __m512i lines, int at, places *out) {
    const unsigned shift = width == 4 ? 4 : 5;  // an entry has 16 or 32 bytes
    _mm512_store_si512(out->of[at], _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(lines)), shift));
    _mm512_store_si512(out->of[at + 4], _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(lines, 1)), shift));
}

// Eight columns of 64 bytes; row 16 L + 2 r + b goes to 8 r + 2 L + b.
static inline void turn_columns(int width, const uint8_t *column, int64_t count, places *out) {
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
            put_places(width, _mm512_unpacklo_epi32(a[4 * h + i], a[4 * h + 2 + i]), (4 * h + 2 * i) * 8, out);
            put_places(width, _mm512_unpackhi_epi32(a[4 * h + i], a[4 * h + 2 + i]), (4 * h + 2 * i + 1) * 8, out);
        }
    }
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
        for (int l = 0; l < 8; ++l) add_row(width, count, at->of[8 * r + l], p, y + (turned ? l / 2 * 16 + 2 * r + l % 2 : 8 * r + l) * width);
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
    places at;
    for (int64_t i = 0; i < rows; i += RBE_LANES, idx += tile) {
        for (int64_t q = 0; q < count; ++q)  // an integer, for it may lie outside the codes
            _mm_prefetch((const char *)((uintptr_t)idx + (uintptr_t)(AHEAD * tile + q * RBE_LANES)), _MM_HINT_T1);
        for (int64_t q = 0; q < count; q += 8) {
            const int64_t some = count - q < 8 ? count - q : 8;
            turn_columns((int)width, idx + q * RBE_LANES, some, &at);
            add_any(width, some, true, &at, p + q * RBE_BASIS_VECTORS * width, y + i * width);
        }
    }
}

void rbe_few_rows__avx512(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t width, const float *p, float *y) {
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
            for (int r = 0; r < RBE_LANES; r += 8) put_places((int)width, _mm512_loadu_si512(line + r), r, &at);
            add_any(width, some, false, &at, p + q * RBE_BASIS_VECTORS * width, y + i * width);
        }
    }
}
