// The compute kernels of one ISA as a table of functions. README.md has the naming grammar and how to add an ISA.
//
// Kernels are plain loops over the arrays they are given: they allocate nothing, start no threads, keep no state and check no arguments
// (ops/ did). Arrays do not overlap unless said; none needs alignment; a size may be zero. An element of a result is always computed by
// the same sequence of operations, whatever rows or columns are computed with it, so splitting work changes no result.
//
// Letters: m rows, g group, K groups, M stages, q = k*M + s a code's place in its row, W tokens of a tile (a multiple of width).
#ifndef RBE_KERNELS_H
#define RBE_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "format.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
    RBE_PLACES_AHEAD = 8,
    RBE_LANES = 64,  // rows of interleaved codes that stand side by side
    RBE_SCORE_LANES = 16,
    RBE_DIGIT_STAGES = 16,
    RBE_HALF_CODES = 16,  // codes whose sum is a short one in float16
    RBE_HALF_SUM = 256,   // codes that are summed in float16 at all
    RBE_HALF_BOUND = 5,   // |P| <= 2^5 in float16: 256 codes of at most exp(2) = 7.4 times that stay below 65504
    RBE_HALF_WIDTH = 128,  // most tokens of a tile of the backward in float16
};

// What turns a sum of the half-precision path into y: sum * unscale[t] * gain[i] + bias[i]; bias may be NULL.
typedef struct rbe_half_finish {
    const float *unscale, *gain, *bias;
} rbe_half_finish;

// The stored codes of one row of a weight.
typedef struct rbe_code_row {
    rbe_field field;
    int64_t count;           // K*M
    const int32_t *words;    // [count] interchange words, or
    const uint8_t *packed;   // the packed bytes
    const float *amplitude;  // [count] or NULL: replaces sign, amp and amp_fine
    uint32_t seed, first;    // seeded idx, packed: the seed and c of code 0 (kernels/format.h)
} rbe_code_row;

// How W and x are cut into digits of bytes (digits_of_basis and what follows it).
typedef struct rbe_digits {
    int64_t stages, group;  // stages at most RBE_DIGIT_STAGES
    int w, x;               // digits of each
    int packed;             // tokens at most that share one tile of x, digit below digit; 0: a tile for each digit
    bool flipped, carry;    // codes have signs; stages are added as whole numbers of three bytes
    float step, base;
} rbe_digits;

// Memory to ask for while something else is computed: line s lies at `at` + s % 64 * row + s / 64 * line, and may lie outside any array.
typedef struct rbe_ahead {
    uintptr_t at;
    int64_t row, line;
} rbe_ahead;

