// A residual multiplied apart from the codes, by cuBLASLt, so that the codes keep the paths they have without one.
//
// Low rank, all types: y += ((x B^T) right_scale) (A scale)^T, and dx += ((dy A) scale) (B right_scale). A and B are widened to the type of
// x, once a call; int8 is exact there.
// int8 and fp8, forward of the class `fast`: each token of x is rounded to int8 or e4m3 with a scale of its own, the product is taken in
// eight bits, and y += token's scale * row's scale * sum. cuBLASLt's own scales are one number a matrix, but for rows and tokens from version
// 12.9 on sm_90 alone, so ours are applied to the sums.
// int8 and fp8, backward of codes by table: dx += dy R, R widened to the type of dy.
#include "cuda_residual.h"

enum { TILE = 16 };  // what tensor cores of eight bits want of every dimension and address

static bool eight_bits(const rbe_layout *l) { return l->residual == RBE_RESIDUAL_INT8 || l->residual == RBE_RESIDUAL_FP8; }

bool rbe_cuda_residual_apart(const rbe_weight *w, rbe_dtype x, int64_t tokens, rbe_accuracy accuracy) {
    enum { FP8_CAPABILITY = 89 };
    if (w->layout.residual == RBE_RESIDUAL_LOWRANK) return true;
    if (!eight_bits(&w->layout) || accuracy != RBE_ACCURACY_FAST || x == RBE_F64) return false;
    if (w->layout.residual == RBE_RESIDUAL_FP8 && rbe_cu_capability() < FP8_CAPABILITY) return false;
    if (w->rows % TILE || w->cols % TILE || (uintptr_t)w->residual.values % TILE) return false;
    // where W is decoded anyway the residual costs least on the way
    const rbe_layout codes = rbe_cuda_without_residual(w).layout;
    const rbe_cuda_path path = rbe_cuda_plan(&codes, x, w->rows, w->cols, tokens);
    return path != RBE_CUDA_DECODE_MMA && path != RBE_CUDA_DECODE_GEMM;
}

rbe_weight rbe_cuda_without_residual(const rbe_weight *w) {
    rbe_weight codes = *w;
    codes.layout.residual = RBE_RESIDUAL_NONE;
    codes.residual = (rbe_residual){NULL, NULL, NULL, NULL};
    return codes;
}

// One of A [m, r] and B [r, n] with its scales, in the type of x.
typedef struct side {
    const int8_t *bytes;
    const float *scale;  // [r]
    int64_t rows, cols;
    bool rank_is_row;
} side;

static rbe_status widen(const side *s, bool scaled, rbe_dtype dtype, const rbe_device *device, void **out, rbe_error *err) {
    RBE_TRY(rbe_cuda_take(device, s->rows * s->cols, rbe_cuda_bytes(dtype), out, err));
    RBE_LAUNCH(rbe_cu_widen(s->bytes, false, s->rows, s->cols, scaled ? s->scale : NULL, s->rank_is_row, *out, dtype, device->stream), err);
    return RBE_OK;
}

// y += ((x first) scale of first) (second with its scales): first and second meet in their rank.
static rbe_status two_products(const rbe_cu_matrix *x, const side *first, const side *second, int64_t rank, const rbe_cu_matrix *y, bool tf32,
                               const rbe_device *device, rbe_error *err) {
    const rbe_dtype type = x->dtype, real = type == RBE_F64 ? RBE_F64 : RBE_F32;
    void *one, *two, *sums, *scale = (void *)(uintptr_t)first->scale;
    rbe_cu_matrix middle = {NULL, type, x->rows, rank, rank};
    RBE_TRY(widen(first, false, type, device, &one, err));
    RBE_TRY(widen(second, true, type, device, &two, err));
    RBE_TRY(rbe_cuda_take(device, x->rows * rank, rbe_cuda_bytes(real), &sums, err));
    RBE_TRY(rbe_cuda_take(device, x->rows * rank, rbe_cuda_bytes(type), &middle.data, err));
    const rbe_gemm into = {
        .m = x->rows, .n = rank, .k = x->cols, .batch = 1, .a = {x->data, x->stride, 0, false}, .b = {one, first->cols, 0, first->rank_is_row},
        .c = sums, .c_stride = rank, .in = (int32_t)type, .out = (int32_t)real, .tf32 = tf32,
    };
    RBE_TRY(rbe_cuda_gemm(&into, device, err));
    if (real == RBE_F64) {
        const rbe_cu_strided all = {first->scale, sizeof(float), RBE_F32, 1, {rank}, {1}};
        RBE_TRY(rbe_cuda_take(device, rank, sizeof(double), &scale, err));
        RBE_LAUNCH(rbe_cu_copy(&all, true, scale, RBE_F64, device->stream), err);
    }
    RBE_LAUNCH(rbe_cu_finish_product(sums, real, 1, scale, NULL, &middle, device->stream), err);
    const rbe_gemm out = {
        .m = x->rows, .n = y->cols, .k = rank, .batch = 1, .a = {middle.data, rank, 0, false}, .b = {two, second->cols, 0, !second->rank_is_row},
        .c = y->data, .c_stride = y->stride, .in = (int32_t)type, .out = (int32_t)y->dtype, .accumulate = true, .tf32 = tf32,
    };
    return rbe_cuda_gemm(&out, device, err);
}

