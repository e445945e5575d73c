// Codes of 8 columns as 16 bytes of W each: a lane's codes of a span, the table in shared memory, and one decoded group (fragments.cu).
#pragma once

#include "codes.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, STEPS = 8;  // STEPS: groups of a lane in a span

// table[s, j, copy] = basis[s, j, 0..7] in the type of x, 2^copies of each
template <class Act>
CU_DEVICE void fill_table(const float *basis, int entries, int copies, cu_vector16 *table) {
    for (int p = (int)threadIdx.x; p < entries; p += THREADS) {
        const float *vector = basis + (int64_t)p * 8;
        cu_vector16 entry;
        CU_UNROLL
        for (int e = 0; e < 8; e += 2) entry.word[e >> 1] = Act::store(vector[e]) | (uint32_t)Act::store(vector[e + 1]) << 16;
        CU_NO_UNROLL
        for (int c = 0; c < 1 << copies; ++c) table[p << copies | ((c + p) & ((1 << copies) - 1))] = entry;  // lanes on all banks
    }
}

// A lane's codes of a span, UNIT bytes for each of 8 groups; 0 where the row has none
template <int UNIT>
CU_DEVICE void load_codes(const uint8_t *from, bool there, uint32_t *words) {
    if (UNIT % 2 == 0) {
        CU_UNROLL
        for (int w = 0; w < 2 * UNIT; w += 4) {
            cu_vector16 four = {};
            if (there) four = *(const cu_vector16 *)(from + 4 * w);
            CU_UNROLL
            for (int u = 0; u < 4; ++u) words[w + u] = four.word[u];
        }
    } else {
        CU_UNROLL
        for (int w = 0; w < 2 * UNIT; w += 2) {
            cu_vector8 two = {};
            if (there) two = *(const cu_vector8 *)(from + 4 * w);
            words[w] = two.word[0], words[w + 1] = two.word[1];
        }
    }
}

// The codes of the next group come first.
template <int UNIT>
CU_DEVICE void next_group(uint32_t *words) {
    CU_UNROLL
    for (int w = 0; w < 2 * UNIT; ++w) {
        const uint32_t above = w + 1 < 2 * UNIT ? words[w + 1] : 0u;
        words[w] = (uint32_t)(((uint64_t)above << 32 | words[w]) >> 8 * UNIT);
    }
}

// Elements `left` and beyond become 0: columns that the row has not.
CU_DEVICE void trim(cu_vector16 *v, int left) {
    CU_UNROLL
    for (int w = 0; w < 4; ++w)
        if (left < 2 * w + 2) v->word[w] &= left == 2 * w + 1 ? 0xFFFFu : 0u;
}

// 8 columns of W without its gain: the group whose codes come first in words
template <class Act, int UNIT, bool SIGNS>
CU_DEVICE cu_vector16 decode(const cu_vector16 *table, int copies, int copy, const uint32_t *words) {
    cu_vector16 sum;
    CU_UNROLL
    for (int s = 0; s < (SIGNS ? UNIT / 2 : UNIT); ++s) {
        const uint32_t code = words[0] >> (SIGNS ? 16 * s : 8 * s), idx = (SIGNS ? code >> 8 : code) & 255u;
        cu_vector16 v = table[((uint32_t)(s * RBE_BASIS_VECTORS) + idx) << copies | copy];
        if (SIGNS) {
            const uint32_t spread = (code & 255u) | (code & 255u) << 15;  // bit t at t and t + 15
            CU_UNROLL
            for (int w = 0; w < 4; ++w) v.word[w] ^= spread << (15 - 2 * w) & 0x80008000u;
        }
        CU_UNROLL
        for (int w = 0; w < 4; ++w) sum.word[w] = s ? Act::add2(sum.word[w], v.word[w]) : v.word[w];
    }
    return sum;
}
