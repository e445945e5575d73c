// What the backward in half precision makes of dP on the bfloat16 matrix unit (AMX), for one group and stage:
//
//     dx[e, t] (+)= sum over j of basis[j, e] dP[j, t]          dbasis[j, e] += sum over t of dP[j, t] scale[t] x[t, e]
//
// dP and x come as one bfloat16 piece, basis as two. Operands beside those of half_backward__avx512fp16.c, in tiles of 16 rows of 64 bytes:
//     rows (basis turned)  [ceil(g / 32) * 2][256 / 32][2 pieces][16 columns of x][32 vectors]
//     columns (x)          [steps of 32 tokens][ceil(g / 32) * 2][16 pairs of tokens][16 columns][2]
#define RBE_SIMD_AVX512
#include "../kernels.h"
#include "../simd/simd.h"

enum { TILE = 512, STEPS = RBE_BASIS_VECTORS / 32 };  // bfloat16 values of a tile

void rbe_half_columns__avx512amx(int64_t tokens, int64_t cols, const float *x, int64_t x_row, const float *scale, uint16_t *out) {
    // 0, 16, 1, 17, ...
    const __m512i pairs = _mm512_add_epi32(_mm512_set1_epi32(16 << 16), _mm512_mullo_epi32(vi_iota(), _mm512_set1_epi32(0x10001)));
    for (int64_t c = 0; c < cols; c += 16, out += TILE) {
        const int64_t some = cols - c < 16 ? cols - c : 16;
        for (int64_t t = 0; t < 32; t += 2) {
            const vf even = t < tokens ? v_mul(v_load_n(x + t * x_row + c, some), v_set1(scale[t])) : v_zero();
            const vf odd = t + 1 < tokens ? v_mul(v_load_n(x + (t + 1) * x_row + c, some), v_set1(scale[t + 1])) : v_zero();
            _mm512_storeu_si512(out + t / 2 * 32, _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
        }
    }
}

// Tiles 0..3: 32 x 32 of the result; 4, 5: rows; 6, 7: columns.
#define LOAD_RESULT(c, row)                              \
    _tile_loadd(0, c, (row) * 4);                        \
    _tile_loadd(1, (c) + 16, (row) * 4);                 \
    _tile_loadd(2, (c) + 16 * (row), (row) * 4);         \
    _tile_loadd(3, (c) + 16 * (row) + 16, (row) * 4)
#define STORE_RESULT(c, row)                             \
    _tile_stored(0, c, (row) * 4);                       \
    _tile_stored(1, (c) + 16, (row) * 4);                \
    _tile_stored(2, (c) + 16 * (row), (row) * 4);        \
    _tile_stored(3, (c) + 16 * (row) + 16, (row) * 4)
#define CLEAR_RESULT()   \
    _tile_zero(0);       \
    _tile_zero(1);       \
    _tile_zero(2);       \
    _tile_zero(3)
#define MULTIPLY()             \
    _tile_dpbf16ps(0, 4, 6);   \
    _tile_dpbf16ps(1, 4, 7);   \
    _tile_dpbf16ps(2, 5, 6);   \
    _tile_dpbf16ps(3, 5, 7)

void rbe_half_dx__avx512amx(int64_t g, int64_t w, const uint16_t *turned, const uint16_t *dp_cols, float *dx, bool first) {
    for (int64_t r = 0; r < g; r += 32) {
        const uint16_t *a = turned + r / 16 * STEPS * 2 * TILE;
        for (int64_t t = 0; t < w; t += 32) {
            const uint16_t *b = dp_cols + t / 16 * STEPS * TILE;
            float *c = dx + r * w + t;
            if (first) {
                CLEAR_RESULT();
            } else {
                LOAD_RESULT(c, w);
            }
            for (int64_t d = 0; d < STEPS; ++d) {
                _tile_loadd(6, b + d * TILE, 64);
                _tile_loadd(7, b + (STEPS + d) * TILE, 64);
                _tile_loadd(4, a + (2 * d + 1) * TILE, 64);
                _tile_loadd(5, a + (2 * (STEPS + d) + 1) * TILE, 64);
                MULTIPLY();
                _tile_loadd(4, a + 2 * d * TILE, 64);
                _tile_loadd(5, a + 2 * (STEPS + d) * TILE, 64);
                MULTIPLY();
            }
            STORE_RESULT(c, w);
        }
    }
}

void rbe_half_dbasis__avx512amx(int64_t steps, int64_t cols, const uint16_t *dp_rows, const uint16_t *x, int64_t x_step, float *dbasis, int64_t row) {
    for (int64_t r = 0; r < RBE_BASIS_VECTORS; r += 32) {
        for (int64_t e = 0; e < cols; e += 32) {
            float *c = dbasis + r * row + e;
            const bool whole = cols - e >= 32;
            if (whole) {
                LOAD_RESULT(c, row);
            } else {
                CLEAR_RESULT();
            }
            for (int64_t step = 0; step < steps; ++step) {
                const uint16_t *a = dp_rows + step * RBE_BASIS_VECTORS * 32 + r / 16 * TILE, *b = x + step * x_step + e / 16 * TILE;
                _tile_loadd(4, a, 64);
                _tile_loadd(5, a + TILE, 64);
                _tile_loadd(6, b, 64);
                _tile_loadd(7, b + TILE, 64);
                MULTIPLY();
            }
            if (whole) {
                STORE_RESULT(c, row);
                continue;
            }
            float sum[32 * 32] __attribute__((aligned(64)));
            STORE_RESULT(sum, 32);
            for (int64_t i = 0; i < 32; ++i)
                for (int64_t h = 0; e + h < cols; h += 16) {
                    const int64_t some = cols - e - h < 16 ? cols - e - h : 16;
                    v_store_n(c + i * row + h, v_add(v_load_n(c + i * row + h, some), v_load(sum + i * 32 + h)), some);
                }
        }
    }
}
