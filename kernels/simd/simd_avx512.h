// simd.h for AVX-512 F, BW, DQ, VL: 16 floats, masked tails.
#include <immintrin.h>

#define RBE_ISA_NAME avx512
#define V_WIDTH 16
#define V_GEMM_ROWS 12  // 12 x 2 accumulators, 2 of B and a broadcast: 27 of 32 registers

typedef __m512 vf;
typedef __m512i vi;

V_INLINE __mmask16 v_mask(int64_t n) { return n >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << n) - 1u); }

V_INLINE vf v_zero(void) { return _mm512_setzero_ps(); }
V_INLINE vf v_set1(float x) { return _mm512_set1_ps(x); }
V_INLINE vf v_load(const float *p) { return _mm512_loadu_ps(p); }
V_INLINE vf v_load_n(const float *p, int64_t n) { return _mm512_maskz_loadu_ps(v_mask(n), p); }
V_INLINE void v_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
V_INLINE void v_store_n(float *p, vf x, int64_t n) { _mm512_mask_storeu_ps(p, v_mask(n), x); }
// whole lines past the caches, aligned to V_STREAM bytes
#define V_STREAM 64
V_INLINE void v_stream(float *p, vf x) { _mm512_stream_ps(p, x); }
V_INLINE void v_stream_end(void) { _mm_sfence(); }
V_INLINE vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
V_INLINE vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
V_INLINE vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
V_INLINE vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
V_INLINE float v_sum(vf x) { return _mm512_reduce_add_ps(x); }
// half a vector from each place
V_INLINE vf v_load_halves(const float *low, const float *high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
}
V_INLINE vf v_set_halves(float low, float high) { return _mm512_insertf32x8(_mm512_set1_ps(low), _mm256_set1_ps(high), 1); }
V_INLINE vf v_gather(const float *p, vi index) { return _mm512_i32gather_ps(index, p, 4); }
V_INLINE vf v_from_int(vi x) { return _mm512_cvtepi32_ps(x); }
V_INLINE vi v_to_int(vf x) { return _mm512_cvttps_epi32(x); }  // truncates
V_INLINE vf v_abs(vf x) { return _mm512_abs_ps(x); }
V_INLINE vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }  // b where either is NaN
V_INLINE vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
V_INLINE float v_largest(vf x) { return _mm512_reduce_max_ps(x); }
V_INLINE vi v_bits(vf x) { return _mm512_castps_si512(x); }
V_INLINE vf v_of_bits(vi x) { return _mm512_castsi512_ps(x); }

V_INLINE vi vi_set1(int32_t x) { return _mm512_set1_epi32(x); }
V_INLINE vi vi_iota(void) { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
V_INLINE vi vi_load(const int32_t *p) { return _mm512_loadu_si512(p); }
V_INLINE vi vi_load_n(const int32_t *p, int64_t n) { return _mm512_maskz_loadu_epi32(v_mask(n), p); }
V_INLINE vi vi_load_u8(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)); }
V_INLINE void vi_store_u8(uint8_t *p, vi x) { _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(x)); }
V_INLINE void vi_store_u8_n(uint8_t *p, vi x, int64_t n) { _mm512_mask_cvtepi32_storeu_epi8(p, v_mask(n), x); }
V_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
V_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
V_INLINE vi vi_mul(vi a, vi b) { return _mm512_mullo_epi32(a, b); }
V_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
V_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
V_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
V_INLINE vi vi_min(vi a, vi b) { return _mm512_min_epi32(a, b); }
V_INLINE vi vi_shr(vi a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
V_INLINE vi vi_shl(vi a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
V_INLINE vi vi_shrv(vi a, vi n) { return _mm512_srlv_epi32(a, n); }
V_INLINE vi vi_gather(const void *p, vi offset) { return _mm512_i32gather_epi32(offset, p, 1); }

// 16 bit fields of `bits` bits, least significant first, from the first of `bytes` bytes: two dwords a field, shifted together
#define V_HAS_FIELDS
V_INLINE vi vi_load_fields(const uint8_t *p, int64_t bytes, int bits) {
    const vi raw = _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p);
    const vi bit = vi_mul(vi_iota(), vi_set1(bits)), at = vi_shr(bit, 5), shift = vi_and(bit, vi_set1(31));
    const vi low = _mm512_srlv_epi32(_mm512_permutexvar_epi32(at, raw), shift);
    const vi high = _mm512_sllv_epi32(_mm512_permutexvar_epi32(vi_add(at, vi_set1(1)), raw), vi_sub(vi_set1(32), shift));
    return bits == 32 ? low : vi_and(vi_or(low, high), vi_set1((int32_t)((1u << (bits & 31)) - 1u)));
}

V_INLINE vf v_load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16));
}
V_INLINE vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p)); }
V_INLINE void v_store_f16(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// low 16 bits of every lane
V_INLINE void vi_store_u16(uint16_t *p, vi x) { _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(x)); }
V_INLINE vi v_lt(vf a, vf b) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ)); }  // all ones where a < b
V_INLINE uint32_t v_ge_bits(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // bit l: lane l of a >= that of b
V_INLINE vi v_nan(vf x) { return _mm512_movm_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q)); }  // all ones where NaN

// lane r = sum of the lanes of part[r]
V_INLINE vf v_sums(const vf *part) {
    __m512 a[8], b[4];
    for (int i = 0; i < 8; ++i)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(part[2 * i], part[2 * i + 1]), _mm512_unpackhi_ps(part[2 * i], part[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
        const __m512d lo = _mm512_castps_pd(a[2 * i]), hi = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
    }
    const __m512 c0 = _mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xDD));
    const __m512 c1 = _mm512_add_ps(_mm512_shuffle_f32x4(b[2], b[3], 0x88), _mm512_shuffle_f32x4(b[2], b[3], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c0, c1, 0x88), _mm512_shuffle_f32x4(c0, c1, 0xDD));
}

// the square of V_WIDTH vectors turned: r[c] lane i becomes r[i] lane c
V_INLINE void v_transpose(vf *r) {
    __m512 a[16], b[16];
    for (int i = 0; i < 8; ++i) {
        a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        for (int h = 0; h < 2; ++h) {
            const __m512d lo = _mm512_castps_pd(a[4 * i + h]), hi = _mm512_castps_pd(a[4 * i + h + 2]);
            b[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            b[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    }
    for (int c = 0; c < 4; ++c) {  // b[4i + c], 128-bit lane l holds column 4l + c of rows 4i .. 4i+3
        const __m512 lo01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x44), hi01 = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xEE);
        const __m512 lo23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x44), hi23 = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xEE);
        r[c] = _mm512_shuffle_f32x4(lo01, lo23, 0x88);
        r[4 + c] = _mm512_shuffle_f32x4(lo01, lo23, 0xDD);
        r[8 + c] = _mm512_shuffle_f32x4(hi01, hi23, 0x88);
        r[12 + c] = _mm512_shuffle_f32x4(hi01, hi23, 0xDD);
    }
}
