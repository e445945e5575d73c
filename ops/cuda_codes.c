// rbe_cuda_decode and its gradients, pack, unpack, interleave and deinterleave. pack and unpack check the codes, and so wait for the
// device, but not while a graph is captured.
#include "cuda_internal.h"

rbe_status rbe_cuda_decode(const rbe_weight *w, void *dense, const rbe_device *device, rbe_error *err) {
    RBE_TRY(rbe_cuda_check(w, err));
    if (!dense) return rbe_fail(err, RBE_BAD_ARGUMENT, "dense: has no data");
    rbe_cuda_weight bound;
    RBE_TRY(rbe_cuda_bind(w, device, &bound, err));
    const rbe_cu_matrix out = {dense, w->real, w->rows, w->cols, w->cols};
    RBE_LAUNCH(rbe_cu_decode(&bound.codes, w->basis, w->gain, &bound.residual, &out, device->stream), err);
    return RBE_OK;
}

// The gradient of W is all that rbe_cuda_backward_dense makes of x and dy: its second half, for all rows at once.
rbe_status rbe_cuda_decode_backward(const rbe_weight *w, const float *dense, float *dbasis, float *dgain, const rbe_device *device,
                                    rbe_error *err) {
    RBE_TRY(rbe_cuda_check(w, err));
    if (w->real != RBE_F32) return rbe_fail(err, RBE_BAD_ARGUMENT, "basis: must be float32");
    rbe_cuda_weight bound;
    RBE_TRY(rbe_cuda_bind(w, device, &bound, err));
    const int64_t count = bound.count, pitch = bound.pitch, splits = rbe_cu_dense_basis_splits(&bound.codes);
    const int64_t basis = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    uint8_t *idx;
    int32_t *order, *start;
    float *scale, *d, *partial;
    void *stream = device->stream;
    RBE_TRY(rbe_cuda_take(device, count * pitch, sizeof *idx, &idx, err));
    RBE_TRY(rbe_cuda_take(device, count * pitch, sizeof *scale, &scale, err));
    RBE_TRY(rbe_cuda_take(device, count * pitch, sizeof *d, &d, err));
    RBE_TRY(rbe_cuda_take(device, count * w->rows, sizeof *order, &order, err));
    RBE_TRY(rbe_cuda_take(device, count * (RBE_BASIS_VECTORS + 1), sizeof *start, &start, err));
    RBE_TRY(rbe_cuda_take(device, splits * basis, sizeof *partial, &partial, err));
    RBE_LAUNCH(rbe_cu_unpack(&bound.codes, pitch, idx, scale, NULL, stream), err);
    RBE_LAUNCH(rbe_cu_dense_d(&bound.codes, dense, w->basis, d, pitch, stream), err);
    RBE_LAUNCH(rbe_cu_finish_codes(&bound.codes, d, scale, pitch, w->gain, dgain, NULL, NULL, stream), err);
    RBE_LAUNCH(rbe_cu_sort(idx, pitch, w->rows, count, order, start, stream), err);
    RBE_LAUNCH(rbe_cu_dense_basis(&bound.codes, dense, order, start, scale, pitch, w->gain, false, splits, partial, stream), err);
    RBE_LAUNCH(rbe_cu_sum_splits(partial, RBE_F32, splits, basis, dbasis, stream), err);
    return RBE_OK;
}

static rbe_status check_values(const rbe_weight *w, const rbe_cu_codes *codes, const rbe_device *device, rbe_error *err) {
    unsigned long long *scratch, bad;
    if (rbe_cu_capturing(device->stream)) return RBE_OK;
    RBE_TRY(rbe_cuda_take(device, 1, sizeof *scratch, &scratch, err));
    RBE_LAUNCH(rbe_cu_check_codes(codes, scratch, &bad, device->stream), err);
    if (bad == ~0ull) return RBE_OK;
    const long long count = (long long)(w->groups * w->layout.stages), row = (long long)bad / count, q = (long long)bad % count;
    if (codes->packed)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: the last byte of packed row %lld has padding bits that are set; they must be zero",
                        row);
    return rbe_fail(err, RBE_BAD_ARGUMENT,
                    "codes: the word at row %lld, group %lld, stage %lld has bits that its layout of %d bits does not store%s", row,
                    q / w->layout.stages, q % w->layout.stages, (int)w->layout.bits,
                    rbe_field_seeded(w->layout.field) ? ", or an idx that the seed does not give" : "");
}

