// Which path a product takes: a cost model in units of one float32 multiply-add lane (0.01 ns on the machine of kernels/README.md), with
// constants measured there on shapes of 2048 x 2048 and 4096 x 4096. Only the order of the costs matters.
#include <stdio.h>

#include "dispatch.h"
#include "product.h"

enum { TOKENS_ONE_BY_ONE = 2, TOKENS_DOTTED = 6, TOKENS_LUT8 = 16, GROUP_LUT8 = 32, TOKENS_ONE_DIGIT = 32, COLUMNS_DIGITS = 2048 };

static const double SUM_LANE = 4.5;       // one lane of a table row: its line comes from L2
static const double HALF_LANE = 1.8;      // the same in float16
static const double HALF_TABLE_LANE = 0.3;  // one weight of the basis and one token on the matrix unit, rounded to float16
static const double UNPACK_CODE = 58.0;   // word -> idx and scale, curves at random
static const double GATHER_CODE = 40.0;   // one code of one token, looked up by a gather
static const double DOT_WEIGHT = 4.0;     // one weight of one token in a dot product
static const double BACKWARD_LANE = 8.0;  // one lane of a code's D and dP
static const double MASKED_GROUP = 140.0; // a group that is not whole vectors, decoded

static const double SIGNS_CODE = 60.0;    // signs of a code put on, decoded

static const double LOOKUP = 3.6, LOOKUP_EXACT = 8.2;       // one code of one token in a table of bytes
static const double BYTE_TABLE = 2.5, BYTE_TABLE_EXACT = 3.0;  // one entry of such a table: product and rounding
static const double TURN_CODE = 17.0, TURN_TILE = 6.0;       // a byte between packed and interleaved; tile by tile, asked for ahead
static const double FEW_CODE[] = {21.0, 32.0};               // one code, 4 or 8 tokens at once
static const double FEW_LANE = 2.0;                          // one token of an entry of their tables
static const double LOOKUP_WEIGHT[] = {6.0, 13.0, 21.0};     // one weight, 4, 8 or 16 tokens at once
static const double LOOKUP_STAGE = 2.0;                      // and one stage of it
static const double LOOKUP_SPLIT[] = {19.0, 0.6, 7.1}, LOOKUP_SPLIT_FAST[] = {8.0, 1.2, 3.5};  // one weight, a stage of it, one weight and 16 tokens
static const double DIGIT_CODE[] = {0.0, 15.0, 30.0, 52.0};  // one, two, three digits of eight weights of one code, looked up
static const double DIGIT_TILE[] = {0.0, 1.8, 3.3, 6.7};     // one weight and 16 tokens on the matrix unit
static const double DIGIT_BASIS = 40.0, DIGIT_X = 12.0;      // a digit of an entry of the basis; an entry of x
static const double DIGIT_PACKED = 0.7;                      // one digit of a weight and a few tokens that share a tile

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
    if (l->field == RBE_FIELD_RBE16S) group += SIGNS_CODE * l->stages;
    return (group + l->stages * unpack_code(l)) / l->group;
}

int rbe_weight_digits(const rbe_layout *l, int64_t tokens) { return tokens <= TOKENS_ONE_DIGIT && l->stages <= 2 ? 1 : 2; }

// Codes of one byte, or with signs; three digits of those have room for one stage.
static bool has_digits(const rbe_kernels *kernels, const rbe_layout *l, bool fast) {
    const bool signs = l->field == RBE_FIELD_RBE16S;
    return kernels->digits_multiply && (l->field == RBE_FIELD_RBE8 || signs) && l->residual == RBE_RESIDUAL_NONE &&
           rbe_digit_whole(l->group) * l->group <= COLUMNS_DIGITS && l->stages <= RBE_DIGIT_STAGES && (fast || !signs || l->stages == 1);
}

static double digits_cost(const rbe_layout *l, double weights, int64_t cols, int64_t tokens, bool fast) {
    const int w = fast ? rbe_weight_digits(l, tokens) : 3;
    const double codes = weights / l->group * l->stages, tiles = (double)((tokens + 15) / 16);
    const double product = tokens <= 16 / (fast ? 2 : 3) ? DIGIT_PACKED * w : DIGIT_TILE[w] * tiles;
    return codes * DIGIT_CODE[w] * l->group / 8.0 * (double)((tokens + 255) / 256) + weights * product +
           DIGIT_BASIS * w * RBE_BASIS_VECTORS * l->group * l->stages + DIGIT_X * (double)cols * (double)tokens;
}

