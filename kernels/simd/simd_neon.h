// simd.h for AArch64 Advanced SIMD: 4 floats.
#include <arm_neon.h>

#define RBE_ISA_NAME neon
#define V_WIDTH 4
#define V_GEMM_ROWS 8  // 8 x 2 accumulators of 32 registers

typedef float32x4_t vf;
typedef int32x4_t vi;

V_INLINE vf v_zero(void) { return vdupq_n_f32(0.0f); }
V_INLINE vf v_set1(float x) { return vdupq_n_f32(x); }
V_INLINE vf v_load(const float *p) { return vld1q_f32(p); }
V_INLINE vf v_load_n(const float *p, int64_t n) {
    if (n >= 4) return vld1q_f32(p);
    float lane[4] = {0};
    for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
    return vld1q_f32(lane);
}
V_INLINE void v_store(float *p, vf x) { vst1q_f32(p, x); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) {
    float lane[4];
    vst1q_f32(lane, x);
    for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) p[i] = lane[i];
}
// no gain here: a vector is not a line
#define V_STREAM 64
V_INLINE void v_stream(float *p, vf x) { v_store(p, x); }
V_INLINE void v_stream_end(void) {}
V_INLINE vf v_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
V_INLINE vf v_add(vf a, vf b) { return vaddq_f32(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return vsubq_f32(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return vmulq_f32(a, b); }
V_INLINE float v_sum(vf x) { return vaddvq_f32(x); }
// half a vector from each place
V_INLINE vf v_load_halves(const float *low, const float *high) { return vcombine_f32(vld1_f32(low), vld1_f32(high)); }
V_INLINE vf v_set_halves(float low, float high) { return vcombine_f32(vdup_n_f32(low), vdup_n_f32(high)); }
V_INLINE vf v_gather(const float *p, vi index) {
    const float lane[4] = {p[vgetq_lane_s32(index, 0)], p[vgetq_lane_s32(index, 1)], p[vgetq_lane_s32(index, 2)],
                           p[vgetq_lane_s32(index, 3)]};
    return vld1q_f32(lane);
}
V_INLINE vf v_from_int(vi x) { return vcvtq_f32_s32(x); }
V_INLINE vi v_to_int(vf x) { return vcvtq_s32_f32(x); }  // truncates
V_INLINE vf v_abs(vf x) { return vabsq_f32(x); }
V_INLINE vf v_min(vf a, vf b) { return vbslq_f32(vcltq_f32(a, b), a, b); }  // b where either is NaN
V_INLINE vf v_max(vf a, vf b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b where either is NaN
V_INLINE float v_largest(vf x) { return vmaxvq_f32(x); }
V_INLINE vi v_bits(vf x) { return vreinterpretq_s32_f32(x); }
V_INLINE vf v_of_bits(vi x) { return vreinterpretq_f32_s32(x); }

V_INLINE vi vi_set1(int32_t x) { return vdupq_n_s32(x); }
V_INLINE vi vi_iota(void) {
    const int32_t lane[4] = {0, 1, 2, 3};
    return vld1q_s32(lane);
}
V_INLINE vi vi_load(const int32_t *p) { return vld1q_s32(p); }
V_INLINE vi vi_load_n(const int32_t *p, int64_t n) {
    int32_t lane[4] = {0};
    for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) lane[i] = p[i];
    return vld1q_s32(lane);
}
V_INLINE vi vi_load_u8(const uint8_t *p) {
    const int32_t lane[4] = {p[0], p[1], p[2], p[3]};
    return vld1q_s32(lane);
}
V_INLINE void vi_store_u8_n(uint8_t *p, vi x, int64_t n) {
    int32_t lane[4];
    vst1q_s32(lane, x);
    for (int64_t i = 0; i < (n < 4 ? n : 4); ++i) p[i] = (uint8_t)lane[i];
}
V_INLINE void vi_store_u8(uint8_t *p, vi x) { vi_store_u8_n(p, x, 4); }
V_INLINE vi vi_add(vi a, vi b) { return vaddq_s32(a, b); }
V_INLINE vi vi_sub(vi a, vi b) { return vsubq_s32(a, b); }
V_INLINE vi vi_mul(vi a, vi b) { return vmulq_s32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return vandq_s32(a, b); }
V_INLINE vi vi_or(vi a, vi b) { return vorrq_s32(a, b); }
V_INLINE vi vi_xor(vi a, vi b) { return veorq_s32(a, b); }
V_INLINE vi vi_min(vi a, vi b) { return vminq_s32(a, b); }
V_INLINE vi vi_shrv(vi a, vi n) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vnegq_s32(n))); }
V_INLINE vi vi_shr(vi a, int n) { return vi_shrv(a, vdupq_n_s32(n)); }
V_INLINE vi vi_shl(vi a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
V_INLINE vi vi_gather(const void *p, vi offset) {
    int32_t lane[4], value[4];
    vst1q_s32(lane, offset);
    for (int i = 0; i < 4; ++i) memcpy(&value[i], (const char *)p + lane[i], 4);
    return vld1q_s32(value);
}

V_INLINE vf v_load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
V_INLINE vf v_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
V_INLINE void v_store_f16(uint16_t *p, vf x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
V_INLINE void vi_store_u16(uint16_t *p, vi x) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(x))); }  // low 16 bits of every lane
V_INLINE vi v_lt(vf a, vf b) { return vreinterpretq_s32_u32(vcltq_f32(a, b)); }  // all ones where a < b
// bit l: lane l of a >= that of b
V_INLINE uint32_t v_ge_bits(vf a, vf b) {
    const uint32x4_t bit = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bit));
}
V_INLINE vi v_nan(vf x) { return vreinterpretq_s32_u32(vmvnq_u32(vceqq_f32(x, x))); }               // all ones where NaN

// lane r = sum of the lanes of part[r]
V_INLINE vf v_sums(const vf *part) { return vpaddq_f32(vpaddq_f32(part[0], part[1]), vpaddq_f32(part[2], part[3])); }

// the square of V_WIDTH vectors turned: r[c] lane i becomes r[i] lane c
V_INLINE void v_transpose(vf *r) {
    const vf a = vtrn1q_f32(r[0], r[1]), b = vtrn2q_f32(r[0], r[1]), c = vtrn1q_f32(r[2], r[3]), d = vtrn2q_f32(r[2], r[3]);
    r[0] = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(c)));
    r[1] = vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(b), vreinterpretq_f64_f32(d)));
    r[2] = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(c)));
    r[3] = vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(b), vreinterpretq_f64_f32(d)));
}
