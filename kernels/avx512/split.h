// A float32 as the sum of bfloat16 pieces, put where the matrix unit reads them (gemm_split__avx512amx.c).
#ifndef RBE_SPLIT_H
#define RBE_SPLIT_H

#include <immintrin.h>
#include <stdint.h>

enum { TILE = 512, PIECES = 3, BLOCK = PIECES * TILE };  // bfloat16 values

static inline __mmask16 first(int64_t n) { return n >= 16 ? (__mmask16)0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1u); }

// The leading 16 bits of 16 pairs.
static inline void put_pairs(__m512 low, __m512 high, uint16_t *out) {
    const __m512i l = _mm512_srli_epi32(_mm512_castps_si512(low), 16), h = _mm512_castps_si512(high);
    _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xAAAAAAAAu, l, h));
}

static inline __m512 cut_off(__m512 x) {
    return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0xFFFF0000u))));
}

// So that the leading 16 bits are the nearest ones.
static inline __m512 rounded(__m512 x) { return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000))); }

// The pieces of 16 pairs, TILE apart; the last one is rounded. NaN and infinity stay non-finite: what is cut off of them is NaN.
static inline void split(__m512 low, __m512 high, int pieces, uint16_t *out) {
    for (int piece = 0; piece + 1 < pieces; ++piece, out += TILE) {
        put_pairs(low, high, out);
        low = cut_off(low);
        high = cut_off(high);
    }
    put_pairs(rounded(low), rounded(high), out);
}

#endif
