// rbe_cuda_linear: check, choose a path, run it. In the exact class half types are computed as float32.
#include "cuda_internal.h"
#include "cuda_residual.h"
#include "product.h"

typedef struct job {
    const rbe_cuda_weight *w;
    rbe_cu_matrix x, y;  // of one type
    const void *bias;
    bool tf32;
    const rbe_device *device;
} job;

// y = x W^T in pieces of rows of W, decoded into a workspace.
static rbe_status decode_gemm(const job *j, rbe_error *err) {
    const rbe_cuda_weight *w = j->w;
    const int64_t m = w->codes.rows, n = w->codes.cols, tokens = j->x.rows;
    const rbe_dtype type = j->x.dtype;
    const int64_t piece = rbe_cuda_smaller(m, rbe_cuda_workspace() / (int64_t)rbe_cuda_bytes(type) / n + 1);
    rbe_cu_matrix dense = {NULL, type, piece, n, n};
    RBE_TRY(rbe_cuda_take(j->device, piece * n, rbe_cuda_bytes(type), &dense.data, err));
    for (int64_t i = 0; i < m; i += piece) {
        const rbe_cuda_weight some = rbe_cuda_rows(w, i, rbe_cuda_smaller(piece, m - i));
        const char *gain = (const char *)w->w->gain + (size_t)i * rbe_cuda_bytes(w->w->real);
        dense.rows = some.codes.rows;
        RBE_LAUNCH(rbe_cu_decode(&some.codes, w->w->basis, gain, &some.residual, &dense, j->device->stream), err);
        const rbe_gemm product = {
            .m = tokens, .n = dense.rows, .k = n, .batch = 1, .a = {j->x.data, j->x.stride, 0, false}, .b = {dense.data, n, 0, true},
            .c = (char *)j->y.data + (size_t)i * rbe_cuda_bytes(type), .c_stride = j->y.stride, .in = type, .out = type, .tf32 = j->tf32,
        };
        RBE_TRY(rbe_cuda_gemm(&product, j->device, err));
    }
    if (!j->bias) return RBE_OK;
    RBE_LAUNCH(rbe_cu_finish_product(j->y.data, w->w->real, 1, NULL, j->bias, &j->y, j->device->stream), err);
    return RBE_OK;
}

static rbe_status lookup(const job *j, rbe_error *err) {
    const rbe_weight *w = j->w->w;
    const int64_t splits = rbe_cu_lookup_splits(&j->w->codes, j->x.rows);
    float *partial;
    RBE_TRY(rbe_cuda_take(j->device, splits * j->x.rows * w->rows, sizeof *partial, &partial, err));
    RBE_LAUNCH(rbe_cu_lookup(&j->w->codes, &j->x, w->basis, partial, j->device->stream), err);
    RBE_LAUNCH(rbe_cu_finish_product(partial, RBE_F32, splits, w->gain, j->bias, &j->y, j->device->stream), err);
    return RBE_OK;
}

static rbe_status token(const job *j, rbe_error *err) {
    const rbe_weight *w = j->w->w;
    float *table;
    RBE_TRY(rbe_cuda_take(j->device, j->x.rows * j->w->count * RBE_BASIS_VECTORS, sizeof *table, &table, err));
    RBE_LAUNCH(rbe_cu_token_table(&j->w->codes, &j->x, w->basis, table, j->device->stream), err);
    RBE_LAUNCH(rbe_cu_token_gather(&j->w->codes, table, w->gain, j->bias, &j->y, j->device->stream), err);
    return RBE_OK;
}

