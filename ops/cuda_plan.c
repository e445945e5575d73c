// Which path a product takes on a CUDA device: costs in multiply-adds of the matrix unit (half types) or of the float32 lanes, for each
// column and token. The constants come from counting instructions and bytes on an H100 (docs/cuda.md); none is measured.
#include <stdatomic.h>

#include "cuda_internal.h"

enum { LOOKUP_TOKENS = 4, LOOKUP_GROUP = 32, TOKEN_TOKENS = 16 };

static const double GATHER_HALF = 37.0;       // one code of one token: 35 a clock against 1300 multiply-adds of mma.sync
static const double GATHER_F32 = 6.0;         // 32 lookups a clock against 128 multiply-adds, and the table's way through L2
static const double DECODE_HALF = 1.6;        // a decoded weight's multiply-add, while warps decode beside it
static const double BACKWARD_HALF = 74.0, BACKWARD_F32 = 8.0;  // one code of one token, d and dtable

static _Atomic int forced = -1;
void rbe_cuda_use_path(int path) { forced = path; }

static _Atomic int64_t workspace;
void rbe_cuda_use_workspace(int64_t bytes) { workspace = bytes; }
int64_t rbe_cuda_workspace(void) {
    const int64_t bytes = workspace;
    return bytes > 0 ? bytes : (int64_t)128 << 20;
}

static double row_tiles(int64_t rows) { return (double)rbe_cuda_up(rows, RBE_CU_ROWS) / RBE_CU_ROWS; }

static bool possible(rbe_cuda_path path, const rbe_layout *l, rbe_dtype x, int64_t rows, int64_t cols, int64_t tokens) {
    const bool table = rbe_cuda_has_table(l), scaled = rbe_field_has_scale(l->field);
    switch (path) {
        case RBE_CUDA_LOOKUP:
            return x != RBE_F64 && l->field == RBE_FIELD_RBE8 && table && tokens <= LOOKUP_TOKENS && l->group <= LOOKUP_GROUP;
        case RBE_CUDA_TOKEN: return x != RBE_F64 && table && tokens <= TOKEN_TOKENS;
        case RBE_CUDA_TILES: return rbe_cuda_half(x) && table && scaled;
        case RBE_CUDA_GATHER: return x == RBE_F32 && table;
        case RBE_CUDA_FRAGMENTS:
            return rbe_cuda_half(x) && rows < INT32_MAX / 2 && cols < INT32_MAX / 2 && l->group == 8 && l->residual == RBE_RESIDUAL_NONE &&
                   ((l->field == RBE_FIELD_RBE8 && l->stages <= 4) || (l->field == RBE_FIELD_RBE16S && l->stages <= 2));
        case RBE_CUDA_DECODE_MMA: return rbe_cuda_half(x);
        default: return !rbe_cuda_half(x);
    }
}

rbe_cuda_path rbe_cuda_plan(const rbe_layout *l, rbe_dtype x, int64_t rows, int64_t cols, int64_t tokens) {
    const int wanted = forced;
    if (wanted >= 0 && possible((rbe_cuda_path)wanted, l, x, rows, cols, tokens)) return (rbe_cuda_path)wanted;
    const bool fragments = possible(RBE_CUDA_FRAGMENTS, l, x, rows, cols, tokens);
    if (possible(RBE_CUDA_LOOKUP, l, x, rows, cols, tokens) && !(fragments && tokens > 1)) return RBE_CUDA_LOOKUP;
    if (possible(RBE_CUDA_TOKEN, l, x, rows, cols, tokens) && rbe_field_has_scale(l->field)) return RBE_CUDA_TOKEN;
    if (fragments) return RBE_CUDA_FRAGMENTS;
    const double vectors = 256.0 * l->stages, gathered = (double)rows * l->stages / l->group;
    if (possible(RBE_CUDA_TILES, l, x, rows, cols, tokens) && vectors * row_tiles(rows) + GATHER_HALF * gathered < DECODE_HALF * (double)rows)
        return RBE_CUDA_TILES;
    if (possible(RBE_CUDA_GATHER, l, x, rows, cols, tokens) && vectors + GATHER_F32 * gathered < (double)rows) return RBE_CUDA_GATHER;
    return rbe_cuda_half(x) ? RBE_CUDA_DECODE_MMA : RBE_CUDA_DECODE_GEMM;
}

bool rbe_cuda_plan_backward_table(const rbe_layout *l, rbe_dtype x, int64_t rows, int64_t cols, int64_t tokens) {
    (void)cols, (void)tokens;
    rbe_layout codes = *l;
    const bool eight_bits = l->residual == RBE_RESIDUAL_INT8 || l->residual == RBE_RESIDUAL_FP8;
    if (eight_bits) codes.residual = RBE_RESIDUAL_NONE;
    if (x == RBE_F64 || !rbe_cuda_has_table(&codes)) return false;
    if (forced >= 0) return forced != RBE_CUDA_DECODE_GEMM && forced != RBE_CUDA_DECODE_MMA;
    const double vectors = 256.0 * l->stages, gathered = (double)rows * l->stages / l->group;
    return 3.0 * vectors + (x == RBE_BF16 ? BACKWARD_HALF : BACKWARD_F32) * gathered < (eight_bits ? 1.0 : 2.0) * (double)rows;
}
