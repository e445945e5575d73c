// rbe::decode, encode, pack, unpack, interleave and deinterleave: weights, code words and bytes into each other.
#include "operators.h"

rbe_status rbe_op_decode(rbe_call *call) {
    enum { CODES, BASIS, GAIN, AMPLITUDE, RESIDUAL, LAYOUT = RESIDUAL + 4, ROUNDED = LAYOUT + 5 };
    static const rbe_weight_positions at = {CODES, BASIS, GAIN, AMPLITUDE, RESIDUAL, LAYOUT, ROUNDED};
    int32_t basis_dtype = -1;
    torch.aoti_torch_get_dtype(rbe_call_tensor(call, BASIS), &basis_dtype);
    rbe_dtype real = basis_dtype == torch.aoti_torch_dtype_float64() ? RBE_F64 : RBE_F32;
    rbe_weight w;
    rbe_weight_views views;
    rbe_status status = rbe_bind_weight(call, &at, real, -1, &w, &views);
    if (status != RBE_OK) return status;
    int64_t shape[2] = {w.rows, w.cols};
    void *dense;
    status = rbe_call_result(call, 2, shape, rbe_torch_dtype(real), &dense);
    if (status != RBE_OK) return status;
    if (rbe_on_cuda(call)) return rbe_cuda_decode(&w, dense, &call->place.device, &call->err);
    rbe_parallel threads = rbe_torch_threads();
    return rbe_decode(&w, dense, &threads, &call->err);
}

rbe_status rbe_bind_encoding(rbe_call *call, int at, int layout, rbe_weight *w, rbe_matrix *weight) {
    rbe_view weight_view, basis_view, gain_view;
    int64_t in_features;
    rbe_status status = rbe_bind_layout(call, layout, w, &in_features);
    if (status == RBE_OK) status = rbe_view_of(call, rbe_call_tensor(call, at), "weight", &weight_view);
    if (status != RBE_OK) return status;
    if (weight_view.dims != 2 || weight_view.sizes[0] < 1 || weight_view.sizes[1] < 1) {
        return rbe_call_fail(call, "weight: has shape %s; must be [m, n] with m and n at least 1",
                             rbe_shape_text(weight_view.dims, weight_view.sizes));
    }
    status = rbe_matrix_of(call, &weight_view, weight);
    if (status != RBE_OK) return status;
    w->real = rbe_real_of(weight->dtype);
    w->rows = weight->rows;
    status = rbe_bind_groups(call, in_features, (weight->cols + w->layout.group - 1) / w->layout.group, -1, w);
    if (status != RBE_OK) return status;
    if (w->cols != weight->cols) {
        return rbe_call_fail(call, "weight: has %lld columns; must be %lld (in_features = %lld)", (long long)weight->cols,
                             (long long)w->cols, (long long)in_features);
    }
    if (weight->dtype != w->real) {  // half precision: search on a float32 copy
        const void *dense;
        status = rbe_dense_float(call, &weight_view, RBE_F32, &dense);
        if (status != RBE_OK) return status;
        *weight = (rbe_matrix){(void *)(uintptr_t)dense, RBE_F32, w->rows, w->cols, w->cols, 1};
    }
    int64_t basis_shape[3] = {w->layout.stages, RBE_BASIS_VECTORS, w->layout.group};
    status = rbe_view_of(call, rbe_call_tensor(call, at + 1), "basis", &basis_view);
    if (status == RBE_OK) status = rbe_expect_shape(call, &basis_view, 3, basis_shape, "[M, 256, g]");
    if (status == RBE_OK) status = rbe_dense_float(call, &basis_view, w->real, &w->basis);
    if (status == RBE_OK) status = rbe_view_of(call, rbe_call_tensor(call, at + 2), "gain", &gain_view);
    if (status == RBE_OK) status = rbe_expect_shape(call, &gain_view, 1, &w->rows, "[m]");
    if (status == RBE_OK) status = rbe_dense_float(call, &gain_view, w->real, &w->gain);
    return status;
}

rbe_status rbe_op_encode(rbe_call *call) {
    enum { WEIGHT, BASIS, GAIN, LAYOUT };
    rbe_matrix weight;
    rbe_weight w = {.rounded = true};
    rbe_status status = rbe_bind_encoding(call, WEIGHT, LAYOUT, &w, &weight);
    if (status != RBE_OK) return status;
    int64_t shape[3] = {w.rows, w.groups, w.layout.stages};
    void *words;
    status = rbe_call_result(call, 3, shape, torch.aoti_torch_dtype_int32(), &words);
    if (status != RBE_OK) return status;
    if (rbe_on_cuda(call)) return rbe_cuda_encode(&w, &weight, words, &call->place.device, &call->err);
    rbe_parallel threads = rbe_torch_threads();
    return rbe_encode(&w, &weight, words, &threads, &call->err);
}