typedef struct rbe_kernels {
    const char *isa;
    const char *name;  // the ISA with the features that only some of its processors have
    int64_t width;     // floats in a vector

    // Codes q0 .. q0+count-1 of a row -> idx, scale (bit-identical to the reference) and, for rbe16s, signs [count].
    // scale may be NULL for rbe8 and rbe16s, signs for all others.
    void (*unpack)(const rbe_code_row *row, int64_t q0, int64_t count, uint8_t *idx, float *scale, uint8_t *signs);

    // gradient = dscale * d scale/da for the row's amplitudes; zero where |a| >= 1 and descent would increase |a|.
    void (*amplitude_gradient)(const rbe_code_row *row, const float *dscale, float *gradient);

    void (*bf16_to_f32)(const uint16_t *in, int64_t count, float *out);
    void (*f16_to_f32)(const uint16_t *in, int64_t count, float *out);
    void (*f32_to_bf16)(const float *in, int64_t count, uint16_t *out);
    void (*f32_to_f16)(const float *in, int64_t count, uint16_t *out);

    // out[c*out_row + r] = in[r*in_row + c], and zero for rows <= r < out_width.
    void (*transpose)(const float *in, int64_t in_row, int64_t rows, int64_t cols, float *out, int64_t out_row, int64_t out_width);

    // The same for a result that no cache will hold: past the caches where its lines allow.
    void (*transpose_stream)(const float *in, int64_t in_row, int64_t rows, int64_t cols, float *out, int64_t out_row, int64_t out_width);

    // C[r, c] (+)= sum over e of A[r*a_row + e*a_col] B[e*b_row + c],  r < rows, e < depth, c < cols.
    void (*gemm)(int64_t rows, int64_t depth, int64_t cols, const float *a, int64_t a_row, int64_t a_col, const float *b, int64_t b_row,
                 float *c, int64_t c_row, bool accumulate);

    // score[r, j] = <v_r, b_j> - half[j], or |<v_r, b_j> inverse[j]| if half is NULL, for r < rows and all 256 vectors b_j of basis
    // [depth][256]; v_r[e] at v[r*v_row + e]. top[r]: the largest; most[r, l], l < RBE_SCORE_LANES: that of the scores j = l, l + 16, ...
    void (*scores)(int64_t rows, int64_t depth, const float *v, int64_t v_row, const float *basis, const float *half, const float *inverse,
                   float *score, float *most, float *top);

    // Of base[r] - 2 score[r, j], or base[r] - score[r, j]^2: a number that at least `want` of them do not exceed, and not many more.
    float (*score_limit)(int64_t rows, const float *base, bool squared, const float *most, int want);

    // The j, in rising order, with score[j] >= limit, j < 256; returns how many.
    int64_t (*at_least)(const float *score, float limit, int32_t *at);

    // out[r][c] += e[r, i] matrix[i*matrix_row + c] for i = 0, 1, ... < depth, each product and sum rounded; r < rows, c < cols; e [rows, depth].
    void (*add_rows)(int64_t rows, int64_t depth, const float *e, const float *matrix, int64_t matrix_row, int64_t cols, float *const *out);

    // y[i, 0..W) = (y[i] if not first) + sum over q < count of scale[i,q] P[q, idx[i,q], 0..W), then * gain[i] + bias[i] if gain is given.
    // idx and scale rows are code_row apart; P is [count][256][W]; scale NULL means 1; bias may be NULL. W is width or 2 * width.
    void (*table_rows)(int64_t rows, int64_t count, const uint8_t *idx, const float *scale, int64_t code_row, const float *p, int64_t w,
                       float *y, bool first, const float *gain, const float *bias);

    // P[q, j] = sum over e < depth of x[k*g + e] basis[s, j, e] for one token: groups of g columns, `cols` in all.
    // turned is the basis as [M][g][256].
    void (*table_token)(int64_t groups, int64_t stages, int64_t g, int64_t cols, const float *x, const float *turned, float *p);

    // sum over q < count of scale[q] P[q, idx[q]], P [count][256]; scale NULL means 1.
    float (*table_dot)(int64_t count, const uint8_t *idx, const float *scale, const float *p);

    // out[k*g + e] = gain * sum over s of scale * (+-) basis[s, idx, e] for the first `cols` columns. scale NULL means 1, signs NULL none.
    void (*decode_row)(int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx, const float *scale,
                       const uint8_t *signs, float gain, float *out);

    // out[t] = sum over e of x[t*x_row + e] w[e]
    void (*dot_rows)(int64_t tokens, int64_t cols, const float *x, int64_t x_row, const float *w, float *out);

    // One group and stage, rows sorted by code, W is 2 or 4 times width. place p holds row[p] with factor[p]; code j has places
    // start[j] .. start[j+1].  d[p] += dot(dy[row[p]], P[j]);  dp[j] = sum over its places of factor[p] dy[row[p]].  dp may be p. row has
    // RBE_PLACES_AHEAD more entries, rows that will be prefetched.
    void (*table_backward)(const int32_t *start, const int32_t *row, const float *factor, const float *dy, const float *p, int64_t w, float *d,
                           float *dp);

    // The transpose of decode_row for one row of dW (`cols` columns): d[q] += sum over e of dw[e] (+-) basis[s, idx, e];
    // dbasis[s, idx, e] += gain * scale * (+-) dw[e]. d or dbasis may be NULL. Returns the sum over q of scale * (what was added to d[q]).
    float (*scatter_row)(int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx, const float *scale,
                        const uint8_t *signs, float gain, const float *dw, float *d, float *dbasis);

    // out[e] += factor * in[e]
    void (*add_scaled)(int64_t count, float factor, const float *in, float *out);
    void (*add_scaled_i8)(int64_t count, float factor, const int8_t *in, float *out);
    void (*add_lookup)(int64_t count, float factor, const float *table, const uint8_t *in, float *out);  // table [256] of in[e]

    // Dense products on a matrix unit, all NULL where there is none; avx512/gemm_split__avx512amx.c has the formats and the error. An operand is
    // split into pieces first (rbe_split_size values of 16 bits; 3 pieces hold a float32), then gemm_split computes what gemm does from them.
    void (*split_rows)(int64_t rows, int64_t depth, const float *a, int64_t a_row, int pieces, uint16_t *out);
    void (*split_cols)(int64_t depth, int64_t cols, const float *b, int64_t b_row, int pieces, uint16_t *out);
    // Of 32 rows both: split_rows, and a step of split_cols of all columns, whose blocks of 16 are `apart`.
    void (*split_both)(int64_t cols, const float *a, int64_t a_row, int pieces, uint16_t *rows, uint16_t *columns, int64_t apart);
    // Products of pieces below the result's precision are left out: of 3 x 3 the three smallest, of 2 x 2 the product of the two second pieces.
    // Pieces that would be subnormal are zero: of |a| or |b| below 1e-32 only the leading 16 bits count, below 1e-38 none.
    // A thread calls split_begin before its gemm_split calls and split_end after them.
    void (*split_begin)(void);
    void (*split_end)(void);
    void (*gemm_split)(int64_t rows, int64_t depth, int64_t cols, const uint16_t *a, int a_pieces, const uint16_t *b, int b_pieces, float *c,
                       int64_t c_row, bool accumulate);

    // Lookups in tables of bytes, all NULL where the ISA has none; avx512/lut8__avx512vbmi.c has the formulas and the trick.
    // P [count][256] of at most 64 codes -> bytes [count][planes][256] and their factor; false if P is not finite. planes: 1, or 3 for 24 bits.
    bool (*lut8_quantise)(int64_t count, const float *p, int planes, uint8_t *table, float *factor);
    // y[t*y_token + i] += sum over q of the byte lookups; y has room for rows rounded up to 64. idx rows are idx_row apart; table is
    // [tokens][count][planes][256], factor [tokens][ceil(count/64)].
    void (*lut8_rows)(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t tokens, int planes, const uint8_t *table,
                      const float *factor, float *y, int64_t y_token);
    // The same of interleaved codes, idx [ceil(rows / 64)][count][64].
    void (*lut8_interleaved)(int64_t rows, int64_t count, const uint8_t *idx, int64_t tokens, int planes, const uint8_t *table,
                             const float *factor, float *y, int64_t y_token);

    // A few tokens in float32 through tables in L1, all NULL where the ISA has none; avx512/few.c has the trick. width: 4 or 8 tokens.
    // x [groups * g][width], turned basis [M][g][256] -> P [groups * M][256][width], of the first `depth` columns of each group
    void (*few_tables)(int64_t groups, int64_t stages, int64_t g, int64_t depth, int64_t width, const float *x, const float *turned, float *p);
    // y[i][width] += sum over q < count of P[q][idx[i,q]]; y has room for rows rounded up to 64. Rows of idx are idx_row apart, or interleaved and tiles of 64 rows are `tile` apart.
    void (*few_rows)(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t width, const float *p, float *y);
    void (*few_interleaved)(int64_t rows, int64_t count, const uint8_t *idx, int64_t tile, int64_t width, const float *p, float *y);

    // The same in float32 from the basis in L1, NULL where the ISA has none, for up to 4 stages and groups of 8; avx512/lookup.c has the formula. tokens: 1, 4, 8 or 16.
    // 64 rows of interleaved codes, x [ceil(cols / 16)][tokens][16] -> y [64][tokens]
    void (*lookup_rows)(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, const float *x, int64_t tokens, float *y);
    // The rows alone, as split rows of 1 or 3 pieces for gemm_split.
    void (*lookup_split)(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, int pieces, uint16_t *out);

    // 64 x 64 bytes: out[c*out_row + r] = in[r*in_row + c], or NULL.
    void (*turn_bytes)(const uint8_t *in, int64_t in_row, uint8_t *out, int64_t out_row);

    // Products of digits, all NULL where there is no matrix unit for bytes; avx512/digits_*.c and integer__avx512amx.c have the formulas and the
    // shapes. digits_multiply between split_begin and split_end. A step is 64 columns, x and W are [steps][...].
    // basis [M][256][g] -> table [digits->w][M][g][256] and digits->step; false if it is not finite, or cannot be scaled.
    bool (*digits_of_basis)(rbe_digits *digits, const float *basis, int8_t *table);
    // x [tokens <= 16, or packed][cols] -> [steps][tiles][16][64] and unit [16], zeros for tokens that do not exist; false if x is not finite.
    bool (*digits_of_tokens)(const rbe_digits *digits, int64_t tokens, int64_t cols, const float *x, int64_t x_row, float *unit, int8_t *out);
    // Interleaved codes [groups * M][1, or 2: signs, idx][64] -> parts o .. end - 1, an even number, of [4][steps][digits->w][16][16][4].
    // As many lines are asked for as the codes have.
    void (*digits_of_codes)(const rbe_digits *digits, int o, int end, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, int64_t first_line,
                            const int8_t *table, int8_t *out);
    // y [tiles][16][64], rows of W in the order of the tiles, = or += the product of `steps`; tiles of tokens are x_tile bytes apart, packed: one.
    void (*digits_multiply)(const rbe_digits *digits, int64_t steps, int64_t tiles, const int8_t *x, int64_t x_tile, const int8_t *w,
                            const float *unit, float *y, bool first);
    // y [16][64] = both at once for one tile of tokens: codes are looked up while the matrix unit multiplies those before. False where there are
    // more sums than tiles for them.
    bool (*digits_stream)(const rbe_digits *digits, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, const int8_t *table,
                          const int8_t *x, const float *unit, float *y);
    // out[t][i] = y[t][where row i stands] * gain[i] + bias[i] for 64 rows
    void (*digits_order)(int64_t tokens, const float *y, const float *gain, const float *bias, float *out);

    // Half precision, all NULL where there is no float16 arithmetic; avx512/half_rows__avx512fp16.c and half_table__avx512amx.c have the formulas.
    // W is 32 or 64. The largest |x|; not finite where an x is not.
    float (*largest)(int64_t count, const float *x);
    // As table_rows without gain and bias, with scale, P and y in float16.
    void (*half_rows)(int64_t rows, int64_t count, const uint8_t *idx, const uint16_t *scale, int64_t code_row, const uint16_t *p, int64_t w,
                      uint16_t *y, bool first);
    // out[i, t] = (out[i, t] if not first) + sums[i, t], made y where finish is given
    void (*half_widen)(int64_t rows, int64_t w, const uint16_t *sums, const rbe_half_finish *finish, float *out, bool first);
    // P in float16 on the matrix unit, NULL where there is none: operands of rbe_half_size values from a matrix [rows in whole 32][depth] and from
    // x [tokens <= W][g], whose rows are multiplied by scale; P[j, t] is multiplied by lanes[t] unless that is NULL. Between split_begin and split_end.
    void (*half_basis)(int64_t rows, int64_t depth, const float *basis, uint16_t *out);
    void (*half_tokens)(int64_t tokens, int64_t g, int64_t w, const float *x, int64_t x_row, const float *scale, int pieces, uint16_t *out);
    void (*half_table)(int64_t g, int64_t w, const uint16_t *basis, const uint16_t *x, int pieces, const float *lanes, uint16_t *p);

    // The backward in half precision, W = 64 or RBE_HALF_WIDTH tokens at a time, of use where both units are; avx512/half_backward__avx512fp16.c and
    // half_products__avx512amx.c have the formulas and operands. out[c*W + t] = float16(scale[t] a[t, c]), t < 32, zero for tokens that do not exist.
    void (*half_turn)(int64_t tokens, int64_t cols, const float *a, int64_t a_row, const float *scale, int64_t w, uint16_t *out);
    // As table_backward, for at most 65536 rows: a place is its row and, in the high half, its factor. d[p] = (d[p] if not first) + unscale * dot; dP leaves
    // as two operands of 256 * W values.
    void (*half_backward)(const int32_t *start, const uint32_t *place, const uint16_t *dy, const uint16_t *p, int64_t w, float unscale, float *d,
                          bool first, uint16_t *dp_rows, uint16_t *dp_cols);
    // A step of 32 tokens of x [tokens][cols] as an operand of rbe_half_step values.
    void (*half_columns)(int64_t tokens, int64_t cols, const float *x, int64_t x_row, const float *scale, uint16_t *out);
    // dx [g in whole 32][W] (+)= turned basis * dP;  dbasis[j*row + e] += dP * x for `cols` columns, over steps of 32 tokens. As gemm_split.
    void (*half_dx)(int64_t g, int64_t w, const uint16_t *turned, const uint16_t *dp_cols, float *dx, bool first);
    void (*half_dbasis)(int64_t steps, int64_t cols, const uint16_t *dp_rows, const uint16_t *x, int64_t x_step, float *dbasis, int64_t row);
} rbe_kernels;

