// Checks an operator's weight arguments against each other and against the layout, naming the one that does not fit.
#include "weight.h"

#include "../kernels/reference/reference.h"

#include <stdio.h>

rbe_status rbe_bind_layout(rbe_call *call, int at, rbe_weight *out, int64_t *in_features) {
    const char *text;
    size_t length;
    rbe_call_string(call, at, &text, &length);
    rbe_status status = rbe_layout_parse(text, length, &out->layout, &call->err);
    if (status != RBE_OK) return status;

    int64_t n = rbe_call_int(call, at + 1), seed = rbe_call_int(call, at + 2);
    if (n < 1 || n > INT32_MAX) return rbe_call_fail(call, "in_features: was %lld; must be 1 .. 2^31 - 1", (long long)n);
    if (seed < 0 || seed > UINT32_MAX) return rbe_call_fail(call, "seed: was %lld; must be 0 .. 2^32 - 1", (long long)seed);
    out->seed = (uint32_t)seed;
    out->row0 = rbe_call_int(call, at + 3);
    out->k0 = rbe_call_int(call, at + 4);
    if (out->row0 < 0) return rbe_call_fail(call, "row0: was %lld; must be >= 0", (long long)out->row0);
    out->groups_total = (n + out->layout.group - 1) / out->layout.group;
    if (out->k0 < 0 || out->k0 >= out->groups_total) {
        return rbe_call_fail(call, "k0: was %lld; must be 0 .. %lld, the groups of in_features = %lld", (long long)out->k0,
                             (long long)out->groups_total - 1, (long long)n);
    }
    *in_features = n;
    return RBE_OK;
}

rbe_status rbe_bind_groups(rbe_call *call, int64_t in_features, int64_t groups, int64_t cols, rbe_weight *out) {
    // A shard holds groups k0 .. k0 + groups - 1. Without a seed its first group says nothing, so k0 = 0 means the whole layer.
    bool seeded = rbe_field_seeded(out->layout.field), last = out->k0 + groups == out->groups_total;
    if (groups < 1 || out->k0 + groups > out->groups_total || (!last && out->k0 == 0 && !seeded)) {
        return rbe_call_fail(call, "in_features: was %lld, which is %lld groups of %d from group %lld on; codes have %lld",
                             (long long)in_features, (long long)(out->groups_total - out->k0), (int)out->layout.group, (long long)out->k0,
                             (long long)groups);
    }
    out->groups = groups;
    out->cols = last ? in_features - out->k0 * out->layout.group : groups * out->layout.group;
    if (cols >= 0 && cols != out->cols) {
        return rbe_call_fail(call, "x: last dimension was %lld; must be %lld, the columns of %lld groups (in_features = %lld)",
                             (long long)cols, (long long)out->cols, (long long)groups, (long long)in_features);
    }
    return RBE_OK;
}

static rbe_status bind_interleaved(rbe_call *call, const rbe_view *codes, rbe_weight *out, int64_t *groups) {
    const int64_t stages = out->layout.stages, tiles = rbe_interleaved_tiles(out->rows);
    if (out->layout.field != RBE_FIELD_RBE8) {
        return rbe_call_fail(call, "%s: has shape %s; only codes of rbe8 can be interleaved, those of this layout are packed bytes [m, ceil(K*M*%d/8)]",
                             codes->name, rbe_shape_text(codes->dims, codes->sizes), (int)out->layout.bits);
    }
    if (codes->sizes[0] != tiles || codes->sizes[1] < 1 || codes->sizes[1] % stages || codes->sizes[2] != RBE_INTERLEAVED_ROWS) {
        return rbe_call_fail(call, "%s: has shape %s; interleaved codes must be [ceil(m/64) = %lld, K * %lld, 64]", codes->name,
                             rbe_shape_text(codes->dims, codes->sizes), (long long)tiles, (long long)stages);
    }
    *groups = codes->sizes[1] / stages;
    const void *dense;
    rbe_status status = rbe_dense_bytes(call, codes, 1, &dense);
    out->interleaved = dense;
    return status;
}

