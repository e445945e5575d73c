// Which path a product takes: a cost model in units of one float32 multiply-add lane (0.01 ns on the machine of kernels/README.md), with
// constants measured there on shapes of 2048 x 2048 and 4096 x 4096. Only the order of the costs matters.
#include <stdio.h>

#include "dispatch.h"
#include "plan.h"

enum { TOKENS_ONE_BY_ONE = 2, TOKENS_DOTTED = 6, TOKENS_LUT8 = 16, GROUP_LUT8 = 32, TOKENS_ONE_DIGIT = 32 };

static const double SUM_LANE = 4.5;       // one lane of a table row: its line comes from L2
static const double UNPACK_CODE = 58.0;   // word -> idx and scale, curves at random
static const double GATHER_CODE = 40.0;   // one code of one token, looked up by a gather
static const double DOT_WEIGHT = 4.0;     // one weight of one token in a dot product
static const double BACKWARD_LANE = 8.0;  // one lane of a code's D and dP
static const double MASKED_GROUP = 140.0; // a group that is not whole vectors, decoded

static const double LOOKUP = 3.6, LOOKUP_EXACT = 7.7;        // one code of one token in a table of bytes
static const double BYTE_TABLE = 4.3, BYTE_TABLE_EXACT = 6.0;  // one entry of such a table: product and rounding
static const double TURN_CODE = 20.0;                        // between packed and interleaved
static const double DIGIT_CODE = 22.0;                       // one digit of eight weights of one code, looked up
static const double DIGIT_LANE = 0.08, DIGIT_LANES = 0.03;   // one weight of one token on the matrix unit: with one digit and one more

static _Atomic rbe_path forced;

void rbe_use_path(rbe_path path) { forced = path; }

static double tokens_in_tiles(const rbe_kernels *kernels, int64_t tokens) {
    return (double)((tokens + kernels->width - 1) / kernels->width * kernels->width);
}

static bool has_table(const rbe_layout *l) { return l->field != RBE_FIELD_RBE16S && l->residual == RBE_RESIDUAL_NONE; }

// A lane of a dense product: of the micro-kernel, or of the matrix unit with its splits and sums.
static double dense_lane(const rbe_kernels *kernels, bool fast) { return !kernels->gemm_split ? 1.1 : fast ? 0.3 : 0.75; }

static double unpack_code(const rbe_layout *l) { return rbe_field_has_scale(l->field) ? UNPACK_CODE : 1.0; }

static double decode_weight(const rbe_kernels *kernels, const rbe_layout *l) {
    const int64_t vectors = (l->group + kernels->width - 1) / kernels->width;
    double group = 60.0 + (double)vectors * (90.0 + 60.0 * l->stages);
    if (2 * l->group == kernels->width)
        group = 30.0 + 30.0 * l->stages;
    else if (l->group % kernels->width)
        group += MASKED_GROUP;
    return (group + l->stages * unpack_code(l)) / l->group;
}

int rbe_weight_digits(const rbe_layout *l, int64_t tokens) { return tokens <= TOKENS_ONE_DIGIT && l->stages <= 2 ? 1 : 2; }

// The integer paths of rbe8, if one of them costs less than `most`.
static rbe_path plan_bytes(const rbe_kernels *kernels, const rbe_layout *l, double weights, double table, int64_t tokens, bool fast, rbe_form form,
                           double most, rbe_path otherwise) {
    const double codes = weights / l->group * l->stages, t = (double)tokens, turn = form == RBE_FORM_INTERLEAVED ? 0.0 : TURN_CODE;
    const double bytes = codes * ((fast ? LOOKUP : LOOKUP_EXACT) * t + turn) + table * t * (fast ? BYTE_TABLE : BYTE_TABLE_EXACT);
    const int digits = rbe_weight_digits(l, tokens);
    const double tiles = (double)((tokens + 15) / 16 * 16);
    const double integer = codes * (DIGIT_CODE * l->group / 8.0 * digits + turn) + weights * tiles * (DIGIT_LANE + DIGIT_LANES * digits);
    const bool can_lut = kernels->lut8_rows && tokens <= TOKENS_LUT8 && l->group <= GROUP_LUT8;
    const bool can_digits = fast && kernels->digits_multiply && l->group % 4 == 0;
    if (can_lut && bytes < most && (bytes < integer || !can_digits)) return RBE_PATH_LUT8;
    return can_digits && integer < most ? RBE_PATH_DIGITS : otherwise;
}

