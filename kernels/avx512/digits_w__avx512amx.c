// W as signed digits of bytes, straight from codes of one byte: 64 rows, four groups at a time.
//
// Four registers of codes, one for each of four groups of 64 rows, become four of 16 rows x 4 groups by unpacking within 128-bit lanes. What a
// lookup of element e in a table of 256 digits then leaves is a row of a tile of the matrix unit as it stands: for 16 rows of W the bytes of four
// columns that are summed together. So tile o has the rows
//
//     16 L + 4 o + j   in column 4 L + j,    L, j = 0..3,    o = 0..3
//
// and columns in the order of digits_x__avx512amx.c. Stages are added as bytes: their digits leave room for that, or (carry, three digits) the
// bytes of 24-bit numbers are added with carry, and 128 is taken off the two unsigned ones, which the table has added. Signs (rbe16s) negate.
// W [o][step][digit][16 x 4 places][16 rows][4].
#include <immintrin.h>

#include "../kernels.h"

enum { TILE = 1024, O = 2, STAGES = RBE_DIGIT_STAGES };

// Two of the four registers of 16 rows x 4 groups; groups that do not exist are code 0, for x is zero there.
static inline void turn_codes(const uint8_t *idx, int64_t apart, int64_t groups, bool upper, __m512i out[O]) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i a = _mm512_loadu_si512(idx), b = groups > 1 ? _mm512_loadu_si512(idx + apart) : zero;
    const __m512i c = groups > 2 ? _mm512_loadu_si512(idx + 2 * apart) : zero, d = groups > 3 ? _mm512_loadu_si512(idx + 3 * apart) : zero;
    const __m512i ab = upper ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
    const __m512i cd = upper ? _mm512_unpackhi_epi8(c, d) : _mm512_unpacklo_epi8(c, d);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
}

// Codes of four groups and 32 rows.
typedef struct quad {
    __m512i code[STAGES][O], sign[STAGES][O];
    __mmask64 upper[STAGES][O];
} quad;

static inline __attribute__((always_inline)) void look_up(const int8_t *table, const quad *q, int64_t s, __m512i out[O]) {
    const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64), t2 = _mm512_loadu_si512(table + 128),
                  t3 = _mm512_loadu_si512(table + 192);
#pragma GCC unroll 2
    for (int o = 0; o < O; ++o)
        out[o] = _mm512_mask_blend_epi8(q->upper[s][o], _mm512_permutex2var_epi8(t0, q->code[s][o], t1),
                                        _mm512_permutex2var_epi8(t2, q->code[s][o], t3));
}

static inline __attribute__((always_inline)) void look_up_flipped(bool flipped, const int8_t *table, const quad *q, int64_t s, __m512i bit,
                                                                  __m512i out[O]) {
    look_up(table, q, s, out);
    for (int o = 0; flipped && o < O; ++o)
        out[o] = _mm512_mask_sub_epi8(out[o], _mm512_test_epi8_mask(q->sign[s][o], bit), _mm512_setzero_si512(), out[o]);
}

// One element of the groups, one digit: the sum over stages.
static inline __attribute__((always_inline)) void add_stages(int64_t stages, bool flipped, const int8_t *table, int64_t apart, const quad *q,
                                                             __m512i bit, __m512i sum[O]) {
    look_up_flipped(flipped, table, q, 0, bit, sum);
#pragma GCC unroll 4
    for (int64_t s = 1; s < stages; ++s) {
        __m512i value[O];
        look_up_flipped(flipped, table + s * apart, q, s, bit, value);
        for (int o = 0; o < O; ++o) sum[o] = _mm512_add_epi8(sum[o], value[o]);
    }
}

// The same for three digits of 24-bit sums.
static inline __attribute__((always_inline)) void add_carrying(int64_t stages, const int8_t *table, int64_t apart, int64_t plane, const quad *q,
                                                               __m512i sum[3][O]) {
    const __m512i one = _mm512_set1_epi8(1), half = _mm512_set1_epi8((char)0x80);
    for (int d = 0; d < 3; ++d) look_up(table + d * plane, q, 0, sum[d]);
#pragma GCC unroll 4
    for (int64_t s = 1; s < stages; ++s) {
        __m512i low[O], middle[O], high[O];
        look_up(table + s * apart + 2 * plane, q, s, low);
        look_up(table + s * apart + plane, q, s, middle);
        look_up(table + s * apart, q, s, high);
#pragma GCC unroll 2
        for (int o = 0; o < O; ++o) {
            sum[2][o] = _mm512_add_epi8(sum[2][o], low[o]);
            const __mmask64 over = _mm512_cmplt_epu8_mask(sum[2][o], low[o]);
            sum[1][o] = _mm512_add_epi8(sum[1][o], middle[o]);
            sum[1][o] = _mm512_mask_add_epi8(sum[1][o], over, sum[1][o], one);
            // with a one from below the sum has overflowed, too, where it comes out at what was added
            const __mmask64 again = _mm512_cmplt_epu8_mask(sum[1][o], middle[o]) | _mm512_mask_cmpeq_epi8_mask(over, sum[1][o], middle[o]);
            sum[0][o] = _mm512_add_epi8(sum[0][o], high[o]);
            sum[0][o] = _mm512_mask_add_epi8(sum[0][o], again, sum[0][o], one);
        }
    }
    for (int o = 0; o < O; ++o) {
        sum[1][o] = _mm512_xor_si512(sum[1][o], half);
        sum[2][o] = _mm512_xor_si512(sum[2][o], half);
    }
}

