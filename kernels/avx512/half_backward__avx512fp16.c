// The codes' part of the backward in half precision, one group and stage and W = 64 or 128 tokens at a time: rows sorted by code, so that a code's P and
// dP stay in registers while the rows that use it pass by once.
//
//     d[p] (+)= unscale * dot(dy[row[p]], P[j])        dP[j] = sum over the places p of code j of factor[p] * dy[row[p]]
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

// Out of line: it is called once in DOTS places.
static __attribute__((noinline)) void add_dots(const __m512h *part, int count, float unscale, float *d, bool first) {
    const __m512h dots = sums_of(part);
    const __m512 back = _mm512_set1_ps(unscale);
    v_store_n(d, _mm512_fmadd_ps(low_half(dots), back, first ? v_zero() : v_load_n(d, count)), count);
    if (count > 16) v_store_n(d + 16, _mm512_fmadd_ps(high_half(dots), back, first ? v_zero() : v_load_n(d + 16, count - 16)), count - 16);
}

typedef struct walk {
    const uint32_t *place;
    const uint16_t *dy;
    float unscale, *d;  // of the first place of part
    bool first;
    int filled;
    __m512h *part;  // [DOTS], dots before their lanes are summed
} walk;

// Places of one code: at most PLACES, whose sums in float16 are left in sum.
V_INLINE void some_places(const int vecs, walk *s, int32_t place, int32_t stop, const __m512h *table, __m512h *sum) {
    const int64_t w = 32 * vecs;
    for (int v = 0; v < vecs; ++v) sum[v] = _mm512_setzero_ph();
    for (; place < stop; ++place) {
        const uint16_t *line = s->dy + (int64_t)(uint16_t)s->place[place] * w;
        const __m512h f = _mm512_castsi512_ph(_mm512_set1_epi16((short)(s->place[place] >> 16)));
        const char *soon = (const char *)(s->dy + (int64_t)(uint16_t)s->place[place + RBE_PLACES_AHEAD] * w);
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) __builtin_prefetch(soon + 64 * v);
        __m512h dot = _mm512_setzero_ph();
#pragma GCC unroll 4
        for (int v = 0; v < vecs; ++v) {
            const __m512h g = half_at(line + 32 * v);
            dot = v ? _mm512_fmadd_ph(g, table[v], dot) : _mm512_mul_ph(g, table[v]);
            sum[v] = _mm512_fmadd_ph(f, g, sum[v]);
        }
        s->part[s->filled++] = dot;
        if (s->filled < DOTS) continue;
        add_dots(s->part, DOTS, s->unscale, s->d, s->first);
        s->d += DOTS;
        s->filled = 0;
    }
}

// dP of one code in bfloat16, 32 tokens a vector.
V_INLINE void code_of(const int vecs, walk *s, int32_t place, int32_t end, const uint16_t *p, __m512i *dp) {
    __m512h table[VECS_MAX], sum[VECS_MAX];
    __m512 low[VECS_MAX], high[VECS_MAX];
    for (int v = 0; v < vecs; ++v) table[v] = half_at(p + 32 * v);
    for (bool first = true; first || place < end; first = false) {
        const int32_t stop = end - place < PLACES ? end : place + PLACES;
        some_places(vecs, s, place, stop, table, sum);
        place = stop;
        for (int v = 0; v < vecs; ++v) {
            low[v] = first ? low_half(sum[v]) : _mm512_add_ps(low[v], low_half(sum[v]));
            high[v] = first ? high_half(sum[v]) : _mm512_add_ps(high[v], high_half(sum[v]));
        }
    }
    for (int v = 0; v < vecs; ++v) dp[v] = (__m512i)_mm512_cvtne2ps_pbh(high[v], low[v]);
}

V_INLINE void all_codes(const int vecs, walk *s, const int32_t *start, const uint16_t *p, uint16_t *dp_rows, uint16_t *dp_cols) {
    const __m512i first16 = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), last16 = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (int j = 0; j < RBE_BASIS_VECTORS; j += 2) {
        __m512i dp[2][VECS_MAX];
        code_of(vecs, s, start[j], start[j + 1], p + j * 32 * vecs, dp[0]);
        code_of(vecs, s, start[j + 1], start[j + 2], p + (j + 1) * 32 * vecs, dp[1]);
        uint16_t *out = dp_cols + j / 32 * TILE + j % 32 / 2 * 32;
        for (int v = 0; v < vecs; ++v) {
            for (int h = 0; h < 2; ++h) _mm512_storeu_si512(dp_rows + v * RBE_BASIS_VECTORS * 32 + (j + h) * 32, dp[h][v]);
            const __m512i even = _mm512_unpacklo_epi16(dp[0][v], dp[1][v]), odd = _mm512_unpackhi_epi16(dp[0][v], dp[1][v]);  // quads of tokens
            _mm512_storeu_si512(out + 2 * v * (RBE_BASIS_VECTORS / 32) * TILE, _mm512_permutex2var_epi64(even, first16, odd));
            _mm512_storeu_si512(out + (2 * v + 1) * (RBE_BASIS_VECTORS / 32) * TILE, _mm512_permutex2var_epi64(even, last16, odd));
        }
    }
    for (int i = s->filled; s->filled && i < DOTS; ++i) s->part[i] = _mm512_setzero_ph();
    if (s->filled) add_dots(s->part, s->filled, s->unscale, s->d, s->first);
}

void rbe_half_backward__avx512fp16(const int32_t *start, const uint32_t *place, const uint16_t *dy, const uint16_t *p, int64_t w, float unscale, float *d,
                                   bool first, uint16_t *dp_rows, uint16_t *dp_cols) {
    __m512h part[DOTS];
    walk s = {.place = place, .dy = dy, .unscale = unscale, .d = d, .first = first, .part = part};
    if (w == 128)
        all_codes(4, &s, start, p, dp_rows, dp_cols);
    else
        all_codes(2, &s, start, p, dp_rows, dp_cols);
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
