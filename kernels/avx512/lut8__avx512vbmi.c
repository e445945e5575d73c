// Lookups of additive codes of 8 bits in tables of bytes: y[t, i] += factor * sum over q of (table[t, q, idx[i,q]] - offset).
//
//     table[t, q, j] = round(P[t, q, j] / factor[t, b]) + offset,   one factor for a block b of 64 codes
//
// One plane: a byte, offset 128, factor = the largest |P| of the block / 127. Three planes: 24 bits as three bytes, offset 2^23, factor a power of
// two, so that only the rounding to 2^-23 of the largest |P| is lost, less than a float32 sum of that length loses.
//
// A table of 256 bytes lives in four registers; two vpermi2b look 64 rows up at once and bit 7 of the code picks between them. Interleaved codes
// come as such registers; packed codes are row-major, so a square of 64 rows x 64 codes is turned first: registers r = 0..15 are loaded as
//
//     lane L of register r = bytes c .. c+15 of row 16 L + r                         (L = 0..3, 16 bytes a lane)
//
// and four rounds of unpack(r[i], r[i + 8]) turn the 16 x 16 bytes of every lane, which leaves register b = column c + b of rows 0..63.
// Sums of 64 bytes fit 16 bits: `all` adds a register as 16-bit lanes, `odd` its high bytes, and even rows are all - 256 odd.
#include <immintrin.h>
#include <math.h>

#include "../kernels.h"

enum { SQUARE = 64, AHEAD = 2, LINES_AHEAD = 16, TILES = 4 };  // tiles of 64 rows that share the loads of a table

// The bits of the largest |p|; not below those of infinity if any is not finite.
static inline uint32_t largest(int64_t count, const float *p) {
    __m512i top = _mm512_setzero_si512();
    const __m512i size = _mm512_set1_epi32(0x7FFFFFFF);
    for (int64_t i = 0; i < count; i += 16) top = _mm512_max_epu32(top, _mm512_and_si512(size, _mm512_loadu_si512(p + i)));
    return _mm512_reduce_max_epu32(top);
}

static inline void put_bytes(uint8_t *out, __m512i value) { _mm_storeu_si128((__m128i *)(void *)out, _mm512_cvtepi32_epi8(value)); }

static void quantise8(int64_t size, const float *p, float factor, uint8_t *table) {
    // below this 1 / factor is not a float: such a block counts as zero
    const __m512 scale = _mm512_set1_ps(factor > 1e-37f ? 1.0f / factor : 0.0f);
    for (int64_t i = 0; i < size; i += 16)
        put_bytes(table + i, _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(p + i), scale)), _mm512_set1_epi32(128)));
}

// [count][3][256], lowest byte first
static void quantise24(int64_t count, const float *p, float exponent, uint8_t *table) {
    const __m512 power = _mm512_set1_ps(-exponent);
    const __m512i top = _mm512_set1_epi32((1 << 24) - 1), middle = _mm512_set1_epi32(1 << 23);
    for (int64_t q = 0; q < count; ++q, table += 3 * RBE_BASIS_VECTORS) {
        for (int64_t j = 0; j < RBE_BASIS_VECTORS; j += 16, p += 16) {
            const __m512i step = _mm512_cvtps_epi32(_mm512_scalef_ps(_mm512_loadu_ps(p), power));
            const __m512i value = _mm512_min_epi32(_mm512_add_epi32(step, middle), top);  // 2^23 itself is a step too far
            put_bytes(table + j, value);
            put_bytes(table + RBE_BASIS_VECTORS + j, _mm512_srli_epi32(value, 8));
            put_bytes(table + 2 * RBE_BASIS_VECTORS + j, _mm512_srli_epi32(value, 16));
        }
    }
}

