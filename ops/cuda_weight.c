// A weight on the device: checks of shapes, views of its codes, and dense copies of activations.
#include <string.h>

#include "cuda_internal.h"
#include "product.h"

rbe_status rbe_cuda_status(int error, rbe_error *err) {
    if (!error) return RBE_OK;
    return rbe_fail(err, RBE_DEVICE_FAILED, "CUDA: a kernel was not launched: %s (error %d)", rbe_cu_error_text(error), error);
}

rbe_status rbe_cuda_take(const rbe_device *device, int64_t count, size_t size, void *out, rbe_error *err) {
    void *memory = device->allocate(device->owner, (size_t)(count > 0 ? count : 1) * size);
    memcpy(out, &memory, sizeof memory);
    if (memory) return RBE_OK;
    return rbe_fail(err, RBE_OUT_OF_MEMORY, "workspace: the device has no %lld bytes", (long long)((uint64_t)count * size));
}

rbe_status rbe_cuda_check(const rbe_weight *w, rbe_error *err) {
    if (!w) return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: is NULL");
    RBE_TRY(rbe_check_shape(w, err));
    const int given = !!w->words + !!w->packed + !!w->interleaved;
    if (given != 1)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: exactly one of words, packed and interleaved must be given, not %d", given);
    if (w->interleaved && w->layout.field != RBE_FIELD_RBE8)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: are interleaved, but only codes of one byte (rbe8) can be, not of %d bits",
                        (int)w->layout.bits);
    if (w->packed && w->rows > 1 && w->packed_stride < rbe_packed_row_bytes(&w->layout, w->groups))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: packed rows are %lld bytes apart, but a row takes %lld", (long long)w->packed_stride,
                        (long long)rbe_packed_row_bytes(&w->layout, w->groups));
    if (w->real != RBE_F32 && w->real != RBE_F64) return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: must be float32 or float64");
    if (!w->basis || !w->gain) return rbe_fail(err, RBE_BAD_ARGUMENT, "%s: is missing", w->basis ? "gain" : "basis");
    if (w->layout.field == RBE_FIELD_RBE16S && w->layout.group != 8)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: rbe16s has eight signs, so its group must be 8, not %d", (int)w->layout.group);
    if (w->amplitude && !rbe_field_has_scale(w->layout.field))
        return rbe_fail(err, RBE_BAD_ARGUMENT, "amplitude: is given, but codes of %d bits have scale 1 and no amplitude",
                        (int)w->layout.bits);
    if (w->amplitude && !w->rounded && w->real != RBE_F64)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "rounded: is false, but only float64 computes with unrounded amplitudes");
    return RBE_OK;
}

static int64_t sparse_count(const rbe_weight *w) {
    const double count = w->layout.fraction * (double)w->cols, whole = (double)(int64_t)count, rest = count - whole;
    const int64_t rounded = (int64_t)count + (rest > 0.5 || (rest == 0.5 && (int64_t)count % 2));  // halves to even
    return rounded < 1 ? 1 : rounded;
}

rbe_status rbe_cuda_bind(const rbe_weight *w, const rbe_device *device, rbe_cuda_weight *out, rbe_error *err) {
    const rbe_layout *l = &w->layout;
    const int64_t count = w->groups * l->stages;
    *out = (rbe_cuda_weight){
        .w = w,
        .codes = {.words = w->words,
                  .packed = w->packed,
                  .packed_stride = w->packed_stride,
                  .amplitude = w->amplitude,
                  .rows = w->rows,
                  .cols = w->cols,
                  .groups = w->groups,
                  .stages = l->stages,
                  .group = l->group,
                  .bits = l->bits,
                  .field = l->field,
                  .seeded = rbe_field_seeded(l->field),
                  .scaled = rbe_field_has_scale(l->field),
                  .unstored = rbe_field_amp_unstored(l->field),
                  .constant = rbe_field_constant(l->field),
                  .seed = w->seed,
                  .first = (uint32_t)(((uint64_t)w->row0 * (uint64_t)w->groups_total + (uint64_t)w->k0) * (uint64_t)l->stages),
                  .row_step = (uint32_t)((uint64_t)w->groups_total * (uint64_t)l->stages),
                  .real = w->real,
                  .rounded = w->rounded},
        .residual = {.kind = l->residual, .at = w->residual, .count = l->residual == RBE_RESIDUAL_SPARSE ? sparse_count(w) : l->rank},
        .count = count,
        .pitch = rbe_cuda_up(w->rows, RBE_CU_ROWS),
    };
    if (!w->interleaved) return RBE_OK;
    uint8_t *packed;
    RBE_TRY(rbe_cuda_take(device, w->rows * count, 1, &packed, err));
    out->codes.packed = packed;
    out->codes.packed_stride = count;
    return rbe_cuda_deinterleave(w->interleaved, w->rows, count, packed, device, err);
}

rbe_cuda_weight rbe_cuda_rows(const rbe_cuda_weight *w, int64_t row0, int64_t rows) {
    rbe_cuda_weight some = *w;
    rbe_cu_codes *c = &some.codes;
    rbe_cu_residual *r = &some.residual;
    const int64_t values = r->kind == RBE_RESIDUAL_LOWRANK || r->kind == RBE_RESIDUAL_SPARSE ? r->count : c->cols;
    c->rows = rows;
    if (c->words) c->words += row0 * w->count;
    if (c->packed) c->packed += row0 * c->packed_stride;
    if (c->amplitude) c->amplitude = (const char *)c->amplitude + (size_t)(row0 * w->count) * rbe_cuda_bytes(c->real);
    c->first += (uint32_t)row0 * c->row_step;
    if (r->at.values) r->at.values = (const char *)r->at.values + (size_t)(row0 * values) * (r->kind == RBE_RESIDUAL_SPARSE ? 2 : 1);
    if (r->at.scale && r->kind != RBE_RESIDUAL_LOWRANK) r->at.scale += row0;
    if (r->at.right && r->kind == RBE_RESIDUAL_SPARSE) r->at.right = (const int32_t *)r->at.right + row0 * values;
    return some;
}

rbe_status rbe_cuda_dense(const rbe_matrix *x, rbe_dtype dtype, const rbe_device *device, rbe_cu_matrix *out, rbe_error *err) {
    *out = (rbe_cu_matrix){x->data, dtype, x->rows, x->cols, x->row_stride};
    if (x->dtype == dtype && (x->col_stride == 1 || x->cols <= 1) && x->row_stride >= x->cols) return RBE_OK;
    RBE_TRY(rbe_cuda_take(device, x->rows * x->cols, rbe_cuda_bytes(dtype), &out->data, err));
    out->stride = x->cols;
    const rbe_cu_strided from = {
        x->data, (int32_t)rbe_cuda_bytes(x->dtype), x->dtype, 2, {x->rows, x->cols}, {x->row_stride, x->col_stride}};
    RBE_LAUNCH(rbe_cu_copy(&from, true, out->data, dtype, device->stream), err);
    return RBE_OK;
}
