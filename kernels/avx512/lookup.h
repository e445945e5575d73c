// Rows of W summed from a basis that lies in L1: codes of one byte, groups of 8, up to 4 stages, 16 columns (a vector) of a row at a time.
#ifndef RBE_LOOKUP_H
#define RBE_LOOKUP_H

#include "places.h"

enum { G = 8, CHUNK = 16, STAGES_MAX = 4 };  // CHUNK: vectors whose offsets stay in L1 beside the basis

// Where the codes of `some` vectors from v on, at most CHUNK, have their entries, for 64 rows of interleaved codes. Vector v + i is in at[i / each],
// from place i % each * 2 * stages on, each = STAGES_MAX / stages.
static inline void turn_vectors(int64_t stages, int64_t cols, int64_t v, int64_t some, const uint8_t *idx, places *at) {
    const int64_t count = (cols + G - 1) / G * stages, each = STAGES_MAX / stages, block = each * 2 * stages;
    for (int64_t b = 0; b * each < some; ++b) {
        const int64_t q = (v / each + b) * block, here = count - q < block ? count - q : block;
        turn_columns(5, idx + q * RBE_LANES, here, at + b);
    }
}

// 8 columns
static inline __attribute__((always_inline)) __m256 half_of(const int stages, const uint16_t *place, const float *basis) {
    __m256 sum = _mm256_loadu_ps((const float *)(const void *)((const char *)basis + place[0]));
#pragma GCC unroll 4
    for (int s = 1; s < stages; ++s)
        sum = _mm256_add_ps(sum, _mm256_loadu_ps((const float *)(const void *)((const char *)(basis + s * RBE_BASIS_VECTORS * G) + place[s])));
    return sum;
}

// 16 columns, of which the mask leaves those that exist: what pads the basis must not be met
static inline __attribute__((always_inline)) __m512 vector_of(const int stages, const uint16_t *place, const float *basis, __mmask16 mask) {
    return _mm512_maskz_insertf32x8(mask, _mm512_castps256_ps512(half_of(stages, place, basis)), half_of(stages, place + stages, basis), 1);
}

#endif