// Steps of 64 columns, four groups side by side, that hold `cols` columns.
static inline int64_t rbe_digit_steps(int64_t g, int64_t cols) { return (((cols + g - 1) / g + 3) / 4 * g + 15) / 16; }

// Groups, whole quads of them, that fill whole steps: a multiple of this.
static inline int64_t rbe_digit_whole(int64_t g) { return (g & -g) < 16 ? 64 / (g & -g) : 4; }

// Whether lut8_interleaved reads one tile of rows after the other, which memory serves best, or, where tables take more than half of L2, 64 codes of all
// rows after the other.
static inline bool rbe_lut8_streams(int64_t tokens, int64_t count, int planes) { return tokens * count * planes <= (1 << 20) / RBE_BASIS_VECTORS; }

static inline int64_t rbe_half_size(int64_t rows_or_cols, int64_t depth) { return (rows_or_cols + 15) / 16 * ((depth + 31) / 32) * 1024; }
static inline int64_t rbe_half_step(int64_t cols) { return (cols + 31) / 32 * 1024; }
static inline int64_t rbe_split_size(int64_t rows_or_cols, int64_t depth) { return (rows_or_cols + 15) / 16 * ((depth + 31) / 32) * 1536; }

// Every function of every ISA that was built, by name; ops/dispatch.c makes the tables.
#define RBE_DECLARE_KERNELS(isa)                                                                                                             \
    void rbe_unpack__##isa(const rbe_code_row *, int64_t, int64_t, uint8_t *, float *, uint8_t *);                                           \
    void rbe_amplitude_gradient__##isa(const rbe_code_row *, const float *, float *);                                                        \
    void rbe_bf16_to_f32__##isa(const uint16_t *, int64_t, float *);                                                                         \
    void rbe_f16_to_f32__##isa(const uint16_t *, int64_t, float *);                                                                          \
    void rbe_f32_to_bf16__##isa(const float *, int64_t, uint16_t *);                                                                         \
    void rbe_f32_to_f16__##isa(const float *, int64_t, uint16_t *);                                                                          \
    void rbe_transpose__##isa(const float *, int64_t, int64_t, int64_t, float *, int64_t, int64_t);                                          \
    void rbe_transpose_stream__##isa(const float *, int64_t, int64_t, int64_t, float *, int64_t, int64_t);                                   \
    void rbe_gemm__##isa(int64_t, int64_t, int64_t, const float *, int64_t, int64_t, const float *, int64_t, float *, int64_t, bool);        \
    void rbe_scores__##isa(int64_t, int64_t, const float *, int64_t, const float *, const float *, const float *, float *, float *, float *); \
    float rbe_score_limit__##isa(int64_t, const float *, bool, const float *, int);                                                          \
    int64_t rbe_at_least__##isa(const float *, float, int32_t *);                                                                            \
    void rbe_add_rows__##isa(int64_t, int64_t, const float *, const float *, int64_t, int64_t, float *const *);                              \
    void rbe_table_rows__##isa(int64_t, int64_t, const uint8_t *, const float *, int64_t, const float *, int64_t, float *, bool,             \
                               const float *, const float *);                                                                                \
    void rbe_table_token__##isa(int64_t, int64_t, int64_t, int64_t, const float *, const float *, float *);                                  \
    float rbe_table_dot__##isa(int64_t, const uint8_t *, const float *, const float *);                                                      \
    void rbe_decode_row__##isa(int64_t, int64_t, int64_t, const float *, const uint8_t *, const float *, const uint8_t *, float, float *);   \
    void rbe_dot_rows__##isa(int64_t, int64_t, const float *, int64_t, const float *, float *);                                              \
    void rbe_table_backward__##isa(const int32_t *, const int32_t *, const float *, const float *, const float *, int64_t, float *,          \
                                   float *);                                                                                             \
    float rbe_scatter_row__##isa(int64_t, int64_t, int64_t, const float *, const uint8_t *, const float *, const uint8_t *, float,            \
                                const float *, float *, float *);                                                                            \
    void rbe_add_scaled__##isa(int64_t, float, const float *, float *);                                                                      \
    void rbe_add_scaled_i8__##isa(int64_t, float, const int8_t *, float *);                                                                  \
    void rbe_add_lookup__##isa(int64_t, float, const float *, const uint8_t *, float *);