rbe_status rbe_bind_codes(rbe_call *call, const rbe_view *codes, rbe_weight *out, int64_t *groups) {
    const rbe_layout *layout = &out->layout;
    int64_t stages = layout->stages;
    if (codes->dtype == torch.aoti_torch_dtype_int32()) {
        if (codes->dims != 3 || codes->sizes[2] != stages) {
            return rbe_call_fail(call, "%s: has shape %s; interchange words of this layout must be [m, K, M = %lld]", codes->name,
                                 rbe_shape_text(codes->dims, codes->sizes), (long long)stages);
        }
        *groups = codes->sizes[1];
        const void *dense;
        rbe_status status = rbe_dense_bytes(call, codes, 4, &dense);
        if (status != RBE_OK) return status;
        out->words = dense;
    } else if (codes->dtype == torch.aoti_torch_dtype_uint8() && codes->dims == 3 && out->rows > 0) {
        return bind_interleaved(call, codes, out, groups);
    } else if (codes->dtype == torch.aoti_torch_dtype_uint8()) {
        if (codes->dims != 2) {
            return rbe_call_fail(call, "%s: has shape %s; packed codes must be [m, ceil(K*M*%d/8)]", codes->name,
                                 rbe_shape_text(codes->dims, codes->sizes), (int)layout->bits);
        }
        // A group of 8 bits or more takes more than the padding, so the number of bytes tells K; of smaller ones the padding could hold some, so no more
        // than are left of the layer are meant.
        *groups = codes->sizes[1] * 8 / (layout->bits * stages);
        if (*groups > out->groups_total - out->k0) *groups = out->groups_total - out->k0;
        if (rbe_packed_row_bytes(layout, *groups) != codes->sizes[1]) {
            return rbe_call_fail(call, "%s: rows have %lld bytes; no number of groups of %lld codes of %d bits fills that", codes->name,
                                 (long long)codes->sizes[1], (long long)stages, (int)layout->bits);
        }
        rbe_view v = *codes;
        const void *dense = v.data;
        out->packed_stride = v.strides[0];
        if (v.sizes[1] > 1 && v.strides[1] != 1) {
            rbe_status status = rbe_dense_bytes(call, &v, 1, &dense);
            if (status != RBE_OK) return status;
            out->packed_stride = v.sizes[1];
        }
        out->packed = dense;
    } else {
        return rbe_call_fail(call, "%s: is %s; must be int32 (interchange words) or uint8 (packed)", codes->name,
                             rbe_torch_dtype_name(codes->dtype));
    }
    out->rows = codes->sizes[0];
    if (out->rows < 1) return rbe_call_fail(call, "%s: has no rows; must have at least one", codes->name);
    return RBE_OK;
}

static rbe_status expect_dtype(rbe_call *call, const rbe_view *v, int32_t dtype) {
    if (v->dtype == dtype) return RBE_OK;
    return rbe_call_fail(call, "%s: is %s; must be %s", v->name, rbe_torch_dtype_name(v->dtype), rbe_torch_dtype_name(dtype));
}

// One residual tensor: present exactly where the layout has it, of this dtype and shape, dense.
static rbe_status bind_residual_part(rbe_call *call, int position, const char *name, int32_t dtype, size_t element, int64_t dims,
                                     const int64_t *sizes, const char *letters, const void **out) {
    torch_tensor t = rbe_call_tensor(call, position);
    if (!letters) return t ? rbe_call_fail(call, "%s: was given; this layout has none", name) : RBE_OK;
    if (!t) return rbe_call_fail(call, "%s: is None; this layout needs it, %s", name, letters);
    rbe_view v;
    rbe_status status = rbe_view_of(call, t, name, &v);
    if (status == RBE_OK) status = expect_dtype(call, &v, dtype);
    if (status == RBE_OK) status = rbe_expect_shape(call, &v, dims, sizes, letters);
    if (status == RBE_OK) status = rbe_dense_bytes(call, &v, element, out);
    return status;
}

