// simd.h for AVX2, FMA and F16C: 8 floats, tails through masked moves.
#include <immintrin.h>

#define RBE_ISA_NAME avx2
#define V_WIDTH 8
#define V_GEMM_ROWS 6  // 6 x 2 accumulators, 2 of B and a broadcast: 15 of 16 registers

typedef __m256 vf;
typedef __m256i vi;

V_INLINE vi v_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : (int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

V_INLINE vf v_zero(void) { return _mm256_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm256_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm256_loadu_ps(p); }
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, v_mask(n)); }
V_INLINE void v_store(float *p, vf x) { _mm256_storeu_ps(p, x); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm256_maskstore_ps(p, v_mask(n), x); }
// no gain here: a vector is not a line
#define V_STREAM 64
V_INLINE void v_stream(float *p, vf x) { v_store(p, x); }
V_INLINE void v_stream_end(void) {}
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
V_INLINE vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
V_INLINE float v_sum(vf x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// half a vector from each place
V_INLINE vf v_load_halves(const float *low, const float *high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
V_INLINE vf v_set_halves(float low, float high) { return _mm256_insertf128_ps(_mm256_set1_ps(low), _mm_set1_ps(high), 1); }
V_INLINE vf v_gather(const float *p, vi index) { return _mm256_i32gather_ps(p, index, 4); }
V_INLINE vf v_from_int(vi x) { return _mm256_cvtepi32_ps(x); }
V_INLINE vi v_to_int(vf x) { return _mm256_cvttps_epi32(x); }  // truncates
V_INLINE vf v_abs(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
V_INLINE vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }  // b where either is NaN
V_INLINE vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }  // b where either is NaN
V_INLINE float v_largest(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
V_INLINE vi v_bits(vf x) { return _mm256_castps_si256(x); }
V_INLINE vf v_of_bits(vi x) { return _mm256_castsi256_ps(x); }

V_INLINE vi vi_set1(int32_t x) { return _mm256_set1_epi32(x); }
V_INLINE vi vi_iota(void) { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
V_INLINE vi vi_load(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
V_INLINE vi vi_load_n(const int32_t *p, int64_t n) { return _mm256_maskload_epi32(p, v_mask(n)); }
V_INLINE vi vi_load_u8(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)); }
V_INLINE __m128i v_narrow16(vi x) {  // low 16 bits of every lane
    x = _mm256_and_si256(x, _mm256_set1_epi32(0xFFFF));
    return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
V_INLINE void vi_store_u8(uint8_t *p, vi x) {
    __m128i words = v_narrow16(_mm256_and_si256(x, _mm256_set1_epi32(0xFF)));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packus_epi16(words, words));
}
V_INLINE void vi_store_u8_n(uint8_t *p, vi x, int64_t n) {
    uint8_t lane[8];
    vi_store_u8(lane, x);
    memcpy(p, lane, n > 8 ? 8 : (size_t)n);
}
V_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
V_INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
V_INLINE vi vi_mul(vi a, vi b) { return _mm256_mullo_epi32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
V_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
V_INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
V_INLINE vi vi_min(vi a, vi b) { return _mm256_min_epi32(a, b); }
V_INLINE vi vi_shr(vi a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
V_INLINE vi vi_shl(vi a, int n) { return _mm256_sll_epi32(a, _mm_cvtsi32_si128(n)); }
V_INLINE vi vi_shrv(vi a, vi n) { return _mm256_srlv_epi32(a, n); }
V_INLINE vi vi_gather(const void *p, vi offset) { return _mm256_i32gather_epi32((const int *)p, offset, 1); }

V_INLINE vf v_load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16));
}
V_INLINE vf v_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)); }
V_INLINE void v_store_f16(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
V_INLINE void vi_store_u16(uint16_t *p, vi x) { _mm_storeu_si128((__m128i *)(void *)p, v_narrow16(x)); }
V_INLINE vi v_lt(vf a, vf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }  // all ones where a < b
V_INLINE uint32_t v_ge_bits(vf a, vf b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }  // bit l: lane l of a >= that of b
V_INLINE vi v_nan(vf x) { return _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }  // all ones where NaN

// lane r = sum of the lanes of part[r]
V_INLINE vf v_sums(const vf *part) {
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(part[4], part[5]), _mm256_hadd_ps(part[6], part[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

// the square of V_WIDTH vectors turned: r[c] lane i becomes r[i] lane c
V_INLINE void v_transpose(vf *r) {
    __m256 a[8], b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int h = 0; h < 2; ++h) {
            b[4 * i + 2 * h] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + h + 2], 0x44);
            b[4 * i + 2 * h + 1] = _mm256_shuffle_ps(a[4 * i + h], a[4 * i + h + 2], 0xEE);
        }
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        r[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
}