RBE_DECLARE_KERNELS(scalar)
RBE_DECLARE_KERNELS(avx2)
RBE_DECLARE_KERNELS(avx512)
RBE_DECLARE_KERNELS(neon)

void rbe_split_rows__avx512amx(int64_t rows, int64_t depth, const float *a, int64_t a_row, int pieces, uint16_t *out);
void rbe_split_cols__avx512amx(int64_t depth, int64_t cols, const float *b, int64_t b_row, int pieces, uint16_t *out);
void rbe_split_both__avx512amx(int64_t cols, const float *a, int64_t a_row, int pieces, uint16_t *rows, uint16_t *columns, int64_t apart);
void rbe_split_begin__avx512amx(void);
void rbe_split_end__avx512amx(void);
void rbe_gemm_split__avx512amx(int64_t rows, int64_t depth, int64_t cols, const uint16_t *a, int a_pieces, const uint16_t *b, int b_pieces,
                               float *c, int64_t c_row, bool accumulate);
bool rbe_digits_of_basis__avx512amx(rbe_digits *digits, const float *basis, int8_t *table);
bool rbe_digits_of_tokens__avx512amx(const rbe_digits *digits, int64_t tokens, int64_t cols, const float *x, int64_t x_row, float *unit, int8_t *out);
void rbe_digits_of_codes__avx512amx(const rbe_digits *digits, int o, int end, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead,
                                    int64_t first_line, const int8_t *table, int8_t *out);
