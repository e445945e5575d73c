// float32 products on the bfloat16 matrix unit (AMX): every float is exactly the sum of three bfloat16 pieces, x = h + m + l, cut off bit by bit.
//
//     A B = sum over the products of pieces whose error would show:  l h + m h + m m + h m + h l,  then  h h
//
// What is dropped is 2^-24 of |a b| on average. The small products are summed first, so that the sums of h h are rounded as often as those of
// an ordinary float32 product; six products at 17 times the rate of FMA leave 2.8 times its speed. Operands known to need fewer pieces
// (bfloat16 activations: one) skip the others.
//
// A tile is 16 rows of 64 bytes. Layouts, zero-padded to whole tiles; a pair of depth is p and p + 16, so that a shift and a blend make it:
//     split rows of A   [ceil(rows / 16)][ceil(depth / 32)][piece][16 rows][16 pairs of depth][2]
//     split cols of B   [ceil(cols / 16)][ceil(depth / 32)][piece][16 pairs of depth][16 cols][2]
#include "../kernels.h"
#include "split.h"

void rbe_split_rows__avx512amx(int64_t rows, int64_t depth, const float *a, int64_t a_row, int pieces, uint16_t *out) {
    const int64_t blocks = (depth + 31) / 32;
    for (int64_t r0 = 0; r0 < rows; r0 += 16) {
        for (int64_t d = 0; d < blocks; ++d, out += BLOCK) {
            const int64_t e = d * 32;
            for (int64_t r = 0; r < 16; ++r) {
                const float *line = a + (r0 + r) * a_row + e;
                __m512 low = _mm512_setzero_ps(), high = low;
                if (r0 + r < rows) low = _mm512_maskz_loadu_ps(first(depth - e), line);
                if (r0 + r < rows && e + 16 < depth) high = _mm512_maskz_loadu_ps(first(depth - e - 16), line + 16);
                split(low, high, pieces, out + r * 32);
            }
        }
    }
}

void rbe_split_cols__avx512amx(int64_t depth, int64_t cols, const float *b, int64_t b_row, int pieces, uint16_t *out) {
    const int64_t blocks = (depth + 31) / 32;
    for (int64_t c0 = 0; c0 < cols; c0 += 16) {
        const __mmask16 mask = first(cols - c0);
        for (int64_t d = 0; d < blocks; ++d, out += BLOCK) {
            for (int64_t pair = 0; pair < 16; ++pair) {
                const int64_t e = d * 32 + pair;
                __m512 low = _mm512_setzero_ps(), high = low;
                if (e < depth) low = _mm512_maskz_loadu_ps(mask, b + e * b_row + c0);
                if (e + 16 < depth) high = _mm512_maskz_loadu_ps(mask, b + (e + 16) * b_row + c0);
                split(low, high, pieces, out + pair * 32);
            }
        }
    }
}

// Both at once of 32 rows: split_rows of them, and as a step of depth split_cols of all columns, whose blocks of 16 are `apart`.
void rbe_split_both__avx512amx(int64_t cols, const float *a, int64_t a_row, int pieces, uint16_t *rows, uint16_t *columns, int64_t apart) {
    const int64_t blocks = (cols + 31) / 32;
    for (int64_t d = 0; d < blocks; ++d) {
        uint16_t *left = columns + 2 * d * apart, *right = left + apart;
        const __mmask16 some = first(cols - 32 * d), more = first(cols - 32 * d - 16);
        for (int64_t r = 0; r < 16; ++r) {
            const float *upper = a + r * a_row + 32 * d, *lower = upper + 16 * a_row;
            uint16_t *out = rows + d * BLOCK + r * 32;
            __m512 v00 = _mm512_maskz_loadu_ps(some, upper), v01 = _mm512_maskz_loadu_ps(more, upper + 16);
            __m512 v10 = _mm512_maskz_loadu_ps(some, lower), v11 = _mm512_maskz_loadu_ps(more, lower + 16);
            for (int piece = 0; piece < pieces; ++piece) {
                if (piece + 1 == pieces) {
                    v00 = rounded(v00);
                    v01 = rounded(v01);
                    v10 = rounded(v10);
                    v11 = rounded(v11);
                }
                put_pairs(v00, v01, out + piece * TILE);
                put_pairs(v10, v11, out + blocks * BLOCK + piece * TILE);
                put_pairs(v00, v10, left + piece * TILE + r * 32);
                if (cols > 32 * d + 16) put_pairs(v01, v11, right + piece * TILE + r * 32);
                v00 = cut_off(v00);
                v01 = cut_off(v01);
                v10 = cut_off(v10);
                v11 = cut_off(v11);
            }
        }
    }
}

typedef struct __attribute__((packed)) tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