bool rbe_lut8_quantise__avx512vbmi(int64_t count, const float *p, int planes, uint8_t *table, float *factor) {
    const int64_t size = count * RBE_BASIS_VECTORS;
    const uint32_t top = largest(size, p);
    if (top >= 0x7F800000u) return false;
    const float most = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)top)));
    if (planes == 1) {
        *factor = most / 127.0f;
        quantise8(size, p, *factor, table);
    } else {
        const int exponent = top < 0x0C800000u ? -125 : (int)(top >> 23) - 126 - 23;  // most < 2^(exponent + 23); of the smallest floats, nothing
        *factor = ldexpf(1.0f, exponent);
        quantise24(count, p, (float)exponent, table);
    }
    return true;
}

// 64 rows x 64 codes, copied together: rows are often a power of two apart, where L1 would lose lines before their other bytes are read.
static inline void copy_square(const uint8_t *idx, int64_t rows, int64_t stride, int64_t count, __m512i *square) {
    const __mmask64 mask = count >= SQUARE ? ~0ull : (1ull << count) - 1;
    for (int64_t r = 0; r < SQUARE; ++r)  // rows that do not exist read the last one: nobody looks at their sums
        _mm512_store_si512(square + r, _mm512_maskz_loadu_epi8(mask, idx + (r < rows ? r : rows - 1) * stride));
}

static inline void turn16(const uint8_t *square, __m512i *column);

void rbe_turn_bytes__avx512vbmi(const uint8_t *in, int64_t in_row, uint8_t *out, int64_t out_row) {
    __m512i square[SQUARE], column[16];
    for (int64_t r = 0; r < SQUARE; ++r) square[r] = _mm512_loadu_si512(in + r * in_row);
    for (int c = 0; c < SQUARE; c += 16) {
        turn16((const uint8_t *)square + c, column);
        for (int b = 0; b < 16; ++b) _mm512_storeu_si512(out + (c + b) * out_row, column[b]);
    }
}

static inline __m512i four_rows(const uint8_t *square) {
    __m512i z = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)(const void *)square));
    z = _mm512_inserti32x4(z, _mm_load_si128((const __m128i *)(const void *)(square + 16 * SQUARE)), 1);
    z = _mm512_inserti32x4(z, _mm_load_si128((const __m128i *)(const void *)(square + 32 * SQUARE)), 2);
    return _mm512_inserti32x4(z, _mm_load_si128((const __m128i *)(const void *)(square + 48 * SQUARE)), 3);
}

// 16 columns of a square
static inline void turn16(const uint8_t *square, __m512i *column) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = four_rows(square + r * SQUARE);
#pragma GCC unroll 2
    for (int round = 0; round < 2; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            b[2 * i] = _mm512_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm512_unpackhi_epi8(a[i], a[i + 8]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            a[2 * i] = _mm512_unpacklo_epi8(b[i], b[i + 8]);
            a[2 * i + 1] = _mm512_unpackhi_epi8(b[i], b[i + 8]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) _mm512_store_si512(column + r, a[r]);
}

// 16 rows: their 16-bit sums of each plane -> y
static inline __attribute__((always_inline)) void add16(float *y, const __m512i *sums, int half, int planes, __m512 factor, __m512i offset) {
    __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 3
    for (int p = 0; p < planes; ++p) {
        const __m256i part = half ? _mm512_extracti64x4_epi64(sums[p], 1) : _mm512_castsi512_si256(sums[p]);
        total = _mm512_add_epi32(total, _mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 8 * (unsigned)p));
    }
    const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(total, offset));
    _mm512_storeu_ps(y, _mm512_fmadd_ps(value, factor, _mm512_loadu_ps(y)));
}

