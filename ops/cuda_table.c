// The dense products around a table, by cuBLASLt: the table itself, dx and dbasis from its gradient. A batch over the groups; a last group
// that is cut short is a product of its own.
#include "cuda_internal.h"

typedef struct run {
    int64_t first, groups, width;  // of groups, and how many columns each has
} run;

static int runs_of(const rbe_cuda_table *t, run out[2]) {
    const int64_t g = t->layout->group, whole = t->cols / g;
    int count = 0;
    if (whole) out[count++] = (run){0, whole, g};
    if (t->cols % g) out[count++] = (run){whole, 1, t->cols % g};
    return count;
}

static char *at(const void *data, int64_t element, rbe_dtype dtype) {
    return (char *)(uintptr_t)data + element * (int64_t)rbe_cuda_bytes(dtype);
}

rbe_status rbe_cuda_make_table(const rbe_cuda_table *t, const rbe_cu_matrix *x, void *table, const rbe_device *device, rbe_error *err) {
    const int64_t g = t->layout->group, vectors = (int64_t)t->layout->stages * RBE_BASIS_VECTORS, step = vectors * t->pitch_t;
    run runs[2];
    for (int r = 0, count = runs_of(t, runs); r < count; r++) {
        const rbe_gemm product = {
            .m = vectors, .n = t->tokens, .k = runs[r].width, .batch = runs[r].groups,
            .a = {t->basis, g, 0, false},
            .b = {at(x->data, runs[r].first * g, t->dtype), x->stride, g, true},
            .c = at(table, runs[r].first * step, t->dtype), .c_stride = t->pitch_t, .c_batch_stride = step,
            .in = t->dtype, .out = t->dtype, .tf32 = t->tf32,
        };
        RBE_TRY(rbe_cuda_gemm(&product, device, err));
    }
    return RBE_OK;
}

rbe_status rbe_cuda_table_dx(const rbe_cuda_table *t, const void *dtable, const rbe_cu_matrix *dx, const rbe_device *device,
                             rbe_error *err) {
    const int64_t g = t->layout->group, vectors = (int64_t)t->layout->stages * RBE_BASIS_VECTORS, step = vectors * t->pitch_t;
    run runs[2];
    for (int r = 0, count = runs_of(t, runs); r < count; r++) {
        const rbe_gemm product = {
            .m = t->tokens, .n = runs[r].width, .k = vectors, .batch = runs[r].groups,
            .a = {at(dtable, runs[r].first * step, t->dtype), t->pitch_t, step, true},
            .b = {t->basis, g, 0, false},
            .c = at(dx->data, runs[r].first * g, dx->dtype), .c_stride = dx->stride, .c_batch_stride = g,
            .in = t->dtype, .out = dx->dtype, .tf32 = t->tf32,
        };
        RBE_TRY(rbe_cuda_gemm(&product, device, err));
    }
    return RBE_OK;
}

rbe_status rbe_cuda_table_dbasis(const rbe_cuda_table *t, const void *dtable, const rbe_cu_matrix *x, bool accumulate, float *partial,
                                 const rbe_device *device, rbe_error *err) {
    const int64_t g = t->layout->group, vectors = (int64_t)t->layout->stages * RBE_BASIS_VECTORS, step = vectors * t->pitch_t;
    run runs[2];
    for (int r = 0, count = runs_of(t, runs); r < count; r++) {
        const rbe_gemm product = {
            .m = vectors, .n = runs[r].width, .k = t->tokens, .batch = runs[r].groups,
            .a = {at(dtable, runs[r].first * step, t->dtype), t->pitch_t, step, false},
            .b = {at(x->data, runs[r].first * g, t->dtype), x->stride, g, false},
            .c = partial + runs[r].first * vectors * g, .c_stride = g, .c_batch_stride = vectors * g,
            .in = t->dtype, .out = RBE_F32, .accumulate = accumulate, .tf32 = t->tf32,
        };
        RBE_TRY(rbe_cuda_gemm(&product, device, err));
    }
    return RBE_OK;
}