static side left(const rbe_weight *w) { return (side){w->residual.values, w->residual.scale, w->rows, w->layout.rank, false}; }
static side right(const rbe_weight *w) { return (side){w->residual.right, w->residual.right_scale, w->layout.rank, w->cols, true}; }

// Tokens in pieces, so that their sums take a workspace at most.
static rbe_status add_eight_bits(const rbe_weight *w, const rbe_cu_matrix *x, const rbe_cu_matrix *y, const rbe_device *device, rbe_error *err) {
    const bool integers = w->layout.residual == RBE_RESIDUAL_INT8;
    const int64_t most = rbe_cuda_workspace() / (4 * w->rows + w->cols) / TILE * TILE;
    const int64_t piece = rbe_cuda_smaller(rbe_cuda_up(x->rows, TILE), most > TILE ? most : TILE);
    uint8_t *rounded;
    float *scale;
    void *sums;
    RBE_TRY(rbe_cuda_take(device, piece * w->cols, 1, &rounded, err));
    RBE_TRY(rbe_cuda_take(device, piece, sizeof *scale, &scale, err));
    RBE_TRY(rbe_cuda_take(device, piece * w->rows, 4, &sums, err));
    for (int64_t t = 0; t < x->rows; t += piece) {
        rbe_cu_matrix some = *x, to = *y;
        some.rows = to.rows = rbe_cuda_smaller(piece, x->rows - t);
        some.data = (char *)some.data + (size_t)(t * x->stride) * rbe_cuda_bytes(x->dtype);
        to.data = (char *)to.data + (size_t)(t * y->stride) * rbe_cuda_bytes(y->dtype);
        RBE_LAUNCH(rbe_cu_round_tokens(&some, rbe_cuda_up(some.rows, TILE), !integers, rounded, scale, device->stream), err);
        const rbe_gemm product = {
            .m = rbe_cuda_up(some.rows, TILE), .n = w->rows, .k = w->cols, .batch = 1, .a = {rounded, w->cols, 0, false},
            .b = {w->residual.values, w->cols, 0, true}, .c = sums, .c_stride = w->rows,
            .in = integers ? RBE_GEMM_INT8 : RBE_GEMM_E4M3, .out = integers ? RBE_GEMM_INT32 : (int32_t)RBE_F32,
        };
        RBE_TRY(rbe_cuda_gemm(&product, device, err));
        RBE_LAUNCH(rbe_cu_add_scaled(sums, integers, w->residual.scale, scale, &to, device->stream), err);
    }
    return RBE_OK;
}

// dx += dy R with R in the type of dy, in pieces of rows that take a workspace at most.
static rbe_status add_widened_dx(const rbe_weight *w, const rbe_cu_matrix *dy, const rbe_cu_matrix *dx, const rbe_device *device, rbe_error *err) {
    const bool e4m3 = w->layout.residual == RBE_RESIDUAL_FP8;
    const int64_t size = (int64_t)rbe_cuda_bytes(dy->dtype), piece = rbe_cuda_smaller(w->rows, rbe_cuda_workspace() / size / w->cols + 1);
    void *dense;
    RBE_TRY(rbe_cuda_take(device, piece * w->cols, (size_t)size, &dense, err));
    for (int64_t i = 0; i < w->rows; i += piece) {
        const int64_t rows = rbe_cuda_smaller(piece, w->rows - i);
        RBE_LAUNCH(rbe_cu_widen((const char *)w->residual.values + i * w->cols, e4m3, rows, w->cols, w->residual.scale + i, true, dense, dy->dtype,
                                device->stream),
                   err);
        const rbe_gemm product = {
            .m = dy->rows, .n = w->cols, .k = rows, .batch = 1, .a = {(const char *)dy->data + i * size, dy->stride, 0, false},
            .b = {dense, w->cols, 0, false}, .c = dx->data, .c_stride = dx->stride, .in = (int32_t)dy->dtype, .out = (int32_t)dx->dtype,
            .accumulate = true,
        };
        RBE_TRY(rbe_cuda_gemm(&product, device, err));
    }
    return RBE_OK;
}

rbe_status rbe_cuda_add_residual(const rbe_weight *w, const rbe_cu_matrix *x, const rbe_cu_matrix *y, bool tf32, const rbe_device *device,
                                 rbe_error *err) {
    if (eight_bits(&w->layout)) return add_eight_bits(w, x, y, device, err);
    const side a = left(w), b = right(w);
    return two_products(x, &b, &a, w->layout.rank, y, tf32, device, err);
}

rbe_status rbe_cuda_add_residual_dx(const rbe_weight *w, const rbe_cu_matrix *dy, const rbe_cu_matrix *dx, const rbe_device *device,
                                    rbe_error *err) {
    if (eight_bits(&w->layout)) return add_widened_dx(w, dy, dx, device, err);
    const side a = left(w), b = right(w);
    return two_products(dy, &a, &b, w->layout.rank, dx, false, device, err);
}