// `tiles` times 64 rows, `count` codes, one plane: a table is loaded once for all of them. ahead: where a line of codes is asked for at every step.
static inline __attribute__((always_inline)) void sum_bytes(const int tiles, int64_t count, const uint8_t *const *column, const uint8_t *table,
                                                            int64_t step, const uintptr_t *ahead, int64_t stride, __m512i *all, __m512i *odd) {
#pragma GCC unroll 4
    for (int r = 0; r < tiles; ++r) all[r] = odd[r] = _mm512_setzero_si512();
    for (int64_t q = 0; q < count; ++q, table += step) {
        const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
        const __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
#pragma GCC unroll 4
        for (int r = 0; r < tiles; ++r) {
            const __m512i code = _mm512_loadu_si512(column[r] + q * SQUARE);
            const __m512i low = _mm512_permutex2var_epi8(t0, code, t1), up = _mm512_permutex2var_epi8(t2, code, t3);
            const __m512i value = _mm512_mask_blend_epi8(_mm512_movepi8_mask(code), low, up);
            all[r] = _mm512_add_epi16(all[r], value);
            odd[r] = _mm512_add_epi16(odd[r], _mm512_srli_epi16(value, 8));
            if (ahead) _mm_prefetch((const char *)(ahead[r] + (uintptr_t)(q * stride)), _MM_HINT_T1);
        }
    }
}

// The same of every plane, one token, into y of 64 rows after 64 rows.
static inline __attribute__((always_inline)) void look_up(const int tiles, int64_t count, const uint8_t *const *column, const int planes,
                                                          const uint8_t *table, float factor, float *y, const uintptr_t *ahead, int64_t stride) {
    __m512i first[TILES][3], second[TILES][3];
#pragma GCC unroll 3
    for (int p = 0; p < planes; ++p) {
        __m512i all[TILES], odd[TILES];
        const uint8_t *plane = table + p * RBE_BASIS_VECTORS;
        if (p == 0 && ahead)
            sum_bytes(tiles, count, column, plane, planes * RBE_BASIS_VECTORS, ahead, stride, all, odd);
        else
            sum_bytes(tiles, count, column, plane, planes * RBE_BASIS_VECTORS, NULL, 0, all, odd);
#pragma GCC unroll 4
        for (int r = 0; r < tiles; ++r) {
            const __m512i even = _mm512_sub_epi16(all[r], _mm512_slli_epi16(odd[r], 8));
            // rows 0, 2, .. in even, 1, 3, .. in odd: interleave within lanes, then put the lanes in order
            const __m512i lo = _mm512_unpacklo_epi16(even, odd[r]), hi = _mm512_unpackhi_epi16(even, odd[r]);
            first[r][p] = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), hi);
            second[r][p] = _mm512_permutex2var_epi64(lo, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), hi);
        }
    }
    const __m512 f = _mm512_set1_ps(factor);
    const __m512i offset = _mm512_set1_epi32((int)(count << (8 * planes - 1)));
#pragma GCC unroll 4
    for (int r = 0; r < tiles; ++r, y += SQUARE) {
        add16(y, first[r], 0, planes, f, offset);
        add16(y + 16, first[r], 1, planes, f, offset);
        add16(y + 32, second[r], 0, planes, f, offset);
        add16(y + 48, second[r], 1, planes, f, offset);
    }
}

// What is looked up: `codes` a row, of which some from q0 on, every token.
typedef struct lookup {
    int64_t tokens, codes, q0;
    int planes;
    const uint8_t *table;
    const float *factor;
} lookup;

// Codes are asked for while the first token's are looked up.
static inline __attribute__((always_inline)) void look_up_all(const int tiles, const lookup *l, int64_t count, const uint8_t *const *column, float *y,
                                                              int64_t y_token, const uintptr_t *ahead, int64_t stride) {
    const int64_t blocks = (l->codes + SQUARE - 1) / SQUARE;
    for (int64_t t = 0; t < l->tokens; ++t) {
        const uint8_t *table = l->table + (t * l->codes + l->q0) * l->planes * RBE_BASIS_VECTORS;
        const float factor = l->factor[t * blocks + l->q0 / SQUARE];
        if (l->planes == 1)
            look_up(tiles, count, column, 1, table, factor, y + t * y_token, t ? NULL : ahead, stride);
        else
            look_up(tiles, count, column, 3, table, factor, y + t * y_token, t ? NULL : ahead, stride);
    }
}