static rbe_status tiles(const job *j, rbe_error *err) {
    const rbe_weight *w = j->w->w;
    const int64_t vectors = (int64_t)w->layout.stages * RBE_BASIS_VECTORS;
    const int32_t depth = (int32_t)rbe_cuda_up(w->layout.group, 16);
    uint16_t *basis;
    uint32_t *mixed;
    RBE_TRY(rbe_cuda_take(j->device, vectors * depth, sizeof *basis, &basis, err));
    RBE_TRY(rbe_cuda_take(j->device, j->w->count * j->w->pitch, sizeof *mixed, &mixed, err));
    RBE_LAUNCH(rbe_cu_narrow_basis(w->basis, vectors, w->layout.group, depth, j->x.dtype, basis, j->device->stream), err);
    RBE_LAUNCH(rbe_cu_unpack(&j->w->codes, j->w->pitch, NULL, NULL, mixed, j->device->stream), err);
    RBE_LAUNCH(rbe_cu_tiles_half(&j->x, basis, depth, w->layout.group, w->layout.stages, mixed, j->w->pitch, w->rows, w->gain, j->bias,
                                 &j->y, j->device->stream),
               err);
    return RBE_OK;
}

static rbe_status gather(const job *j, rbe_error *err) {
    const rbe_weight *w = j->w->w;
    const int64_t each = j->w->count * RBE_BASIS_VECTORS * (int64_t)sizeof(float), most = rbe_cuda_workspace() / each / 32 * 32;
    const int64_t piece = rbe_cuda_smaller(rbe_cuda_up(j->x.rows, 4), most > 32 ? most : 32);
    uint8_t *idx;
    float *scale, *table;
    RBE_TRY(rbe_cuda_take(j->device, j->w->count * j->w->pitch, sizeof *idx, &idx, err));
    RBE_TRY(rbe_cuda_take(j->device, j->w->count * j->w->pitch, sizeof *scale, &scale, err));
    RBE_TRY(rbe_cuda_take(j->device, j->w->count * RBE_BASIS_VECTORS * piece, sizeof *table, &table, err));
    RBE_LAUNCH(rbe_cu_unpack(&j->w->codes, j->w->pitch, idx, scale, NULL, j->device->stream), err);
    for (int64_t t = 0; t < j->x.rows; t += piece) {
        rbe_cu_matrix x = j->x, y = j->y;
        x.rows = y.rows = rbe_cuda_smaller(piece, j->x.rows - t);
        x.data = (float *)x.data + t * x.stride;
        y.data = (float *)y.data + t * y.stride;
        const rbe_cuda_table made = {&w->layout, w->cols, x.rows, piece, RBE_F32, w->basis, j->tf32};
        RBE_TRY(rbe_cuda_make_table(&made, &x, table, j->device, err));
        RBE_LAUNCH(rbe_cu_gather_f32(table, piece, idx, scale, j->w->pitch, w->rows, j->w->count, w->gain, j->bias, &y, j->device->stream),
                   err);
    }
    return RBE_OK;
}

static rbe_status decode_mma(const job *j, rbe_error *err) {
    const rbe_weight *w = j->w->w;
    const int64_t splits = rbe_cu_decode_mma_splits(&j->w->codes, j->x.rows);
    float *partial = NULL;
    if (splits > 1) RBE_TRY(rbe_cuda_take(j->device, splits * j->x.rows * w->rows, sizeof *partial, &partial, err));
    RBE_LAUNCH(
        rbe_cu_decode_mma(&j->w->codes, &j->x, w->basis, w->gain, j->bias, &j->w->residual, &j->y, splits, partial, j->device->stream),
        err);
    if (splits > 1) RBE_LAUNCH(rbe_cu_finish_product(partial, RBE_F32, splits, NULL, j->bias, &j->y, j->device->stream), err);
    return RBE_OK;
}