// Whether a path that a test asked for is one that this product has.
static bool has_path(const rbe_kernels *kernels, const rbe_layout *l, rbe_path path, bool fast, rbe_form form) {
    const bool bytes = form != RBE_FORM_WORDS && l->field == RBE_FIELD_RBE8 && l->residual == RBE_RESIDUAL_NONE;
    switch (path) {
        case RBE_PATH_PLANNED: return false;
        case RBE_PATH_TABLE:
        case RBE_PATH_TABLE_TOKEN: return has_table(l);
        case RBE_PATH_LUT8: return bytes && kernels->lut8_rows;
        case RBE_PATH_DIGITS: return bytes && fast && kernels->digits_multiply && l->group % 4 == 0;
        default: return true;
    }
}

rbe_path rbe_plan_linear(const rbe_kernels *kernels, const rbe_layout *l, int64_t rows, int64_t cols, int64_t tokens, bool fast,
                         rbe_form form) {
    if (has_path(kernels, l, forced, fast, form)) return forced;
    const double weights = (double)rows * (double)cols, codes = weights / l->group * l->stages, t = (double)tokens;
    const double lanes = tokens_in_tiles(kernels, tokens), table = 256.0 * l->stages * (double)cols;
    const double decoded = decode_weight(kernels, l), split = kernels->gemm_split ? 8.0 : 0.0;
    const double turn = form == RBE_FORM_INTERLEAVED ? TURN_CODE * codes : 0.0;
    const double decode = weights * ((decoded + split) * (double)((tokens + 511) / 512) + dense_lane(kernels, fast) * lanes) + turn;
    const double dot = tokens <= TOKENS_DOTTED ? weights * (decoded + DOT_WEIGHT * t) + turn : decode;
    double cost = dot < decode ? dot : decode;
    rbe_path path = dot < decode ? RBE_PATH_DECODE_DOT : RBE_PATH_DECODE;
    if (!has_table(l)) return path;
    const double tiles = table * lanes * dense_lane(kernels, fast) + codes * (unpack_code(l) + SUM_LANE * lanes) + turn;
    const double token = tokens <= TOKENS_ONE_BY_ONE ? table * 2.0 * t + codes * (unpack_code(l) + GATHER_CODE * t) + turn : tiles;
    if ((token < tiles ? token : tiles) <= cost) {
        cost = token < tiles ? token : tiles;
        path = token < tiles ? RBE_PATH_TABLE_TOKEN : RBE_PATH_TABLE;
    }
    if (form == RBE_FORM_WORDS || l->field != RBE_FIELD_RBE8) return path;
    return plan_bytes(kernels, l, weights, table, tokens, fast, form, cost, path);
}

rbe_path rbe_plan_backward(const rbe_kernels *kernels, const rbe_layout *l, int64_t rows, int64_t cols, int64_t tokens) {
    const rbe_path wanted = forced;
    if (wanted == RBE_PATH_DECODE || !has_table(l)) return RBE_PATH_DECODE;
    if (wanted == RBE_PATH_TABLE) return RBE_PATH_TABLE;
    const double weights = (double)rows * (double)cols, codes = weights / l->group * l->stages;
    const double lanes = tokens_in_tiles(kernels, tokens), lane = dense_lane(kernels, false);
    const double table = lanes * (3.0 * 256.0 * l->stages * (double)cols * lane + BACKWARD_LANE * codes) + codes * unpack_code(l);
    const double decode = weights * (2.5 * lane * lanes + 3.0 * decode_weight(kernels, l));
    return table < decode ? RBE_PATH_TABLE : RBE_PATH_DECODE;
}

int rbe_describe_linear(const rbe_layout *layout, int64_t rows, int64_t cols, int64_t tokens, rbe_dtype x, rbe_accuracy accuracy,
                        char *text, size_t size) {
    static const char *const what[] = {
        [RBE_PATH_TABLE] = "table: x times the basis, then a sum over codes, tiles of tokens",
        [RBE_PATH_TABLE_TOKEN] = "table: x times the basis, gathered by code, token by token",
        [RBE_PATH_LUT8] = "table of bytes: 8-bit lookups",
        [RBE_PATH_DIGITS] = "decode to bytes, matrix unit",
        [RBE_PATH_DECODE_DOT] = "decode a row, dot products",
        [RBE_PATH_DECODE] = "decode a tile, dense micro-kernel",
    };
    const rbe_kernels *kernels;
    rbe_error err;
    if (rbe_choose_kernels(&kernels, &err) != RBE_OK) return snprintf(text, size, "%s", err.text);
    const bool fast = rbe_is_fast(accuracy, x);
    const rbe_path path = rbe_plan_linear(kernels, layout, rows, cols, tokens, fast, rbe_reads_interleaved() ? RBE_FORM_INTERLEAVED : RBE_FORM_PACKED);
    return snprintf(text, size, "%s, %s, %s", kernels->name, fast ? "fast" : "exact", what[path]);
}