void rbe_lut8_rows__avx512vbmi(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t tokens, int planes,
                               const uint8_t *table, const float *factor, float *y, int64_t y_token) {
    const int64_t blocks = (count + SQUARE - 1) / SQUARE;
    __m512i square[SQUARE], column[SQUARE];
    lookup l = {tokens, count, 0, planes, table, factor};
    for (int64_t b = 0; b < blocks; ++b) {
        l.q0 = b * SQUARE;
        const int64_t some = count - l.q0 < SQUARE ? count - l.q0 : SQUARE;
        for (int64_t i = 0; i < rows; i += SQUARE) {
            copy_square(idx + i * idx_row + l.q0, rows - i, idx_row, some, square);
            for (int c = 0; c < SQUARE; c += 16) turn16((const uint8_t *)square + c, column + c);
            // two squares on, or the first ones of the rows that come next; an integer, for it may lie outside the codes
            const int64_t on = b + 2 < blocks ? i * idx_row + l.q0 + 2 * SQUARE : (i + rows) * idx_row + (b + 2 - blocks) * SQUARE;
            const uint8_t *const at = (const uint8_t *)column;
            const uintptr_t ahead = (uintptr_t)idx + (uintptr_t)on;
            look_up_all(1, &l, some, &at, y + i, y_token, &ahead, idx_row);
        }
    }
}

// Rows of `tiles` times 64 at a time, whose codes are streams; every table passes from L2 for each of them.
static inline __attribute__((always_inline)) void look_up_streams(const int tiles, lookup *l, const uint8_t *idx, float *y, int64_t y_token) {
    for (l->q0 = 0; l->q0 < l->codes; l->q0 += SQUARE) {
        const uint8_t *column[TILES];
        uintptr_t ahead[TILES];
        for (int r = 0; r < tiles; ++r) {
            column[r] = idx + (r * l->codes + l->q0) * SQUARE;
            ahead[r] = (uintptr_t)column[r] + LINES_AHEAD * SQUARE;
        }
        look_up_all(tiles, l, l->codes - l->q0 < SQUARE ? l->codes - l->q0 : SQUARE, column, y, y_token, ahead, SQUARE);
    }
}

// 64 codes of all rows at a time, so that their tables stay in L1.
static void look_up_blocks(int64_t tiles, lookup *l, const uint8_t *idx, float *y, int64_t y_token) {
    const int64_t count = l->codes;
    for (l->q0 = 0; l->q0 < count; l->q0 += SQUARE) {
        const int64_t some = count - l->q0 < SQUARE ? count - l->q0 : SQUARE;
        for (int64_t i = 0; i < tiles;) {
            const int together = tiles - i < TILES ? 1 : TILES;
            const uint8_t *column[TILES];
            uintptr_t ahead[TILES];
            for (int r = 0; r < together; ++r) {
                // so many tiles on in the order of reading
                const int64_t next = i + r + (together == 1 ? AHEAD : TILES), on = next < tiles ? next * count : (next - tiles) * count + SQUARE;
                column[r] = idx + ((i + r) * count + l->q0) * SQUARE;
                ahead[r] = (uintptr_t)idx + (uintptr_t)((on + l->q0) * SQUARE);
            }
            if (together == 1)
                look_up_all(1, l, some, column, y + i * SQUARE, y_token, ahead, SQUARE);
            else
                look_up_all(TILES, l, some, column, y + i * SQUARE, y_token, ahead, SQUARE);
            i += together;
        }
    }
}

void rbe_lut8_interleaved__avx512vbmi(int64_t rows, int64_t count, const uint8_t *idx, int64_t tokens, int planes, const uint8_t *table,
                                      const float *factor, float *y, int64_t y_token) {
    const int64_t tiles = (rows + SQUARE - 1) / SQUARE;
    lookup l = {tokens, count, 0, planes, table, factor};
    if (!rbe_lut8_streams(tokens, count, planes)) {
        look_up_blocks(tiles, &l, idx, y, y_token);
        return;
    }
    int64_t i = 0;
    for (; i + TILES <= tiles; i += TILES) look_up_streams(TILES, &l, idx + i * count * SQUARE, y + i * SQUARE, y_token);
    for (; i < tiles; ++i) look_up_streams(1, &l, idx + i * count * SQUARE, y + i * SQUARE, y_token);
}
