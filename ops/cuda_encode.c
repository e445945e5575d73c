// rbe_cuda_encode: the words that rbe_encode gives, searched on the device. Values are checked first, which waits for the device once.
#include "cuda_encode.h"

rbe_cu_target rbe_cuda_target(const rbe_weight *w, const rbe_matrix *dense) {
    return (rbe_cu_target){dense->data, dense->dtype, dense->row_stride, dense->col_stride, w->gain, w->real};
}

rbe_status rbe_cuda_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const rbe_device *device, unsigned long long **places,
                                   rbe_error *err) {
    const int64_t basis = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    void *stream = device->stream;
    RBE_TRY(rbe_cuda_take(device, RBE_PLACES, sizeof **places, places, err));
    RBE_LAUNCH(rbe_cu_no_places(*places, RBE_PLACES, stream), err);
    RBE_LAUNCH(rbe_cu_check_values(dense->data, dense->dtype, w->rows, w->cols, dense->row_stride, dense->col_stride, RBE_CU_FINITE,
                                   *places + RBE_PLACE_WEIGHT, stream),
               err);
    RBE_LAUNCH(rbe_cu_check_values(w->basis, w->real, 1, basis, 0, 1, RBE_CU_FINITE, *places + RBE_PLACE_BASIS, stream), err);
    RBE_LAUNCH(rbe_cu_check_values(w->gain, w->real, 1, w->rows, 0, 1, RBE_CU_FINITE, *places + RBE_PLACE_GAIN, stream), err);
    return RBE_OK;
}

static rbe_status sentence(const rbe_weight *w, rbe_cuda_place place, long long at, rbe_error *err) {
    const long long n = (long long)w->cols;
    switch (place) {
        case RBE_PLACE_WEIGHT:
            return rbe_fail(err, RBE_BAD_ARGUMENT, "weight: element [%lld, %lld] is not finite; must be", at / n, at % n);
        case RBE_PLACE_BASIS: return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: holds values that are not finite; must not");
        case RBE_PLACE_GAIN: return rbe_fail(err, RBE_BAD_ARGUMENT, "gain: row %lld is not finite; must be finite", at);
        case RBE_PLACE_GAIN_POSITIVE: return rbe_fail(err, RBE_BAD_ARGUMENT, "gain: row %lld is not positive; must be", at);
        case RBE_PLACE_HESSIAN:
        case RBE_PLACE_FACTOR:
            return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian or factor: element [%lld, %lld] is not finite; must be", at / n, at % n);
        case RBE_PLACE_INDEFINITE: return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian: is not positive definite; must be (damp it)");
        default: return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian or factor: diagonal element %lld is not positive; must be", at);
    }
}

rbe_status rbe_cuda_refuse(const rbe_weight *w, const unsigned long long *places, const rbe_device *device, rbe_error *err) {
    if (rbe_cu_capturing(device->stream)) return RBE_OK;
    unsigned long long found[RBE_PLACES];
    RBE_LAUNCH(rbe_cu_to_host(found, places, sizeof found, device->stream), err);
    for (int i = 0; i < RBE_PLACES; i++)
        if (found[i] != ~0ull) return sentence(w, (rbe_cuda_place)i, (long long)found[i], err);
    return RBE_OK;
}

rbe_status rbe_cuda_take_search(const rbe_cuda_weight *w, int64_t tables, const rbe_device *device, rbe_cu_search *out, rbe_error *err) {
    const rbe_layout *l = &w->w->layout;
    const int64_t vectors = (int64_t)l->stages * RBE_BASIS_VECTORS;
    float *value = NULL, *narrow = NULL;
    uint32_t *word = NULL;
    double *unit, *square, *wide = NULL;
    const int32_t count = rbe_cu_scale_count(l->field);
    if (count) {
        RBE_TRY(rbe_cuda_take(device, count, sizeof *value, &value, err));
        RBE_TRY(rbe_cuda_take(device, count, sizeof *word, &word, err));
        RBE_LAUNCH(rbe_cu_list_scales(l->field, value, word, device->stream), err);
    }
    RBE_TRY(rbe_cuda_take(device, tables, sizeof *unit, &unit, err));
    RBE_TRY(rbe_cuda_take(device, 2 * tables * vectors, sizeof *square, &square, err));
    if (l->stages == 1) RBE_TRY(rbe_cuda_take(device, tables * vectors * l->group, sizeof *wide, &wide, err));
    else RBE_TRY(rbe_cuda_take(device, tables * vectors * l->group, sizeof *narrow, &narrow, err));
    *out = (rbe_cu_search){.codes = w->codes,
                           .scales = {value, word, count},
                           .tables = tables,
                           .unit = unit,
                           .square = square,
                           .wide = wide,
                           .narrow = narrow};
    return RBE_OK;
}

rbe_status rbe_cuda_fill_search(rbe_cu_search *search, const void *vectors, rbe_dtype real, const rbe_device *device, rbe_error *err) {
    search->vectors = vectors;
    search->codes.real = real;
    RBE_LAUNCH(rbe_cu_fill_search(search, (double *)(uintptr_t)search->unit, (double *)(uintptr_t)search->square,
                                  (double *)(uintptr_t)search->wide, (float *)(uintptr_t)search->narrow, device->stream),
               err);
    return RBE_OK;
}

rbe_status rbe_cuda_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_device *device, rbe_error *err) {
    RBE_TRY(rbe_check_encoding_shape(w, dense, words, err));
    unsigned long long *places;
    RBE_TRY(rbe_cuda_check_encoding(w, dense, device, &places, err));
    RBE_TRY(rbe_cuda_refuse(w, places, device, err));
    rbe_cuda_weight bound;
    rbe_cu_search search;
    RBE_TRY(rbe_cuda_bind(w, device, &bound, err));
    RBE_TRY(rbe_cuda_take_search(&bound, 1, device, &search, err));
    RBE_TRY(rbe_cuda_fill_search(&search, w->basis, w->real, device, err));
    const size_t bytes = rbe_cu_encode_memory(&bound.codes, false);
    void *memory = NULL;
    if (bytes) RBE_TRY(rbe_cuda_take(device, (int64_t)bytes, 1, &memory, err));
    const rbe_cu_target target = rbe_cuda_target(w, dense);
    RBE_LAUNCH(rbe_cu_encode(&search, &target, words, memory, device->stream), err);
    return RBE_OK;
}
