// 64 rows of W, summed from a basis that lies in L1, as split rows for the matrix unit (gemm_split__avx512amx.c): W in float32 is never stored.
#include "lookup.h"
#include "split.h"

static inline __mmask16 mask_of(int64_t cols, int64_t vector) { return first(cols - 16 * vector); }

static inline __attribute__((always_inline)) void split_vectors(const int stages, const int pieces, int64_t cols, int64_t v, int64_t some, const places *at,
                                                               const float *basis, uint16_t *out) {
    const int each = STAGES_MAX / stages;
    const int64_t tile_row = (cols + 31) / 32 * BLOCK;
    for (int64_t i = 0; i < some; i += 2, out += BLOCK) {
        const __mmask16 left = mask_of(cols, v + i), right = mask_of(cols, v + i + 1);
        const uint16_t *low = at[i / each].of[0] + i % each * 2 * stages, *high = at[(i + 1) / each].of[0] + (i + 1) % each * 2 * stages;
        for (int64_t r = 0; r < RBE_LANES; ++r) {
            const int64_t row = row_of_place(r);
            split(vector_of(stages, low + 8 * r, basis, left), right ? vector_of(stages, high + 8 * r, basis, right) : _mm512_setzero_ps(), pieces,
                  out + row / 16 * tile_row + row % 16 * 32);
        }
    }
}

void rbe_lookup_split__avx512amx(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, int pieces, uint16_t *out) {
    const int64_t vectors = (cols + 15) / 16;
    places at[CHUNK + 1];  // the second half of a last pair may not exist
    for (int64_t v = 0; v < vectors; v += CHUNK, out += CHUNK / 2 * BLOCK) {
        const int64_t some = vectors - v < CHUNK ? vectors - v : CHUNK;
        turn_vectors(stages, cols, v, some, idx, at);
#define SPLIT(stages_, pieces_) split_vectors(stages_, pieces_, cols, v, some, at, basis, out)
        switch (stages * 4 + pieces) {
            case 5: SPLIT(1, 1); break;
            case 7: SPLIT(1, 3); break;
            case 9: SPLIT(2, 1); break;
            case 11: SPLIT(2, 3); break;
            case 13: SPLIT(3, 1); break;
            case 15: SPLIT(3, 3); break;
            case 17: SPLIT(4, 1); break;
            default: SPLIT(4, 3);
        }
#undef SPLIT
    }
}
