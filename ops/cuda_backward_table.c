// Backward by table: rows sorted by code; for a run of tokens the table by cuBLASLt, then d and the table's gradient in one pass over the
// codes, then dx and dbasis by cuBLASLt. bfloat16 keeps its tables in bfloat16; float16, whose range is narrow, in float32 with TF32
// products.
#include "cuda_backward.h"

typedef struct pass {
    const rbe_cuda_backward *b;
    rbe_cuda_table table;
    rbe_cu_matrix x, dy, dx;  // of the table's type; dx as it is wanted, or NULL data
    int32_t *order, *start;
    void *made, *gradient, *turned;  // table, its gradient, dy [m, pitch_t]
    float *dbasis;                   // [K, M, 256, g], added up at the end
    float *d;
} pass;

static rbe_status prepare(const rbe_cuda_backward *b, int64_t *piece, pass *p, rbe_error *err) {
    const rbe_weight *w = b->w->w;
    const rbe_device *device = b->device;
    const int64_t count = b->w->count, vectors = (int64_t)w->layout.stages * RBE_BASIS_VECTORS, g = w->layout.group;
    const rbe_dtype type = b->x->dtype == RBE_BF16 ? RBE_BF16 : RBE_F32;
    const int64_t size = (int64_t)rbe_cuda_bytes(type), each = (2 * count * RBE_BASIS_VECTORS + w->rows) * size;
    const int64_t most = 2 * rbe_cuda_workspace() / each / 64 * 64;
    *piece = rbe_cuda_smaller(rbe_cuda_up(b->x->rows, 8), most > 64 ? most : 64);
    *p = (pass){
        .b = b,
        .d = b->d,
        .table = {
            .layout = &w->layout, .cols = w->cols, .pitch_t = *piece, .dtype = type, .basis = w->basis, .tf32 = b->x->dtype == RBE_F16}};
    RBE_TRY(rbe_cuda_dense(b->x, type, device, &p->x, err));
    RBE_TRY(rbe_cuda_dense(b->dy, type, device, &p->dy, err));
    RBE_TRY(rbe_cuda_take(device, count * w->rows, sizeof *p->order, &p->order, err));
    RBE_TRY(rbe_cuda_take(device, count * (RBE_BASIS_VECTORS + 1), sizeof *p->start, &p->start, err));
    RBE_TRY(rbe_cuda_take(device, count * RBE_BASIS_VECTORS * *piece, (size_t)size, &p->made, err));
    RBE_TRY(rbe_cuda_take(device, count * RBE_BASIS_VECTORS * *piece, (size_t)size, &p->gradient, err));
    RBE_TRY(rbe_cuda_take(device, w->rows * *piece, (size_t)size, &p->turned, err));
    if (!p->d) RBE_TRY(rbe_cuda_take(device, count * b->w->pitch, sizeof(float), &p->d, err));
    if (type == RBE_BF16) {
        uint16_t *narrow;
        RBE_TRY(rbe_cuda_take(device, vectors * g, sizeof *narrow, &narrow, err));
        RBE_LAUNCH(rbe_cu_narrow_basis(w->basis, vectors, (int32_t)g, (int32_t)g, type, narrow, device->stream), err);
        p->table.basis = narrow;
    }
    if (b->out->basis) {
        RBE_TRY(rbe_cuda_take(device, w->groups * vectors * g, sizeof(float), &p->dbasis, err));
        // a last group that is cut short leaves columns unwritten
        RBE_LAUNCH(rbe_cu_zero(p->dbasis + (w->groups - 1) * vectors * g, (size_t)(vectors * g) * sizeof(float), device->stream), err);
    }
    if (b->out->dx) {
        p->dx = (rbe_cu_matrix){b->out->dx->data, b->x->dtype, b->x->rows, w->cols, w->cols};
        if (b->x->dtype == RBE_F16) {
            p->dx.dtype = RBE_F32;
            RBE_TRY(rbe_cuda_take(device, b->x->rows * w->cols, sizeof(float), &p->dx.data, err));
        }
    }
    return RBE_OK;
}

static rbe_cu_matrix tokens_of(const rbe_cu_matrix *a, int64_t t, int64_t tokens) {
    return (rbe_cu_matrix){(char *)a->data + (size_t)(t * a->stride) * rbe_cuda_bytes(a->dtype), a->dtype, tokens, a->cols, a->stride};
}

static rbe_status run(pass *p, int64_t t, int64_t tokens, rbe_error *err) {
    const rbe_cuda_backward *b = p->b;
    const rbe_weight *w = b->w->w;
    const rbe_cu_matrix x = tokens_of(&p->x, t, tokens), dy = tokens_of(&p->dy, t, tokens);
    const rbe_cu_matrix turned = {p->turned, p->table.dtype, w->rows, tokens, p->table.pitch_t};
    p->table.tokens = tokens;
    RBE_TRY(rbe_cuda_make_table(&p->table, &x, p->made, b->device, err));
    RBE_LAUNCH(rbe_cu_transpose(&dy, &turned, b->device->stream), err);
    RBE_LAUNCH(rbe_cu_backward_table(p->order, p->start, b->scale, b->w->pitch, w->gain, w->rows, b->w->count, p->table.dtype, p->turned,
                                     p->made, p->gradient, tokens, p->table.pitch_t, t > 0, p->d, b->device->stream),
               err);
    if (b->out->dx) {
        const rbe_cu_matrix dx = tokens_of(&p->dx, t, tokens);
        RBE_TRY(rbe_cuda_table_dx(&p->table, p->gradient, &dx, b->device, err));
    }
    return p->dbasis ? rbe_cuda_table_dbasis(&p->table, p->gradient, &x, t > 0, p->dbasis, b->device, err) : RBE_OK;
}

rbe_status rbe_cuda_backward_by_table(const rbe_cuda_backward *b, rbe_error *err) {
    const rbe_weight *w = b->w->w;
    const int64_t vectors = (int64_t)w->layout.stages * RBE_BASIS_VECTORS;
    int64_t piece;
    pass p;
    RBE_TRY(prepare(b, &piece, &p, err));
    RBE_LAUNCH(rbe_cu_sort(b->idx, b->w->pitch, w->rows, b->w->count, p.order, p.start, b->device->stream), err);
    for (int64_t t = 0; t < b->x->rows; t += piece) RBE_TRY(run(&p, t, rbe_cuda_smaller(piece, b->x->rows - t), err));
    if (p.dbasis)
        RBE_LAUNCH(rbe_cu_sum_splits(p.dbasis, RBE_F32, w->groups, vectors * w->layout.group, b->out->basis, b->device->stream), err);
    if (b->out->dx && p.dx.dtype != b->x->dtype) {
        const rbe_cu_matrix wanted = {b->out->dx->data, b->x->dtype, b->x->rows, w->cols, w->cols};
        RBE_LAUNCH(rbe_cu_finish_product(p.dx.data, RBE_F32, 1, NULL, NULL, &wanted, b->device->stream), err);
    }
    return RBE_OK;
}