static inline __attribute__((always_inline)) void run(const rbe_digits *digits, int64_t stages, int w, bool flipped, bool carry, int from_o,
                                                      int to_o, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, int64_t line,
                                                      const int8_t *table, int8_t *out) {
    const int64_t g = digits->group, apart = g * RBE_BASIS_VECTORS, plane = stages * apart, planes = flipped ? 2 : 1;
    const int64_t part = rbe_digit_steps(g, groups * g) * w * TILE;
    for (int64_t k = 0; k < groups; k += 4, idx += 4 * stages * planes * RBE_LANES) {
        for (int upper = from_o / O; upper < to_o / O; ++upper) {
            quad q;
            for (int64_t i = 0; i < 2 * stages * planes; ++i) {
                const int64_t s = line + (k + 2 * upper) * stages * planes + i;
                _mm_prefetch((const char *)(ahead->at + (uintptr_t)(s % 64 * ahead->row + s / 64 * ahead->line)), _MM_HINT_T1);
            }
#pragma GCC unroll 4
            for (int64_t s = 0; s < stages; ++s) {
                const uint8_t *from = idx + s * planes * RBE_LANES;
                turn_codes(from + (planes - 1) * RBE_LANES, stages * planes * RBE_LANES, groups - k, upper, q.code[s]);
                if (flipped) turn_codes(from, stages * planes * RBE_LANES, groups - k, upper, q.sign[s]);
                for (int o = 0; o < O; ++o) q.upper[s][o] = _mm512_movepi8_mask(q.code[s][o]);
            }
            for (int64_t e = 0; e < g; ++e) {
                const int64_t c = k / 4 * g + e;
                int8_t *to = out + (upper * O - from_o) * part + c / 16 * w * TILE + c % 16 * 64;
                const int8_t *from = table + e * RBE_BASIS_VECTORS;
                __m512i sum[3][O];
                if (carry)
                    add_carrying(stages, from, apart, plane, &q, sum);
                else
#pragma GCC unroll 3
                    for (int d = 0; d < w; ++d) add_stages(stages, flipped, from + d * plane, apart, &q, _mm512_set1_epi8((char)(1 << (e & 7))), sum[d]);
#pragma GCC unroll 3
                for (int d = 0; d < w; ++d)
                    for (int o = 0; o < O; ++o) _mm512_storeu_si512(to + o * part + d * TILE, sum[d][o]);
            }
        }
    }
}

// Loops of a known length for the usual numbers of stages.
static inline __attribute__((always_inline)) void run_stages(const rbe_digits *digits, int w, bool flipped, bool carry, int o, int end,
                                                             int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, int64_t line,
                                                             const int8_t *table, int8_t *out) {
    switch (digits->stages) {
        case 1: run(digits, 1, w, flipped, carry, o, end, groups, idx, ahead, line, table, out); break;
        case 2: run(digits, 2, w, flipped, carry, o, end, groups, idx, ahead, line, table, out); break;
        case 4: run(digits, 4, w, flipped, carry, o, end, groups, idx, ahead, line, table, out); break;
        default: run(digits, digits->stages, w, flipped, carry, o, end, groups, idx, ahead, line, table, out);
    }
}

void rbe_digits_of_codes__avx512amx(const rbe_digits *digits, int o, int end, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead,
                                    int64_t line, const int8_t *table, int8_t *out) {
    const int64_t used = (groups + 3) / 4 * digits->group;
    if (digits->carry)
        run_stages(digits, 3, false, true, o, end, groups, idx, ahead, line, table, out);
    else if (digits->flipped && digits->w == 1)
        run_stages(digits, 1, true, false, o, end, groups, idx, ahead, line, table, out);
    else if (digits->flipped && digits->w == 2)
        run_stages(digits, 2, true, false, o, end, groups, idx, ahead, line, table, out);
    else if (digits->flipped)
        run_stages(digits, 3, true, false, o, end, groups, idx, ahead, line, table, out);
    else if (digits->w == 1)
        run_stages(digits, 1, false, false, o, end, groups, idx, ahead, line, table, out);
    else if (digits->w == 2)
        run_stages(digits, 2, false, false, o, end, groups, idx, ahead, line, table, out);
    else
        run_stages(digits, 3, false, false, o, end, groups, idx, ahead, line, table, out);
    // places of the last step that no group has: x is zero there
    const int64_t steps = rbe_digit_steps(digits->group, groups * digits->group);
    for (int64_t c = used; c % 16; ++c)
        for (int64_t part = 0; part < end - o; ++part)
            for (int64_t d = 0; d < digits->w; ++d)
                _mm512_storeu_si512(out + ((part * steps + c / 16) * digits->w + d) * TILE + c % 16 * 64, _mm512_setzero_si512());
}
