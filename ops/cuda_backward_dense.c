// Backward through W, for layouts with signs or a residual and where a table costs more: a run of rows of W is decoded, dx += dy W and
// dW = dy^T x come from cuBLASLt, and D and dbasis from dW. dW is never larger than a workspace.
#include "cuda_backward.h"

typedef struct pass {
    const rbe_cuda_backward *b;
    rbe_cu_matrix x, dy, dx;  // dx as it is added up: of type real where rows come in several runs
    rbe_cu_matrix dense;
    void *dw, *partial;  // partial: sums of dbasis, splits of them
    int32_t *order, *start;
    int64_t splits;
} pass;

static rbe_status prepare(const rbe_cuda_backward *b, int64_t *piece, pass *p, rbe_error *err) {
    const rbe_weight *w = b->w->w;
    const rbe_device *device = b->device;
    const int64_t n = w->cols, vectors = (int64_t)w->layout.stages * RBE_BASIS_VECTORS;
    const size_t real = rbe_cuda_bytes(w->real);
    *piece = rbe_cuda_smaller(w->rows, rbe_cuda_workspace() / (int64_t)real / n + 1);
    *p = (pass){.b = b, .splits = rbe_cu_dense_basis_splits(&b->w->codes)};
    RBE_TRY(rbe_cuda_dense(b->x, b->x->dtype, device, &p->x, err));
    RBE_TRY(rbe_cuda_dense(b->dy, b->dy->dtype, device, &p->dy, err));
    if (b->out->dx) {
        p->dx = (rbe_cu_matrix){b->out->dx->data, b->x->dtype, b->x->rows, n, n};
        p->dense = (rbe_cu_matrix){NULL, b->x->dtype, *piece, n, n};
        RBE_TRY(rbe_cuda_take(device, *piece * n, rbe_cuda_bytes(b->x->dtype), &p->dense.data, err));
        if (rbe_cuda_half(b->x->dtype) && *piece < w->rows) {
            p->dx.dtype = RBE_F32;
            RBE_TRY(rbe_cuda_take(device, b->x->rows * n, sizeof(float), &p->dx.data, err));
        }
    }
    if (b->d || b->out->basis) RBE_TRY(rbe_cuda_take(device, *piece * n, real, &p->dw, err));
    if (b->out->basis) {
        RBE_TRY(rbe_cuda_take(device, p->splits * vectors * w->layout.group, real, &p->partial, err));
        RBE_TRY(rbe_cuda_take(device, b->w->count * *piece, sizeof *p->order, &p->order, err));
        RBE_TRY(rbe_cuda_take(device, b->w->count * (RBE_BASIS_VECTORS + 1), sizeof *p->start, &p->start, err));
    }
    return RBE_OK;
}

static rbe_status run(pass *p, int64_t i, int64_t rows, rbe_error *err) {
    const rbe_cuda_backward *b = p->b;
    const rbe_weight *w = b->w->w;
    const rbe_cuda_weight some = rbe_cuda_rows(b->w, i, rows);
    const size_t real = rbe_cuda_bytes(w->real), type = rbe_cuda_bytes(b->x->dtype);
    const char *gain = (const char *)w->gain + (size_t)i * real, *dy = (const char *)p->dy.data + (size_t)i * type;
    const char *scale = (const char *)b->scale + (size_t)i * real;
    void *stream = b->device->stream;
    if (b->out->dx) {
        p->dense.rows = rows;
        RBE_LAUNCH(rbe_cu_decode(&some.codes, w->basis, gain, &some.residual, &p->dense, stream), err);
        const rbe_gemm dx = {
            .m = p->x.rows, .n = w->cols, .k = rows, .batch = 1, .a = {dy, p->dy.stride, 0, false}, .b = {p->dense.data, w->cols, 0, false},
            .c = p->dx.data, .c_stride = w->cols, .in = b->x->dtype, .out = p->dx.dtype, .accumulate = i > 0,
        };
        RBE_TRY(rbe_cuda_gemm(&dx, b->device, err));
    }
    if (!p->dw) return RBE_OK;
    const rbe_gemm dw = {
        .m = rows, .n = w->cols, .k = p->x.rows, .batch = 1, .a = {dy, p->dy.stride, 0, true}, .b = {p->x.data, p->x.stride, 0, false},
        .c = p->dw, .c_stride = w->cols, .in = b->x->dtype, .out = w->real,
    };
    RBE_TRY(rbe_cuda_gemm(&dw, b->device, err));
    if (b->d) RBE_LAUNCH(rbe_cu_dense_d(&some.codes, p->dw, w->basis, (char *)b->d + (size_t)i * real, b->w->pitch, stream), err);
    if (!p->partial) return RBE_OK;
    RBE_LAUNCH(rbe_cu_sort(b->idx + i, b->w->pitch, rows, b->w->count, p->order, p->start, stream), err);
    RBE_LAUNCH(rbe_cu_dense_basis(&some.codes, p->dw, p->order, p->start, scale, b->w->pitch, gain, i > 0, p->splits, p->partial, stream),
               err);
    return RBE_OK;
}

rbe_status rbe_cuda_backward_dense(const rbe_cuda_backward *b, rbe_error *err) {
    const rbe_weight *w = b->w->w;
    int64_t piece;
    pass p;
    RBE_TRY(prepare(b, &piece, &p, err));
    for (int64_t i = 0; i < w->rows; i += piece) RBE_TRY(run(&p, i, rbe_cuda_smaller(piece, w->rows - i), err));
    if (p.partial)
        RBE_LAUNCH(rbe_cu_sum_splits(p.partial, w->real, p.splits, (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group,
                                     b->out->basis, b->device->stream),
                   err);
    if (b->out->dx && p.dx.dtype != b->x->dtype) {
        const rbe_cu_matrix wanted = {b->out->dx->data, b->x->dtype, b->x->rows, w->cols, w->cols};
        RBE_LAUNCH(rbe_cu_finish_product(p.dx.data, RBE_F32, 1, NULL, NULL, &wanted, b->device->stream), err);
    }
    return RBE_OK;
}