static rbe_status bind_checked(const rbe_weight *w, const rbe_device *device, rbe_cuda_weight *out, rbe_error *err) {
    static const float none = 0.0f;  // pack and unpack read neither basis nor gain
    rbe_weight whole = *w;
    whole.basis = whole.gain = &none;
    whole.real = RBE_F32;
    RBE_TRY(rbe_cuda_check(&whole, err));
    RBE_TRY(rbe_cuda_bind(w, device, out, err));
    return check_values(w, &out->codes, device, err);
}

rbe_status rbe_cuda_check_words(const rbe_weight *w, const rbe_device *device, rbe_error *err) {
    rbe_cuda_weight bound;
    return bind_checked(w, device, &bound, err);
}

rbe_status rbe_cuda_pack(const rbe_weight *w, uint8_t *packed, const rbe_device *device, rbe_error *err) {
    rbe_cuda_weight bound;
    RBE_TRY(bind_checked(w, device, &bound, err));
    if (!w->words || !packed)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s", w->words ? "packed: is NULL" : "codes: pack takes words, not bytes");
    RBE_LAUNCH(rbe_cu_pack(&bound.codes, packed, rbe_packed_row_bytes(&w->layout, w->groups), device->stream), err);
    return RBE_OK;
}

rbe_status rbe_cuda_unpack(const rbe_weight *w, int32_t *words, const rbe_device *device, rbe_error *err) {
    rbe_cuda_weight bound;
    RBE_TRY(bind_checked(w, device, &bound, err));
    if (!w->packed || !words)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "%s", w->packed ? "words: is NULL" : "codes: unpack takes packed bytes, not words");
    RBE_LAUNCH(rbe_cu_unpack_words(&bound.codes, words, device->stream), err);
    return RBE_OK;
}

// bytes [a, b, c] -> [a, c, b]
static rbe_status turn(const uint8_t *from, int64_t a, int64_t b, int64_t c, uint8_t *to, const rbe_device *device, rbe_error *err) {
    const rbe_cu_strided view = {from, 1, RBE_F32, 3, {a, c, b}, {b * c, 1, c}};
    RBE_LAUNCH(rbe_cu_copy(&view, false, to, RBE_F32, device->stream), err);
    return RBE_OK;
}

rbe_status rbe_cuda_deinterleave(const uint8_t *interleaved, int64_t rows, int64_t count, uint8_t *packed, const rbe_device *device,
                                 rbe_error *err) {
    const int64_t whole = rows / RBE_INTERLEAVED_ROWS, rest = rows % RBE_INTERLEAVED_ROWS, tile = count * RBE_INTERLEAVED_ROWS;
    RBE_TRY(turn(interleaved, whole, count, RBE_INTERLEAVED_ROWS, packed, device, err));
    if (!rest) return RBE_OK;
    const rbe_cu_strided view = {interleaved + whole * tile, 1, RBE_F32, 2, {rest, count}, {1, RBE_INTERLEAVED_ROWS}};
    RBE_LAUNCH(rbe_cu_copy(&view, false, packed + whole * tile, RBE_F32, device->stream), err);
    return RBE_OK;
}

rbe_status rbe_cuda_interleave(const uint8_t *packed, int64_t rows, int64_t count, uint8_t *interleaved, const rbe_device *device,
                               rbe_error *err) {
    const int64_t whole = rows / RBE_INTERLEAVED_ROWS, rest = rows % RBE_INTERLEAVED_ROWS, tile = count * RBE_INTERLEAVED_ROWS;
    RBE_TRY(turn(packed, whole, RBE_INTERLEAVED_ROWS, count, interleaved, device, err));
    if (!rest) return RBE_OK;
    uint8_t *padded;
    RBE_TRY(rbe_cuda_take(device, tile, 1, &padded, err));
    RBE_LAUNCH(rbe_cu_zero(padded, (size_t)tile, device->stream), err);
    const rbe_cu_strided view = {packed + whole * tile, 1, RBE_F32, 1, {rest * count}, {1}};
    RBE_LAUNCH(rbe_cu_copy(&view, false, padded, RBE_F32, device->stream), err);
    return turn(padded, 1, RBE_INTERLEAVED_ROWS, count, interleaved + whole * tile, device, err);
}
