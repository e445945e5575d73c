// The codes' part of the backward in half precision, one group and stage and W = 64 or 128 tokens at a time: rows sorted by code, so that a code's P and
// dP stay in registers while the rows that use it pass by once.
//
//     d[p] += unscale * dot(dy[row[p]], P[j])          dP[j] = sum over the places p of code j of factor[p] * dy[row[p]]
//
// dy, P and factor are float16, dots are summed in float16 (W products of which the caller knows that they stay in range), dP over PLACES places in
// float16 and then in float32. dP leaves in bfloat16 as both operands that the matrix unit needs (half_products__avx512amx.c):
//     dp_rows [W / 32 steps][256 / 16][16 codes][32 tokens]          dp_cols [W / 16][256 / 32 steps][16 pairs of codes][16 tokens][2]
#define RBE_SIMD_AVX512
#include "../kernels.h"
#include "../simd/simd.h"

enum { TILE = 512, PLACES = 32, DOTS = 32, VECS_MAX = RBE_HALF_WIDTH / 32 };  // bfloat16 values of a tile

V_INLINE __m512h half_at(const uint16_t *p) { return _mm512_castsi512_ph(_mm512_loadu_si512(p)); }
V_INLINE __m512i add_pairs(__m512i low, __m512i high) { return _mm512_castph_si512(_mm512_add_ph(_mm512_castsi512_ph(low), _mm512_castsi512_ph(high))); }

// lane r = sum of the lanes of part[r]
V_INLINE __m512h sums_of(const __m512h *part) {
    __m512i a[16], b[8], c[4], e[2];
    for (int i = 0; i < 16; ++i) {
        const __m512i x = _mm512_castph_si512(part[2 * i]), y = _mm512_castph_si512(part[2 * i + 1]);
        a[i] = add_pairs(_mm512_unpacklo_epi16(x, y), _mm512_unpackhi_epi16(x, y));
    }
    for (int i = 0; i < 8; ++i) b[i] = add_pairs(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; ++i) c[i] = add_pairs(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]), _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        e[i] = add_pairs(_mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0xDD));
    return _mm512_castsi512_ph(add_pairs(_mm512_shuffle_i32x4(e[0], e[1], 0x88), _mm512_shuffle_i32x4(e[0], e[1], 0xDD)));
}

V_INLINE __m512 low_half(__m512h x) { return _mm512_cvtxph_ps(_mm256_castsi256_ph(_mm512_castsi512_si256(_mm512_castph_si512(x)))); }
V_INLINE __m512 high_half(__m512h x) { return _mm512_cvtxph_ps(_mm256_castsi256_ph(_mm512_extracti64x4_epi64(_mm512_castph_si512(x), 1))); }

V_INLINE void add_dots(const __m512h *part, int count, __m512 unscale, float *d) {
    const __m512h dots = sums_of(part);
    v_store_n(d, _mm512_fmadd_ps(low_half(dots), unscale, v_load_n(d, count)), count);
    if (count > 16) v_store_n(d + 16, _mm512_fmadd_ps(high_half(dots), unscale, v_load_n(d + 16, count - 16)), count - 16);
}

