// P = x basis^T in float16 for the half-precision path, on the bfloat16 matrix unit (AMX):
//
//     P[j, t] = float16(lanes[t] * sum over e < g of basis[j, e] scale[t] x[t, e])      j < 256, t < W (32 or 64), lanes may be NULL: 1
//
// basis and x are cut into up to two bfloat16 pieces (16 bits, exact for float16); the product of the two second pieces is left out.
// A tile is 16 rows of 64 bytes. Layouts, zero-padded to whole tiles; d counts steps of 32 columns, pieces lie one behind the other:
//     rows (basis)     [ceil(rows / 32) * 2][d][2 pieces][16 vectors][32 columns]
//     columns (x)      [W / 16][d][2 pieces][16 pairs of columns][16 tokens][2]
#define RBE_SIMD_AVX512
#include "../kernels.h"
#include "../simd/simd.h"

enum { TILE = 512, PIECES = 2, BLOCK = PIECES * TILE };  // bfloat16 values

static inline __m512i round_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// What rounding to bfloat16 left over of 32 values.
static inline __m512i rest_pair(__m512 low, __m512 high, __m512i rounded) {
    const __m512 l = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16));
    const __m512 h = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16));
    return round_pair(_mm512_sub_ps(low, l), _mm512_sub_ps(high, h));
}

static inline void load_pair(const float *a, int64_t depth, __m512 *low, __m512 *high) {
    *low = depth >= 16 ? _mm512_loadu_ps(a) : _mm512_maskz_loadu_ps(v_mask(depth), a);
    *high = depth >= 32 ? _mm512_loadu_ps(a + 16) : depth > 16 ? _mm512_maskz_loadu_ps(v_mask(depth - 16), a + 16) : _mm512_setzero_ps();
}

void rbe_half_basis__avx512amx(int64_t rows, int64_t depth, const float *basis, uint16_t *out) {
    for (int64_t r0 = 0; r0 < (rows + 31) / 32 * 32; r0 += 16) {
        for (int64_t e = 0; e < depth; e += 32, out += BLOCK) {
            for (int64_t r = 0; r < 16; ++r) {
                __m512 low = _mm512_setzero_ps(), high = low;
                if (r0 + r < rows) load_pair(basis + (r0 + r) * depth + e, depth - e, &low, &high);
                const __m512i whole = round_pair(low, high);
                _mm512_storeu_si512(out + r * 32, whole);
                _mm512_storeu_si512(out + TILE + r * 32, rest_pair(low, high, whole));
            }
        }
    }
}

void rbe_half_tokens__avx512amx(int64_t tokens, int64_t g, int64_t w, const float *x, int64_t x_row, const float *scale, int pieces, uint16_t *out) {
    for (int64_t t0 = 0; t0 < w; t0 += 16) {
        for (int64_t e = 0; e < g; e += 32, out += BLOCK) {
            vf whole[16], rest[16];
            for (int64_t t = 0; t < 16; ++t) {
                whole[t] = rest[t] = v_zero();
                if (t0 + t >= tokens) continue;
                __m512 low, high;
                load_pair(x + (t0 + t) * x_row + e, g - e, &low, &high);
                const __m512 s = _mm512_set1_ps(scale[t0 + t]);
                low = _mm512_mul_ps(low, s);
                high = _mm512_mul_ps(high, s);
                const __m512i pair = round_pair(low, high);
                whole[t] = _mm512_castsi512_ps(pair);
                if (pieces > 1) rest[t] = _mm512_castsi512_ps(rest_pair(low, high, pair));
            }
            v_transpose(whole);
            for (int p = 0; p < 16; ++p) _mm512_storeu_ps(out + p * 32, whole[p]);
            if (pieces < 2) continue;
            v_transpose(rest);
            for (int p = 0; p < 16; ++p) _mm512_storeu_ps(out + TILE + p * 32, rest[p]);
        }
    }
}

// Tiles 0..3: 32 x 32 of P; 4, 5: rows of the basis; 6, 7: columns of x.
#define LOAD(first, second, at, blocks, piece)                                     \
    _tile_loadd(first, (at) + d * BLOCK + (piece) * TILE, 64);                     \
    _tile_loadd(second, (at) + ((blocks) + d) * BLOCK + (piece) * TILE, 64)
#define MULTIPLY()             \
    _tile_dpbf16ps(0, 4, 6);   \
    _tile_dpbf16ps(1, 4, 7);   \
    _tile_dpbf16ps(2, 5, 6);   \
    _tile_dpbf16ps(3, 5, 7)

static inline void round_block(const float *block, const float *lanes, int64_t w, uint16_t *p) {
    if (!lanes) {
        for (int64_t i = 0; i < 32; ++i)
            for (int h = 0; h < 2; ++h) v_store_f16(p + i * w + 16 * h, v_load(block + i * 32 + 16 * h));
        return;
    }
    const vf low = v_load(lanes), high = v_load(lanes + 16);
    for (int64_t i = 0; i < 32; ++i) {
        v_store_f16(p + i * w, v_mul(low, v_load(block + i * 32)));
        v_store_f16(p + i * w + 16, v_mul(high, v_load(block + i * 32 + 16)));
    }
}

// A block is rounded while the matrix unit works on the next one.
void rbe_half_table__avx512amx(int64_t g, int64_t w, const uint16_t *basis, const uint16_t *x, int pieces, const float *lanes,
                               uint16_t *p) {
    const int64_t steps = (g + 31) / 32;
    float block[2][32 * 32] __attribute__((aligned(64)));
    uint16_t *last = NULL;
    const float *last_lanes = NULL;
    int turn = 0;
    for (int64_t r = 0; r < RBE_BASIS_VECTORS; r += 32) {
        const uint16_t *a = basis + r / 16 * steps * BLOCK;
        for (int64_t t = 0; t < w; t += 32, turn ^= 1) {
            const uint16_t *b = x + t / 16 * steps * BLOCK;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t d = 0; d < steps; ++d) {
                LOAD(6, 7, b, steps, 0);
                LOAD(4, 5, a, steps, 1);
                MULTIPLY();
                LOAD(4, 5, a, steps, 0);
                MULTIPLY();
                if (pieces < 2) continue;
                LOAD(6, 7, b, steps, 1);
                MULTIPLY();
            }
            if (last) round_block(block[turn ^ 1], last_lanes, w, last);
            float *c = block[turn];
            _tile_stored(0, c, 128);
            _tile_stored(1, c + 16, 128);
            _tile_stored(2, c + 16 * 32, 128);
            _tile_stored(3, c + 16 * 32 + 16, 128);
            last = p + r * w + t;
            last_lanes = lanes ? lanes + t : NULL;
        }
    }
    round_block(block[turn ^ 1], last_lanes, w, last);
}
