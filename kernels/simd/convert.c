// bfloat16 and float16 to and from float32: one rounding to nearest even, NaN stays NaN.
#include "../kernels.h"
#include "simd.h"

V_INLINE void v_store_bf16(uint16_t *p, vf x) {
    const vi bits = v_bits(x), odd = vi_and(vi_shr(bits, 16), vi_set1(1));
    const vi rounded = vi_shr(vi_add(bits, vi_add(odd, vi_set1(0x7FFF))), 16), nan = vi_or(vi_shr(bits, 16), vi_set1(0x40));
    const vi is_nan = v_nan(x);
    vi_store_u16(p, vi_or(vi_and(is_nan, nan), vi_and(vi_xor(is_nan, vi_set1(-1)), rounded)));
}

// A full vector at a time; the tail goes through a buffer so that nothing outside the arrays is touched.
#define WIDEN(name, load)                                                                                                            \
    void RBE_KERNEL(name)(const uint16_t *in, int64_t count, float *out) {                                                           \
        int64_t i = 0;                                                                                                               \
        for (; i + V_WIDTH <= count; i += V_WIDTH) v_store(out + i, load(in + i));                                                   \
        if (i == count) return;                                                                                                      \
        uint16_t tail[V_WIDTH] = {0};                                                                                                \
        memcpy(tail, in + i, (size_t)(count - i) * sizeof *in);                                                                      \
        v_store_n(out + i, load(tail), count - i);                                                                                   \
    }

#define NARROW(name, store)                                                                                                          \
    void RBE_KERNEL(name)(const float *in, int64_t count, uint16_t *out) {                                                           \
        int64_t i = 0;                                                                                                               \
        for (; i + V_WIDTH <= count; i += V_WIDTH) store(out + i, v_load(in + i));                                                   \
        if (i == count) return;                                                                                                      \
        uint16_t tail[V_WIDTH];                                                                                                      \
        store(tail, v_load_n(in + i, count - i));                                                                                    \
        memcpy(out + i, tail, (size_t)(count - i) * sizeof *out);                                                                    \
    }

WIDEN(bf16_to_f32, v_load_bf16)
WIDEN(f16_to_f32, v_load_f16)
NARROW(f32_to_bf16, v_store_bf16)
NARROW(f32_to_f16, v_store_f16)