static rbe_status bind_residual(rbe_call *call, int at, rbe_weight *out) {
    const rbe_layout *l = &out->layout;
    int64_t m = out->rows, n = out->cols, r = l->rank;
    int64_t kept = rbe_reference_sparse_count(out);
    int32_t i8 = torch.aoti_torch_dtype_int8(), f8 = torch.aoti_torch_dtype_float8_e4m3fn(), f32 = torch.aoti_torch_dtype_float32();
    int32_t f16 = torch.aoti_torch_dtype_float16(), i32 = torch.aoti_torch_dtype_int32();

    // dtype, element bytes, dims, sizes and letters of the four tensors; no letters: the tensor must be None
    struct part {
        int32_t dtype;
        size_t element;
        int64_t dims, sizes[2];
        const char *letters;
    } parts[4] = {{0}, {0}, {0}, {0}};
    switch (l->residual) {
        case RBE_RESIDUAL_NONE: break;
        case RBE_RESIDUAL_INT8:
        case RBE_RESIDUAL_FP8:
            parts[0] = (struct part){l->residual == RBE_RESIDUAL_INT8 ? i8 : f8, 1, 2, {m, n}, "[m, n]"};
            parts[1] = (struct part){f32, 4, 1, {m}, "[m]"};
            break;
        case RBE_RESIDUAL_LOWRANK:
            parts[0] = (struct part){i8, 1, 2, {m, r}, "[m, r]"};
            parts[1] = (struct part){f32, 4, 1, {r}, "[r]"};
            parts[2] = (struct part){i8, 1, 2, {r, n}, "[r, n]"};
            parts[3] = (struct part){f32, 4, 1, {r}, "[r]"};
            break;
        case RBE_RESIDUAL_SPARSE:
            parts[0] = (struct part){f16, 2, 2, {m, kept}, "[m, c]"};
            parts[2] = (struct part){i32, 4, 2, {m, kept}, "[m, c]"};
            break;
    }
    static const char *const names[4] = {"residual", "residual_scale", "residual_right", "residual_right_scale"};
    const void *data[4] = {NULL, NULL, NULL, NULL};
    for (int p = 0; p < 4; p++) {
        rbe_status status = bind_residual_part(call, at + p, names[p], parts[p].dtype, parts[p].element, parts[p].dims, parts[p].sizes,
                                               parts[p].letters, &data[p]);
        if (status != RBE_OK) return status;
    }
    out->residual = (rbe_residual){data[0], data[1], data[2], data[3]};
    return RBE_OK;
}

static rbe_status view_at(rbe_call *call, int position, const char *name, rbe_view *out) {
    return rbe_view_of(call, rbe_call_tensor(call, position), name, out);
}

rbe_status rbe_bind_weight(rbe_call *call, const rbe_weight_positions *at, rbe_dtype real, int64_t cols, rbe_weight *out,
                           rbe_weight_views *views) {
    *out = (rbe_weight){.real = real, .rounded = at->rounded < 0 || rbe_call_bool(call, at->rounded)};
    *views = (rbe_weight_views){.has_amplitude = false};
    int64_t in_features, groups = 0;
    rbe_status status = rbe_bind_layout(call, at->layout, out, &in_features);
    if (status == RBE_OK) status = view_at(call, at->gain, "gain", &views->gain);
    if (status == RBE_OK && views->gain.dims == 1) out->rows = views->gain.sizes[0];
    if (status == RBE_OK && at->codes >= 0) status = view_at(call, at->codes, "codes", &views->codes);
    if (status == RBE_OK && at->codes >= 0) status = rbe_bind_codes(call, &views->codes, out, &groups);
    if (status == RBE_OK) status = rbe_bind_groups(call, in_features, groups, cols, out);
    if (status != RBE_OK) return status;

    int64_t basis_shape[3] = {out->layout.stages, RBE_BASIS_VECTORS, out->layout.group};
    status = view_at(call, at->basis, "basis", &views->basis);
    if (status == RBE_OK) status = rbe_expect_shape(call, &views->basis, 3, basis_shape, "[M, 256, g]");
    if (status == RBE_OK) status = rbe_dense_float(call, &views->basis, real, &out->basis);
    if (status == RBE_OK) status = rbe_expect_shape(call, &views->gain, 1, &out->rows, "[m]");
    if (status == RBE_OK) status = rbe_dense_float(call, &views->gain, real, &out->gain);
    if (status != RBE_OK) return status;

    if (at->amplitude >= 0 && rbe_call_tensor(call, at->amplitude)) {
        int64_t amplitude_shape[3] = {out->rows, groups, out->layout.stages};
        views->has_amplitude = true;
        status = view_at(call, at->amplitude, "amplitude", &views->amplitude);
        if (status == RBE_OK) status = expect_dtype(call, &views->amplitude, rbe_torch_dtype(real));
        if (status == RBE_OK) status = rbe_expect_shape(call, &views->amplitude, 3, amplitude_shape, "[m, K, M]");
        if (status == RBE_OK) status = rbe_dense_float(call, &views->amplitude, real, &out->amplitude);
        if (status != RBE_OK) return status;
    }
    if (!out->rounded && real != RBE_F64) {
        return rbe_call_fail(call, "rounded: was False; unrounded amplitudes need float64 tensors");
    }
    if (at->residual < 0 && out->layout.residual != RBE_RESIDUAL_NONE) return rbe_call_fail(call, "layout: has a residual; must be without one");
    return at->residual < 0 ? RBE_OK : bind_residual(call, at->residual, out);
}