static rbe_status fragments(const job *j, rbe_error *err) {
    enum { VECTOR = 16 };
    const rbe_weight *w = j->w->w;
    const int64_t splits = rbe_cu_fragments_splits(&j->w->codes, j->x.rows);
    const int64_t bytes = rbe_cu_fragments_padded(&j->w->codes);
    void *arranged;
    uint8_t *padded = NULL;
    float *partial = NULL;
    RBE_TRY(rbe_cuda_take(j->device, rbe_cu_fragments_arranged(&j->w->codes, j->x.rows), VECTOR, &arranged, err));
    if (bytes) RBE_TRY(rbe_cuda_take(j->device, bytes, 1, &padded, err));
    if (splits > 1) RBE_TRY(rbe_cuda_take(j->device, splits * j->x.rows * w->rows, sizeof *partial, &partial, err));
    RBE_LAUNCH(rbe_cu_fragments(&j->w->codes, &j->x, w->basis, w->gain, j->bias, &j->y, arranged, padded, splits, partial, j->device->stream), err);
    if (splits > 1) RBE_LAUNCH(rbe_cu_finish_product(partial, RBE_F32, splits, w->gain, j->bias, &j->y, j->device->stream), err);
    return RBE_OK;
}

static rbe_status run_codes(const job *j, rbe_error *err) {
    switch (rbe_cuda_plan(&j->w->w->layout, j->x.dtype, j->w->codes.rows, j->w->codes.cols, j->x.rows)) {
        case RBE_CUDA_LOOKUP: return lookup(j, err);
        case RBE_CUDA_TOKEN: return token(j, err);
        case RBE_CUDA_TILES: return tiles(j, err);
        case RBE_CUDA_GATHER: return gather(j, err);
        case RBE_CUDA_FRAGMENTS: return fragments(j, err);
        case RBE_CUDA_DECODE_MMA: return decode_mma(j, err);
        default: return decode_gemm(j, err);
    }
}

// The residual, where it is multiplied apart, belongs to `whole`.
static rbe_status run(const job *j, const rbe_weight *whole, rbe_error *err) {
    RBE_TRY(run_codes(j, err));
    return whole ? rbe_cuda_add_residual(whole, &j->x, &j->y, j->tf32, j->device, err) : RBE_OK;
}

rbe_status rbe_cuda_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y, rbe_accuracy accuracy,
                           const rbe_device *device, rbe_error *err) {
    RBE_TRY(rbe_cuda_check(w, err));
    RBE_TRY(rbe_check_matrix(w, "x", x, -1, w->cols, err));
    RBE_TRY(rbe_check_matrix(w, "y", y, x->rows, w->rows, err));
    if (x->dtype != y->dtype) return rbe_fail(err, RBE_BAD_ARGUMENT, "y: must have the dtype of x");
    if ((y->col_stride != 1 && y->cols > 1) || (y->row_stride != y->cols && y->rows > 1))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "y: must be contiguous");
    if ((unsigned)accuracy > RBE_ACCURACY_FAST)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "accuracy: %d is not auto, exact or fast", (int)accuracy);
    if (x->rows == 0) return RBE_OK;
    rbe_cuda_weight bound;
    const bool half = rbe_cuda_half(x->dtype), widened = half && accuracy == RBE_ACCURACY_EXACT;
    const bool apart = rbe_cuda_residual_apart(w, widened ? RBE_F32 : x->dtype, x->rows, accuracy);
    const rbe_weight codes = apart ? rbe_cuda_without_residual(w) : *w, *whole = apart ? w : NULL;
    RBE_TRY(rbe_cuda_bind(&codes, device, &bound, err));
    const rbe_cu_matrix result = {y->data, y->dtype, y->rows, y->cols, y->row_stride};
    job j = {.w = &bound, .y = result, .bias = bias, .tf32 = accuracy == RBE_ACCURACY_FAST, .device = device};
    RBE_TRY(rbe_cuda_dense(x, widened ? RBE_F32 : x->dtype, device, &j.x, err));
    if (!widened) return run(&j, whole, err);
    j.y = (rbe_cu_matrix){NULL, RBE_F32, y->rows, y->cols, y->cols};
    RBE_TRY(rbe_cuda_take(device, y->rows * y->cols, sizeof(float), &j.y.data, err));
    RBE_TRY(run(&j, whole, err));
    RBE_LAUNCH(rbe_cu_finish_product(j.y.data, RBE_F32, 1, NULL, NULL, &result, device->stream), err);
    return RBE_OK;
}