V_INLINE void places_of(const int vecs, const int32_t *start, const int32_t *row, const uint16_t *factor, const uint16_t *dy, const uint16_t *p,
                        float unscale, float *d, uint16_t *dp_rows, uint16_t *dp_cols) {
    const int64_t w = 32 * vecs;
    const __m512 back = _mm512_set1_ps(unscale);
    // 0, 16, 1, 17, ...
    const __m512i pairs = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(vi_iota(), _mm512_set1_epi32(0x10001)));
    __m512h part[DOTS];  // before their lanes are summed
    int filled = 0;
    int32_t done = 0;
    for (int j = 0; j < RBE_BASIS_VECTORS; j += 2) {
        __m512 acc[2][2 * VECS_MAX];
        for (int h = 0; h < 2; ++h) {
            __m512h table[VECS_MAX];
            for (int v = 0; v < vecs; ++v) {
                table[v] = half_at(p + (j + h) * w + 32 * v);
                acc[h][2 * v] = acc[h][2 * v + 1] = _mm512_setzero_ps();
            }
            for (int32_t place = start[j + h], end = start[j + h + 1]; place < end;) {
                const int32_t stop = end - place < PLACES ? end : place + PLACES;
                __m512h sum[VECS_MAX];
                for (int v = 0; v < vecs; ++v) sum[v] = _mm512_setzero_ph();
                for (; place < stop; ++place) {
                    const uint16_t *line = dy + (int64_t)row[place] * w;
                    const __m512h f = _mm512_castsi512_ph(_mm512_set1_epi16((short)factor[place]));
                    const char *soon = (const char *)(dy + (int64_t)row[place + RBE_PLACES_AHEAD] * w);
#pragma GCC unroll 4
                    for (int v = 0; v < vecs; ++v) __builtin_prefetch(soon + 64 * v);
                    __m512h dot = _mm512_setzero_ph();
#pragma GCC unroll 4
                    for (int v = 0; v < vecs; ++v) {
                        const __m512h g = half_at(line + 32 * v);
                        dot = v ? _mm512_fmadd_ph(g, table[v], dot) : _mm512_mul_ph(g, table[v]);
                        sum[v] = _mm512_fmadd_ph(f, g, sum[v]);
                    }
                    part[filled++] = dot;
                    if (filled < DOTS) continue;
                    add_dots(part, DOTS, back, d + done);
                    done += DOTS;
                    filled = 0;
                }
                for (int v = 0; v < vecs; ++v) {
                    acc[h][2 * v] = _mm512_add_ps(acc[h][2 * v], low_half(sum[v]));
                    acc[h][2 * v + 1] = _mm512_add_ps(acc[h][2 * v + 1], high_half(sum[v]));
                }
            }
            for (int v = 0; v < vecs; ++v)
                _mm512_storeu_si512(dp_rows + v * RBE_BASIS_VECTORS * 32 + (j + h) * 32, (__m512i)_mm512_cvtne2ps_pbh(acc[h][2 * v + 1], acc[h][2 * v]));
        }
        uint16_t *out = dp_cols + j / 32 * TILE + j % 32 / 2 * 32;
        for (int v = 0; v < 2 * vecs; ++v)
            _mm512_storeu_si512(out + v * (RBE_BASIS_VECTORS / 32) * TILE,
                                _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(acc[1][v], acc[0][v])));
    }
    for (int i = filled; filled && i < DOTS; ++i) part[i] = _mm512_setzero_ph();
    if (filled) add_dots(part, filled, back, d + done);
}

void rbe_half_backward__avx512fp16(const int32_t *start, const int32_t *row, const uint16_t *factor, const uint16_t *dy, const uint16_t *p, int64_t w,
                                   float unscale, float *d, uint16_t *dp_rows, uint16_t *dp_cols) {
    if (w == 128)
        places_of(4, start, row, factor, dy, p, unscale, d, dp_rows, dp_cols);
    else
        places_of(2, start, row, factor, dy, p, unscale, d, dp_rows, dp_cols);
}

void rbe_half_turn__avx512fp16(int64_t tokens, int64_t cols, const float *a, int64_t a_row, const float *scale, int64_t w, uint16_t *out) {
    for (int64_t c = 0; c < cols; c += 16) {
        const int64_t some = cols - c < 16 ? cols - c : 16;
        vf square[2][16];
        for (int h = 0; h < 2; ++h) {
            for (int64_t i = 0, t = 16 * h; i < 16; ++i, ++t)
                square[h][i] = t < tokens ? v_mul(v_load_n(a + t * a_row + c, some), v_set1(scale[t])) : v_zero();
            v_transpose(square[h]);
        }
        for (int64_t i = 0; i < some; ++i) {
            v_store_f16(out + (c + i) * w, square[0][i]);
            v_store_f16(out + (c + i) * w + 16, square[1][i]);
        }
    }
}