void rbe_digits_multiply__avx512amx(const rbe_digits *d, int64_t steps, int64_t tiles, const int8_t *x, int64_t x_tile, const int8_t *w,
                                    const float *unit, float *y, bool first);
bool rbe_digits_stream__avx512amx(const rbe_digits *d, int64_t groups, const uint8_t *idx, const rbe_ahead *ahead, const int8_t *table,
                                  const int8_t *x, const float *unit, float *y);
void rbe_digits_order__avx512amx(int64_t tokens, const float *y, const float *gain, const float *bias, float *out);
void rbe_few_tables__avx512(int64_t groups, int64_t stages, int64_t g, int64_t depth, int64_t width, const float *x, const float *turned, float *p);
void rbe_few_rows__avx512(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t width, const float *p, float *y);
void rbe_few_interleaved__avx512(int64_t rows, int64_t count, const uint8_t *idx, int64_t tile, int64_t width, const float *p, float *y);
void rbe_lookup_rows__avx512(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, const float *x, int64_t tokens, float *y);
void rbe_lookup_split__avx512amx(int64_t stages, int64_t cols, const uint8_t *idx, const float *basis, int pieces, uint16_t *out);
void rbe_turn_bytes__avx512vbmi(const uint8_t *in, int64_t in_row, uint8_t *out, int64_t out_row);
bool rbe_lut8_quantise__avx512vbmi(int64_t count, const float *p, int planes, uint8_t *table, float *factor);
void rbe_lut8_rows__avx512vbmi(int64_t rows, int64_t count, const uint8_t *idx, int64_t idx_row, int64_t tokens, int planes,
                               const uint8_t *table, const float *factor, float *y, int64_t y_token);
