// The sorted list of the scales that a layout can hold, as ops/encode_scale.c builds it, by one block: places are sorted in shared memory
// (bitonic, values read from the curves), so that no copy from the host is needed and nothing is kept between calls.
#include "codes.cuh"
#include "encode.h"

constexpr int MOST = RBE_CURVES * 256 * 2, THREADS = 1024;  // curve, amp, sign
static_assert(MOST <= 65536, "a place is 16 bits");

// Of place p, which has its sign in bit 0.
CU_DEVICE uint32_t word_of(uint32_t constant, int unstored, bool seeded, int p) {
    const uint32_t sign = (uint32_t)p & 1u, cell = (uint32_t)p >> 1;
    if (seeded) return constant | sign << RBE_SIGN_SHIFT | cell << unstored;
    const uint32_t curve = cell >> 8;
    return (curve >> 1) << RBE_SUB_SHIFT | (curve & 1u) << RBE_DERIV_SHIFT | sign << RBE_SIGN_SHIFT | (cell & 255u);
}

static __global__ void __launch_bounds__(THREADS)
    list_scales(uint32_t constant, int unstored, bool seeded, int count, float *value, uint32_t *word) {
    CU_SHARED(uint16_t, place, [MOST]);
    const int t = (int)threadIdx.x;
    for (int p = t; p < count; p += THREADS) place[p] = (uint16_t)p;
    __syncthreads();
    for (int run = 2; run <= count; run *= 2) {
        for (int step = run / 2; step; step /= 2) {
            for (int pair = t; pair < count / 2; pair += THREADS) {
                const int low = pair / step * 2 * step + pair % step, high = low + step;
                const uint32_t a = word_of(constant, unstored, seeded, place[low]), b = word_of(constant, unstored, seeded, place[high]);
                const float va = cu_word_scale(a), vb = cu_word_scale(b);
                const bool after = va > vb || (va == vb && a > b), rising = (low & run) == 0;
                if (after == rising) {
                    const uint16_t kept = place[low];
                    place[low] = place[high];
                    place[high] = kept;
                }
            }
            __syncthreads();
        }
    }
    for (int p = t; p < count; p += THREADS) {
        int first = p;  // of the places with this value: it has the lowest word
        const float own = cu_word_scale(word_of(constant, unstored, seeded, place[p]));
        while (first && cu_word_scale(word_of(constant, unstored, seeded, place[first - 1])) == own) --first;
        value[p] = own;
        word[p] = word_of(constant, unstored, seeded, place[first]);
    }
}

int32_t rbe_cu_scale_count(rbe_field field) {
    if (!rbe_field_has_scale(field)) return 0;
    return rbe_field_seeded(field) ? 2 << (8 - rbe_field_amp_unstored(field)) : MOST;
}

int rbe_cu_list_scales(rbe_field field, float *value, uint32_t *word, void *stream) {
    return cu_launch(list_scales, dim3(1), dim3(THREADS), 0, (cudaStream_t)stream, rbe_field_constant(field), rbe_field_amp_unstored(field),
                     rbe_field_seeded(field) != 0, rbe_cu_scale_count(field), value, word);
}