// Eight tiles of 16 rows of 64 bytes. Constant, because GCC's intrinsic claims to read 8 bytes of it: stores to a local one may be dropped.
static const tile_config squares = {
    .palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

void rbe_split_begin__avx512amx(void) { _tile_loadconfig(&squares); }

void rbe_split_end__avx512amx(void) { _tile_release(); }

// Tiles 0..3: C; 4, 5: two blocks of rows of A; 6, 7: two blocks of columns of B.
#define LOAD_A(piece)                                                    \
    _tile_loadd(4, a0 + d * BLOCK + (piece) * TILE, 64);                 \
    if (two_rows) _tile_loadd(5, a1 + d * BLOCK + (piece) * TILE, 64)
#define LOAD_B(piece)                                                    \
    _tile_loadd(6, b0 + d * BLOCK + (piece) * TILE, 64);                 \
    if (two_cols) _tile_loadd(7, b1 + d * BLOCK + (piece) * TILE, 64)
#define MULTIPLY()                                                       \
    _tile_dpbf16ps(0, 4, 6);                                             \
    if (two_cols) _tile_dpbf16ps(1, 4, 7);                               \
    if (two_rows) _tile_dpbf16ps(2, 5, 6);                               \
    if (two_rows && two_cols) _tile_dpbf16ps(3, 5, 7)

// Up to 32 x 32 of C, left in tiles 0..3.
static inline __attribute__((always_inline)) void multiply(const bool two_rows, const bool two_cols, int64_t blocks, const uint16_t *a0,
                                                           const uint16_t *b0, int a_pieces, int b_pieces) {
    const uint16_t *a1 = a0 + blocks * BLOCK, *b1 = b0 + blocks * BLOCK;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < blocks; ++d) {
        LOAD_B(0);
        if (a_pieces > 2) {
            LOAD_A(2);
            MULTIPLY();
        }
        if (a_pieces > 1) {
            LOAD_A(1);
            MULTIPLY();
        }
        if (b_pieces < 2) continue;
        LOAD_B(1);
        if (a_pieces > 1 && (a_pieces > 2 || b_pieces > 2)) {
            MULTIPLY();
        }
        LOAD_A(0);
        MULTIPLY();
        if (b_pieces < 3) continue;
        LOAD_B(2);
        MULTIPLY();
    }
    for (int64_t d = 0; d < blocks; ++d) {
        LOAD_A(0);
        LOAD_B(0);
        MULTIPLY();
    }
}

// Tiles 0..3 into C, through memory where the block is cut short or added to.
static void put(int64_t rows, int64_t cols, float *c, int64_t c_row, bool accumulate) {
    if (rows == 32 && cols == 32 && !accumulate) {
        _tile_stored(0, c, c_row * 4);
        _tile_stored(1, c + 16, c_row * 4);
        _tile_stored(2, c + 16 * c_row, c_row * 4);
        _tile_stored(3, c + 16 * c_row + 16, c_row * 4);
        return;
    }
    float block[32 * 32] __attribute__((aligned(64)));
    _tile_stored(0, block, 128);
    _tile_stored(1, block + 16, 128);
    _tile_stored(2, block + 16 * 32, 128);
    _tile_stored(3, block + 16 * 32 + 16, 128);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = 0; j < cols; j += 16) {
            const __mmask16 mask = first(cols - j);
            __m512 sum = _mm512_load_ps(block + r * 32 + j);
            if (accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c + r * c_row + j), sum);
            _mm512_mask_storeu_ps(c + r * c_row + j, mask, sum);
        }
    }
}

static void block_of(int64_t rows, int64_t blocks, int64_t cols, const uint16_t *a, int a_pieces, const uint16_t *b, int b_pieces, float *c, int64_t c_row,
                     bool accumulate) {
    const bool two_rows = rows > 16, two_cols = cols > 16;
    if (two_rows && two_cols)
        multiply(true, true, blocks, a, b, a_pieces, b_pieces);
    else if (two_rows)
        multiply(true, false, blocks, a, b, a_pieces, b_pieces);
    else if (two_cols)
        multiply(false, true, blocks, a, b, a_pieces, b_pieces);
    else
        multiply(false, false, blocks, a, b, a_pieces, b_pieces);
    put(rows < 32 ? rows : 32, cols < 32 ? cols : 32, c, c_row, accumulate);
}

// The smaller operand passes by in the inner loop, and stays in L1 if it is small enough.
void rbe_gemm_split__avx512amx(int64_t rows, int64_t depth, int64_t cols, const uint16_t *a, int a_pieces, const uint16_t *b, int b_pieces,
                               float *c, int64_t c_row, bool accumulate) {
    const int64_t blocks = (depth + 31) / 32, step = blocks * BLOCK;
    if (rows > cols) {
        for (int64_t r = 0; r < rows; r += 32)
            for (int64_t j = 0; j < cols; j += 32)
                block_of(rows - r, blocks, cols - j, a + r / 16 * step, a_pieces, b + j / 16 * step, b_pieces, c + r * c_row + j, c_row, accumulate);
    } else {
        for (int64_t j = 0; j < cols; j += 32)
            for (int64_t r = 0; r < rows; r += 32)
                block_of(rows - r, blocks, cols - j, a + r / 16 * step, a_pieces, b + j / 16 * step, b_pieces, c + r * c_row + j, c_row, accumulate);
    }
}