void rbe_lut8_interleaved__avx512vbmi(int64_t rows, int64_t count, const uint8_t *idx, int64_t tokens, int planes, const uint8_t *table,
                                      const float *factor, float *y, int64_t y_token);
float rbe_largest__avx512fp16(int64_t count, const float *x);
void rbe_half_rows__avx512fp16(int64_t rows, int64_t count, const uint8_t *idx, const uint16_t *scale, int64_t code_row, const uint16_t *p, int64_t w,
                               uint16_t *y, bool first);
void rbe_half_widen__avx512fp16(int64_t rows, int64_t w, const uint16_t *sums, const rbe_half_finish *finish, float *out, bool first);
void rbe_half_basis__avx512amx(int64_t rows, int64_t depth, const float *basis, uint16_t *out);
void rbe_half_tokens__avx512amx(int64_t tokens, int64_t g, int64_t w, const float *x, int64_t x_row, const float *scale, int pieces, uint16_t *out);
void rbe_half_table__avx512amx(int64_t g, int64_t w, const uint16_t *basis, const uint16_t *x, int pieces, const float *lanes, uint16_t *p);
void rbe_half_turn__avx512fp16(int64_t tokens, int64_t cols, const float *a, int64_t a_row, const float *scale, int64_t w, uint16_t *out);
void rbe_half_backward__avx512fp16(const int32_t *start, const uint32_t *place, const uint16_t *dy, const uint16_t *p, int64_t w, float unscale, float *d,
                                   bool first, uint16_t *dp_rows, uint16_t *dp_cols);
void rbe_half_columns__avx512amx(int64_t tokens, int64_t cols, const float *x, int64_t x_row, const float *scale, uint16_t *out);
void rbe_half_dx__avx512amx(int64_t g, int64_t w, const uint16_t *turned, const uint16_t *dp_cols, float *dx, bool first);
void rbe_half_dbasis__avx512amx(int64_t steps, int64_t cols, const uint16_t *dp_rows, const uint16_t *x, int64_t x_step, float *dbasis, int64_t row);

#ifdef __cplusplus
}
#endif
#endif