// pack and unpack differ in the form they take and the form they make.
static rbe_status repack(rbe_call *call, bool pack) {
    enum { CODES, LAYOUT };
    const char *name = pack ? "codes" : "packed";
    int32_t wanted = pack ? torch.aoti_torch_dtype_int32() : torch.aoti_torch_dtype_uint8();
    rbe_view view;
    rbe_weight w = {.rounded = true};
    int64_t in_features, groups;
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, CODES), name, &view);
    if (status == RBE_OK) status = rbe_bind_layout(call, LAYOUT, &w, &in_features);
    if (status != RBE_OK) return status;
    if (view.dtype != wanted) {
        return rbe_call_fail(call, "%s: is %s; must be %s", name, rbe_torch_dtype_name(view.dtype), rbe_torch_dtype_name(wanted));
    }
    status = rbe_bind_codes(call, &view, &w, &groups);
    if (status == RBE_OK) status = rbe_bind_groups(call, in_features, groups, -1, &w);
    if (status != RBE_OK) return status;
    void *data;
    if (pack) {
        int64_t shape[2] = {w.rows, rbe_packed_row_bytes(&w.layout, groups)};
        status = rbe_call_result(call, 2, shape, torch.aoti_torch_dtype_uint8(), &data);
        if (status == RBE_OK && rbe_on_cuda(call)) return rbe_cuda_pack(&w, data, &call->place.device, &call->err);
        return status == RBE_OK ? rbe_pack(&w, data, &call->err) : status;
    }
    int64_t shape[3] = {w.rows, groups, w.layout.stages};
    status = rbe_call_result(call, 3, shape, torch.aoti_torch_dtype_int32(), &data);
    if (status == RBE_OK && rbe_on_cuda(call)) return rbe_cuda_unpack(&w, data, &call->place.device, &call->err);
    return status == RBE_OK ? rbe_unpack(&w, data, &call->err) : status;
}
rbe_status rbe_op_interleave(rbe_call *call) {
    rbe_view packed;
    const void *bytes;
    void *data;
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, 0), "packed", &packed);
    if (status != RBE_OK) return status;
    if (packed.dtype != torch.aoti_torch_dtype_uint8() || packed.dims != 2 || packed.sizes[0] < 1 || packed.sizes[1] < 1) {
        return rbe_call_fail(call, "packed: is %s %s; must be uint8 [m, K*M], packed codes of rbe8", rbe_torch_dtype_name(packed.dtype),
                             rbe_shape_text(packed.dims, packed.sizes));
    }
    const int64_t shape[3] = {rbe_interleaved_tiles(packed.sizes[0]), packed.sizes[1], RBE_INTERLEAVED_ROWS};
    status = rbe_dense_bytes(call, &packed, 1, &bytes);
    if (status == RBE_OK) status = rbe_call_result(call, 3, shape, packed.dtype, &data);
    if (status == RBE_OK && rbe_on_cuda(call)) {
        return rbe_cuda_interleave(bytes, packed.sizes[0], shape[1], data, &call->place.device, &call->err);
    }
    return status == RBE_OK ? rbe_interleave(bytes, shape[1], packed.sizes[0], shape[1], data, &call->err) : status;
}

rbe_status rbe_op_deinterleave(rbe_call *call) {
    rbe_view codes;
    const void *bytes;
    void *data;
    const int64_t rows = rbe_call_int(call, 1);
    rbe_status status = rbe_view_of(call, rbe_call_tensor(call, 0), "codes", &codes);
    if (status != RBE_OK) return status;
    if (codes.dtype != torch.aoti_torch_dtype_uint8() || codes.dims != 3 || codes.sizes[0] < 1 || codes.sizes[1] < 1 ||
        codes.sizes[2] != RBE_INTERLEAVED_ROWS) {
        return rbe_call_fail(call, "codes: is %s %s; must be uint8 [ceil(m/64), K*M, 64], interleaved codes of rbe8",
                             rbe_torch_dtype_name(codes.dtype), rbe_shape_text(codes.dims, codes.sizes));
    }
    if (rows < 1 || rbe_interleaved_tiles(rows) != codes.sizes[0]) {
        return rbe_call_fail(call, "rows: was %lld; codes of shape %s have %lld .. %lld", (long long)rows,
                             rbe_shape_text(codes.dims, codes.sizes), (long long)(codes.sizes[0] - 1) * RBE_INTERLEAVED_ROWS + 1,
                             (long long)codes.sizes[0] * RBE_INTERLEAVED_ROWS);
    }
    const int64_t shape[2] = {rows, codes.sizes[1]};
    status = rbe_dense_bytes(call, &codes, 1, &bytes);
    if (status == RBE_OK) status = rbe_call_result(call, 2, shape, codes.dtype, &data);
    if (status == RBE_OK && rbe_on_cuda(call)) return rbe_cuda_deinterleave(bytes, rows, shape[1], data, &call->place.device, &call->err);
    return status == RBE_OK ? rbe_deinterleave(bytes, rows, shape[1], data, &call->err) : status;
}

rbe_status rbe_op_pack(rbe_call *call) { return repack(call, true); }
rbe_status rbe_op_unpack(rbe_call *call) { return repack(call, false); }