static double few_cost(double codes, double table, int64_t tokens) {
    double cost = 0.0;
    for (; tokens > 0; tokens -= 8) {
        const bool four = tokens <= 4;
        cost += codes * FEW_CODE[!four] + table * FEW_LANE * (four ? 4.0 : 8.0);
    }
    return cost;
}

static bool has_lookup(const rbe_kernels *kernels, const rbe_layout *l) { return kernels->lookup_rows && l->group == 8 && l->stages <= 4; }

static bool has_lookup_split(const rbe_kernels *kernels, const rbe_layout *l) { return kernels->lookup_split && l->group == 8 && l->stages <= 4; }

static double lookup_split_cost(const rbe_layout *l, double weights, int64_t cols, int64_t tokens, bool fast) {
    const double made = fast ? LOOKUP_SPLIT_FAST[0] + LOOKUP_SPLIT_FAST[1] * l->stages : LOOKUP_SPLIT[0] + LOOKUP_SPLIT[1] * l->stages;
    return weights * (made * (double)((tokens + 127) / 128) + (fast ? LOOKUP_SPLIT_FAST[2] : LOOKUP_SPLIT[2]) * (double)((tokens + 15) / 16)) +
           DIGIT_X * (double)cols * (double)tokens;
}

static double lookup_cost(const rbe_layout *l, double weights, int64_t tokens) {
    return weights * (LOOKUP_WEIGHT[tokens <= 4 ? 0 : tokens <= 8 ? 1 : 2] + LOOKUP_STAGE * l->stages);
}

// The paths of codes of one byte, with signs or without, if one of them costs less than `most`.
static rbe_path plan_bytes(const rbe_kernels *kernels, const rbe_layout *l, int64_t rows, int64_t cols, double table, int64_t tokens, bool fast, rbe_form form,
                           double most, rbe_path otherwise) {
    const bool signs = l->field == RBE_FIELD_RBE16S;
    const double weights = (double)((rows + RBE_LANES - 1) / RBE_LANES * RBE_LANES) * (double)cols, codes = weights / l->group * l->stages;
    const double t = (double)tokens;
    const bool turned = form != RBE_FORM_INTERLEAVED;
    rbe_path path = otherwise;
    const double tiles = codes * (turned ? TURN_TILE * (signs ? 2.0 : 1.0) : 0.0);
    const double cost[] = {codes * (turned ? TURN_CODE : 0.0) + codes * (fast ? LOOKUP : LOOKUP_EXACT) * t + table * t * (fast ? BYTE_TABLE : BYTE_TABLE_EXACT),
                           few_cost(codes, table, tokens), tiles + lookup_cost(l, weights, tokens), tiles + lookup_split_cost(l, weights, cols, tokens, fast),
                           tiles + digits_cost(l, weights, cols, tokens, fast)};
    const rbe_path paths[] = {RBE_PATH_LUT8, RBE_PATH_FEW, RBE_PATH_LOOKUP, RBE_PATH_LOOKUP_SPLIT, RBE_PATH_DIGITS};
    const bool can[] = {kernels->lut8_rows && !signs && tokens <= TOKENS_LUT8 && l->group <= GROUP_LUT8,
                        kernels->few_rows && !signs && tokens <= TOKENS_LUT8 && l->group <= GROUP_LUT8,
                        has_lookup(kernels, l) && !signs && tokens <= TOKENS_LUT8, has_lookup_split(kernels, l) && !signs, has_digits(kernels, l, fast)};
    for (int i = 0; i < 5; ++i) {
        if (!can[i] || cost[i] >= most) continue;
        most = cost[i];
        path = paths[i];
    }
    return path;
}

