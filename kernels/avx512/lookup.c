// Additive codes of 8 bits, groups of 8 and up to 16 tokens in float32: W is summed from a basis that lies in L1 and multiplied at once, 16 columns
// in a register.
//
//     y[i, t] = sum over columns j of x[t, j] sum over s of basis[s, idx[i, j / 8, s], j % 8]
//
// 16 sums stay in registers, of 16 / tokens rows, and their lanes are added up every CHUNK vectors of columns: x and the offsets of those stay in L1
// beside the basis.
#define RBE_SIMD_AVX512
#include "lookup.h"
#include "../simd/simd.h"

enum { SUMS = 16 };

// All 64 rows, in the order of turn_columns. last: the columns of the last vector that exist.
V_INLINE void add_vectors(const int stages, const int tokens, int64_t vectors, __mmask16 last, const places *at, uintptr_t ahead,
                         const float *basis, const float *x, float *y) {
    const int each = STAGES_MAX / stages, rows = SUMS / tokens;
    for (int r0 = 0; r0 < RBE_LANES; r0 += rows, y += SUMS) {
        __m512 sum[SUMS];
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; ++i) sum[i] = _mm512_setzero_ps();
        for (int64_t line = 2 * stages * vectors * r0 / RBE_LANES; line < 2 * stages * vectors * (r0 + rows) / RBE_LANES; ++line)
            _mm_prefetch((const char *)(ahead + (uintptr_t)(line * RBE_LANES)), _MM_HINT_T1);
        for (int64_t v = 0; v < vectors; ++v) {
            const __mmask16 mask = v + 1 < vectors ? (__mmask16)0xFFFF : last;
            const uint16_t *place = at[v / each].of[r0] + v % each * 2 * stages;
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const __m512 w = vector_of(stages, place + 8 * r, basis, mask);
#pragma GCC unroll 16
                for (int t = 0; t < tokens; ++t)
                    sum[r * tokens + t] = _mm512_fmadd_ps(w, _mm512_loadu_ps(x + (v * tokens + t) * 16), sum[r * tokens + t]);
            }
        }
        v_store(y, v_add(v_load(y), v_sums(sum)));
    }
}

V_INLINE void add_tokens(const int stages, int64_t tokens, int64_t vectors, __mmask16 last, const places *at, uintptr_t ahead,
                         const float *basis, const float *x, float *y) {
    if (tokens == 1)
        add_vectors(stages, 1, vectors, last, at, ahead, basis, x, y);
    else if (tokens == 4)
        add_vectors(stages, 4, vectors, last, at, ahead, basis, x, y);
    else if (tokens == 8)
        add_vectors(stages, 8, vectors, last, at, ahead, basis, x, y);
    else
        add_vectors(stages, 16, vectors, last, at, ahead, basis, x, y);
}

void rbe_lookup_rows__avx512(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, const float *x, int64_t tokens, float *y) {
    const int64_t vectors = (cols + 15) / 16;
    places at[CHUNK];
    float sums[RBE_LANES * SUMS] __attribute__((aligned(64))) = {0};
    for (int64_t v = 0; v < vectors; v += CHUNK, x += CHUNK * tokens * 16) {
        const int64_t some = vectors - v < CHUNK ? vectors - v : CHUNK;
        turn_vectors(stages, cols, v, some, idx, at);
        const uintptr_t ahead = (uintptr_t)idx + (uintptr_t)((v + CHUNK) * 2 * stages * RBE_LANES);  // the next vectors', or outside any array
        const __mmask16 last = v + some < vectors || cols % 16 == 0 ? (__mmask16)0xFFFF : (__mmask16)((1u << cols % 16) - 1u);
        switch (stages) {
            case 1: add_tokens(1, tokens, some, last, at, ahead, basis, x, sums); break;
            case 2: add_tokens(2, tokens, some, last, at, ahead, basis, x, sums); break;
            case 3: add_tokens(3, tokens, some, last, at, ahead, basis, x, sums); break;
            default: add_tokens(4, tokens, some, last, at, ahead, basis, x, sums);
        }
    }
    for (int64_t i = 0; i < RBE_LANES; ++i)
        for (int64_t t = 0; t < tokens; ++t) y[row_of_place(i) * tokens + t] = sums[i * tokens + t];
}
