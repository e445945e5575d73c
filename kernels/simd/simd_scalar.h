// simd.h in plain C: a vector is one float, so the kernels become ordinary loops. Runs anywhere.
#define RBE_ISA_NAME scalar
#define V_WIDTH 1
#define V_GEMM_ROWS 4

typedef float vf;
typedef int32_t vi;

V_INLINE vf v_zero(void) { return 0.0f; }
V_INLINE vf v_set1(float x) { return x; }
V_INLINE vf v_load(const float *p) { return *p; }
V_INLINE vf v_load_n(const float *p, int64_t n) { return n > 0 ? *p : 0.0f; }
V_INLINE void v_store(float *p, vf x) { *p = x; }
V_INLINE void v_store_n(float *p, vf x, int64_t n) {
    if (n > 0) *p = x;
}
// no gain here: a vector is not a line
#define V_STREAM 64
V_INLINE void v_stream(float *p, vf x) { v_store(p, x); }
V_INLINE void v_stream_end(void) {}
V_INLINE vf v_fma(vf a, vf b, vf c) { return a * b + c; }
V_INLINE vf v_add(vf a, vf b) { return a + b; }
V_INLINE vf v_sub(vf a, vf b) { return a - b; }
V_INLINE vf v_mul(vf a, vf b) { return a * b; }
V_INLINE float v_sum(vf x) { return x; }
// half a vector from each place: there is no half of one
V_INLINE vf v_load_halves(const float *low, const float *high) {
    (void)high;
    return *low;
}
V_INLINE vf v_set_halves(float low, float high) {
    (void)high;
    return low;
}
V_INLINE vf v_gather(const float *p, vi index) { return p[index]; }
V_INLINE vf v_from_int(vi x) { return (float)x; }
V_INLINE vi v_to_int(vf x) { return x == x ? (int32_t)x : INT32_MIN; }  // truncates
V_INLINE vf v_abs(vf x) { return __builtin_fabsf(x); }
V_INLINE vf v_min(vf a, vf b) { return a < b ? a : b; }  // b where either is NaN
V_INLINE vf v_max(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
V_INLINE float v_largest(vf x) { return x; }
V_INLINE vi v_bits(vf x) {
    vi bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
V_INLINE vf v_of_bits(vi x) {
    vf value;
    memcpy(&value, &x, sizeof value);
    return value;
}

V_INLINE vi vi_set1(int32_t x) { return x; }
V_INLINE vi vi_iota(void) { return 0; }
V_INLINE vi vi_load(const int32_t *p) { return *p; }
V_INLINE vi vi_load_n(const int32_t *p, int64_t n) { return n > 0 ? *p : 0; }
V_INLINE vi vi_load_u8(const uint8_t *p) { return *p; }
V_INLINE void vi_store_u8(uint8_t *p, vi x) { *p = (uint8_t)x; }
V_INLINE void vi_store_u8_n(uint8_t *p, vi x, int64_t n) {
    if (n > 0) *p = (uint8_t)x;
}
V_INLINE vi vi_add(vi a, vi b) { return (vi)((uint32_t)a + (uint32_t)b); }
V_INLINE vi vi_sub(vi a, vi b) { return (vi)((uint32_t)a - (uint32_t)b); }
V_INLINE vi vi_mul(vi a, vi b) { return (vi)((uint32_t)a * (uint32_t)b); }
V_INLINE vi vi_and(vi a, vi b) { return a & b; }
V_INLINE vi vi_or(vi a, vi b) { return a | b; }
V_INLINE vi vi_xor(vi a, vi b) { return a ^ b; }
V_INLINE vi vi_min(vi a, vi b) { return a < b ? a : b; }
V_INLINE vi vi_shr(vi a, int n) { return (vi)((uint32_t)a >> n); }
V_INLINE vi vi_shl(vi a, int n) { return (vi)((uint32_t)a << n); }
V_INLINE vi vi_shrv(vi a, vi n) { return (vi)((uint32_t)a >> n); }
V_INLINE vi vi_gather(const void *p, vi offset) {
    vi value;
    memcpy(&value, (const char *)p + offset, sizeof value);
    return value;
}

V_INLINE vf v_load_bf16(const uint16_t *p) { return v_of_bits((vi)((uint32_t)*p << 16)); }
V_INLINE void vi_store_u16(uint16_t *p, vi x) { *p = (uint16_t)x; }
V_INLINE vi v_lt(vf a, vf b) { return a < b ? -1 : 0; }  // all ones where a < b
V_INLINE uint32_t v_ge_bits(vf a, vf b) { return a >= b; }  // bit l: lane l of a >= that of b
V_INLINE vi v_nan(vf x) { return x == x ? 0 : -1; }  // all ones where NaN

V_INLINE vf v_load_f16(const uint16_t *p) {
    const uint32_t magnitude = *p & 0x7FFFu, sign = (uint32_t)(*p & 0x8000u) << 16;
    if (magnitude >= 0x7C00u) return v_of_bits((vi)(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13));
    const float value = v_of_bits((vi)(magnitude << 13)) * 0x1p112f;  // moves the exponent bias from 15 to 127, subnormals too
    return v_of_bits((vi)(sign | (uint32_t)v_bits(value)));
}
V_INLINE void v_store_f16(uint16_t *p, vf x) {
    const uint32_t bits = (uint32_t)v_bits(x), twice = bits + bits;
    const float scaled = (v_abs(x) * 0x1p112f) * 0x1p-110f;  // to infinity from 2^16 on
    const uint32_t bias = (twice & 0xFF000000u) < 0x71000000u ? 0x71000000u : twice & 0xFF000000u;
    const uint32_t rounded = (uint32_t)v_bits(v_of_bits((vi)((bias >> 1) + 0x07800000u)) + scaled);  // the addition rounds to 10 bits
    const uint32_t magnitude = twice > 0xFF000000u ? 0x7E00u : ((rounded >> 13) & 0x7C00u) + (rounded & 0xFFFu);
    *p = (uint16_t)(bits >> 16 & 0x8000u) | (uint16_t)magnitude;
}

// lane r = sum of the lanes of part[r]
V_INLINE vf v_sums(const vf *part) { return part[0]; }
// the square of V_WIDTH vectors turned
V_INLINE void v_transpose(vf *r) { (void)r; }