// Whether a path that a test asked for is one that this product has.
static bool has_path(const rbe_kernels *kernels, const rbe_layout *l, rbe_path path, bool fast, rbe_form form) {
    const bool bytes = form != RBE_FORM_WORDS && l->field == RBE_FIELD_RBE8 && l->residual == RBE_RESIDUAL_NONE;
    switch (path) {
        case RBE_PATH_PLANNED: return false;
        case RBE_PATH_TABLE:
        case RBE_PATH_TABLE_TOKEN: return has_table(l);
        case RBE_PATH_TABLE_HALF: return fast && has_table(l) && kernels->half_rows;
        case RBE_PATH_LUT8: return bytes && kernels->lut8_rows;
        case RBE_PATH_FEW: return bytes && kernels->few_rows;
        case RBE_PATH_LOOKUP: return bytes && has_lookup(kernels, l);
        case RBE_PATH_LOOKUP_SPLIT: return bytes && has_lookup_split(kernels, l);
        case RBE_PATH_DIGITS: return form != RBE_FORM_WORDS && has_digits(kernels, l, fast);
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
    const bool bytes = form != RBE_FORM_WORDS && l->residual == RBE_RESIDUAL_NONE;
    if (l->field == RBE_FIELD_RBE16S && bytes) return plan_bytes(kernels, l, rows, cols, table, tokens, fast, form, cost, path);
    if (!has_table(l)) return path;
    const double tiles = table * lanes * dense_lane(kernels, fast) + codes * (unpack_code(l) + SUM_LANE * lanes) + turn;
    const double half_lanes = (double)((tokens + 31) / 32 * 32);
    const double halves = fast && kernels->half_rows
                              ? table * half_lanes * (kernels->half_table ? HALF_TABLE_LANE : 1.2) + codes * (unpack_code(l) + HALF_LANE * half_lanes) + turn
                              : tiles;
    const double token = tokens <= TOKENS_ONE_BY_ONE ? table * 2.0 * t + codes * (unpack_code(l) + GATHER_CODE * t) + turn : tiles;
    const double table_cost = halves < tiles ? halves : tiles;
    if ((token < table_cost ? token : table_cost) <= cost) {
        cost = token < table_cost ? token : table_cost;
        path = token < table_cost ? RBE_PATH_TABLE_TOKEN : halves < tiles ? RBE_PATH_TABLE_HALF : RBE_PATH_TABLE;
    }
    if (!bytes || l->field != RBE_FIELD_RBE8) return path;
    return plan_bytes(kernels, l, rows, cols, table, tokens, fast, form, cost, path);
}

rbe_path rbe_plan_backward(const rbe_kernels *kernels, const rbe_layout *l, int64_t rows, int64_t cols, int64_t tokens, bool fast) {
    const rbe_path wanted = forced;
    const bool halves = fast && kernels->half_backward && kernels->half_dx && rows <= RBE_SORTED_ROWS;
    if (wanted == RBE_PATH_DECODE || !has_table(l)) return RBE_PATH_DECODE;
    if (wanted == RBE_PATH_TABLE) return RBE_PATH_TABLE;
    if (wanted == RBE_PATH_TABLE_HALF && halves) return RBE_PATH_TABLE_HALF;
    const double weights = (double)rows * (double)cols, codes = weights / l->group * l->stages;
    const double lanes = tokens_in_tiles(kernels, tokens), lane = dense_lane(kernels, false);
    const double table = lanes * (3.0 * 256.0 * l->stages * (double)cols * lane + BACKWARD_LANE * codes) + codes * unpack_code(l);
    const double decode = weights * (2.5 * lane * lanes + 3.0 * decode_weight(kernels, l));
    return table < decode ? halves ? RBE_PATH_TABLE_HALF : RBE_PATH_TABLE : RBE_PATH_DECODE;
}

int rbe_describe_linear(const rbe_layout *layout, int64_t rows, int64_t cols, int64_t tokens, rbe_dtype x, rbe_accuracy accuracy,
                        char *text, size_t size) {
    static const char *const what[] = {
        [RBE_PATH_TABLE] = "table: x times the basis, then a sum over codes, tiles of tokens",
        [RBE_PATH_TABLE_HALF] = "table in float16: x times the basis, then a sum over codes, tiles of tokens",
        [RBE_PATH_TABLE_TOKEN] = "table: x times the basis, gathered by code, token by token",
        [RBE_PATH_LUT8] = "table of bytes: 8-bit lookups",
        [RBE_PATH_FEW] = "table of few tokens, additions from memory",
        [RBE_PATH_LOOKUP] = "looked up in the basis, multiplied on the way",
        [RBE_PATH_LOOKUP_SPLIT] = "looked up in the basis, matrix unit",
        [RBE_PATH_DIGITS] = "decode to bytes, matrix unit",
        [RBE_PATH_DECODE_DOT] = "decode a row, dot products",
        [RBE_PATH_DECODE] = "decode a tile, dense micro-kernel",
    };
    const rbe_kernels *kernels;
    rbe_error err;
    if (rbe_choose_kernels(&kernels, &err) != RBE_OK) return snprintf(text, size, "%s", err.text);
    const bool fast = rbe_is_fast(accuracy, x);
    const rbe_form form = layout->field == RBE_FIELD_RBE8 && rbe_reads_interleaved() ? RBE_FORM_INTERLEAVED : RBE_FORM_PACKED;
    const rbe_path path = rbe_plan_linear(kernels, layout, rows, cols, tokens, fast, form);
    return snprintf(text, size, "%s, %s, %s", kernels->name, fast ? "fast" : "exact", what[path]);
}
