// Views of torch tensors and the copies that make an odd one dense.
#include "tensor.h"

#include "device.h"

#include "../kernels/reference/reference.h"

#include <stdio.h>
#include <string.h>

rbe_status rbe_view_of(rbe_call *call, torch_tensor t, const char *name, rbe_view *out) {
    int32_t device = -1, index = -1, layout = -1;
    torch.aoti_torch_get_device_type(t, &device);
    torch.aoti_torch_get_device_index(t, &index);
    if (device != call->place.type || (call->place.cuda && index != call->place.index)) {
        char there[32];
        snprintf(there, sizeof there, "%s", rbe_device_text(device, index));
        return rbe_call_fail(call, "%s: is on %s; must be on %s, as all tensors of a call", name, there,
                             rbe_device_text(call->place.type, call->place.index));
    }
    torch.aoti_torch_get_layout(t, &layout);
    if (layout != torch.aoti_torch_layout_strided()) {
        return rbe_call_fail(call, "%s: is a sparse or opaque tensor; must be strided (dense)", name);
    }
    int64_t *sizes = NULL, *strides = NULL;
    *out = (rbe_view){.name = name};
    torch.aoti_torch_get_dim(t, &out->dims);
    torch.aoti_torch_get_sizes(t, &sizes);
    torch.aoti_torch_get_strides(t, &strides);
    torch.aoti_torch_get_dtype(t, &out->dtype);
    torch.torch_get_const_data_ptr(t, &out->data);
    out->sizes = sizes;
    out->strides = strides;
    return RBE_OK;
}

const char *rbe_torch_dtype_name(int32_t dtype) {
    // c10::ScalarType is append-only, so its numbers are part of the ABI.
    static const char *const names[] = {"uint8",   "int8",      "int16",      "int32",  "int64", "float16", "float32",  "float64",
                                        "complex32", "complex64", "complex128", "bool",   "qint8", "quint8",  "qint32",   "bfloat16",
                                        "quint4x2",  "quint2x4",  "bits1x8",    "bits2x4", "bits4x2", "bits8", "bits16", "float8_e5m2",
                                        "float8_e4m3fn"};
    return dtype >= 0 && dtype < (int32_t)(sizeof names / sizeof *names) ? names[dtype] : "an unknown dtype";
}

bool rbe_float_dtype(int32_t dtype, rbe_dtype *out) {
    for (rbe_dtype d = RBE_F32; d <= RBE_F16; d++) {
        if (rbe_torch_dtype(d) == dtype) {
            *out = d;
            return true;
        }
    }
    return false;
}

int32_t rbe_torch_dtype(rbe_dtype dtype) {
    switch (dtype) {
        case RBE_F32: return torch.aoti_torch_dtype_float32();
        case RBE_F64: return torch.aoti_torch_dtype_float64();
        case RBE_BF16: return torch.aoti_torch_dtype_bfloat16();
        case RBE_F16: return torch.aoti_torch_dtype_float16();
    }
    return -1;
}

size_t rbe_dtype_size(rbe_dtype dtype) { return dtype == RBE_F64 ? 8 : dtype == RBE_F32 ? 4 : 2; }

const char *rbe_shape_text(int64_t dims, const int64_t *sizes) {
    static _Thread_local char text[160];
    size_t at = 0;
    text[at++] = '[';
    for (int64_t d = 0; d < dims && at < sizeof text - 32; d++) {
        at += (size_t)snprintf(text + at, sizeof text - at, d ? ", %lld" : "%lld", (long long)sizes[d]);
    }
    snprintf(text + at, sizeof text - at, "]");
    return text;
}

rbe_status rbe_expect_shape(rbe_call *call, const rbe_view *v, int64_t dims, const int64_t *sizes, const char *letters) {
    bool same = v->dims == dims;
    for (int64_t d = 0; same && d < dims; d++) same = v->sizes[d] == sizes[d];
    if (same) return RBE_OK;
    char wanted[160];
    snprintf(wanted, sizeof wanted, "%s", rbe_shape_text(dims, sizes));
    return rbe_call_fail(call, "%s: has shape %s; must be %s = %s", v->name, rbe_shape_text(v->dims, v->sizes), letters, wanted);
}

static int64_t count_of(const rbe_view *v) {
    int64_t count = 1;
    for (int64_t d = 0; d < v->dims; d++) count *= v->sizes[d];
    return count;
}

static bool contiguous(const rbe_view *v) {
    int64_t step = 1;
    for (int64_t d = v->dims - 1; d >= 0; d--) {
        if (v->sizes[d] > 1 && v->strides[d] != step) return false;
        step *= v->sizes[d];
    }
    return true;
}

// A view as the device's copy kernel takes it: neighbouring dimensions that continue each other are one. False: more than it takes.
static bool strided_of(const rbe_view *v, size_t element, rbe_dtype dtype, rbe_cu_strided *out) {
    *out = (rbe_cu_strided){.data = v->data, .element = (int32_t)element, .dtype = dtype};
    for (int64_t d = 0; d < v->dims; d++) {
        if (v->sizes[d] == 1) continue;
        const int32_t last = out->dims - 1;
        if (last >= 0 && out->strides[last] == v->strides[d] * v->sizes[d]) {
            out->sizes[last] *= v->sizes[d];
            out->strides[last] = v->strides[d];
            continue;
        }
        if (out->dims == RBE_CU_DIMS) return false;
        out->sizes[out->dims] = v->sizes[d];
        out->strides[out->dims++] = v->strides[d];
    }
    return true;
}

// A dense copy on the device, of another float type where `convert`.
static rbe_status copy_on_device(rbe_call *call, const rbe_view *v, size_t element, bool convert, rbe_dtype from, rbe_dtype to, void *out) {
    if (!rbe_on_cuda(call)) return RBE_OK;
    rbe_cu_strided strided;
    if (!strided_of(v, element, from, &strided)) {
        return rbe_call_fail(call, "%s: has strides of %d dimensions that cannot be merged; make it contiguous", v->name, (int)v->dims);
    }
    const int failed = rbe_cu_copy(&strided, convert, out, to, call->place.device.stream);
    return failed ? (rbe_call_fail(call, "%s: could not be copied: %s", v->name, rbe_cu_error_text(failed)), RBE_DEVICE_FAILED) : RBE_OK;
}

// Walks the view in row-major order and copies elements of `element` bytes.
static void gather(const rbe_view *v, size_t element, char *to) {
    int64_t at[64] = {0}, count = count_of(v), offset = 0;
    const char *from = v->data;
    for (int64_t i = 0; i < count; i++) {
        memcpy(to + (size_t)i * element, from + offset * (int64_t)element, element);
        for (int64_t d = v->dims - 1; d >= 0; d--) {
            offset += v->strides[d];
            if (++at[d] < v->sizes[d]) break;
            offset -= at[d] * v->strides[d];
            at[d] = 0;
        }
    }
}

rbe_status rbe_dense_bytes(rbe_call *call, const rbe_view *v, size_t element, const void **out) {
    if (contiguous(v)) {
        *out = v->data;
        return RBE_OK;
    }
    char *copy = rbe_call_allocate(call, (size_t)count_of(v) * element);
    if (!copy) return rbe_call_fail(call, "%s: out of memory making it contiguous", v->name), RBE_OUT_OF_MEMORY;
    *out = copy;
    if (rbe_on_cuda(call)) return copy_on_device(call, v, element, false, RBE_F32, RBE_F32, copy);
    gather(v, element, copy);
    return RBE_OK;
}

rbe_status rbe_dense_float(rbe_call *call, const rbe_view *v, rbe_dtype real, const void **out) {
    rbe_dtype dtype;
    if (!rbe_float_dtype(v->dtype, &dtype)) {
        return rbe_call_fail(call, "%s: is %s; must be float32, float64, bfloat16 or float16", v->name, rbe_torch_dtype_name(v->dtype));
    }
    if (rbe_on_cuda(call) && dtype != real) {
        void *converted = rbe_call_allocate(call, (size_t)count_of(v) * rbe_dtype_size(real));
        if (!converted) return rbe_call_fail(call, "%s: out of memory converting it", v->name), RBE_OUT_OF_MEMORY;
        *out = converted;
        return copy_on_device(call, v, rbe_dtype_size(dtype), true, dtype, real, converted);
    }
    const void *dense;
    rbe_status status = rbe_dense_bytes(call, v, rbe_dtype_size(dtype), &dense);
    if (status != RBE_OK || dtype == real) {
        *out = dense;
        return status;
    }
    int64_t count = count_of(v);
    void *copy = rbe_call_allocate(call, (size_t)count * rbe_dtype_size(real));
    if (!copy) return rbe_call_fail(call, "%s: out of memory converting it", v->name), RBE_OUT_OF_MEMORY;
    for (int64_t i = 0; i < count; i++) rbe_reference_store(copy, real, i, rbe_reference_load(dense, dtype, i));
    *out = copy;
    return RBE_OK;
}

rbe_status rbe_store_float(rbe_call *call, const void *from, rbe_dtype real, void *to, rbe_dtype dtype, int64_t count) {
    if (rbe_on_cuda(call)) {
        const int64_t stride = 1;
        const rbe_view v = {.name = "a gradient", .data = from, .dims = 1, .sizes = &count, .strides = &stride};
        return copy_on_device(call, &v, rbe_dtype_size(real), true, real, dtype, to);
    }
    for (int64_t i = 0; i < count; i++) rbe_reference_store(to, dtype, i, rbe_reference_load(from, real, i));
    return RBE_OK;
}

rbe_status rbe_matrix_of(rbe_call *call, const rbe_view *v, rbe_matrix *out) {
    rbe_dtype dtype;
    if (!rbe_float_dtype(v->dtype, &dtype)) {
        return rbe_call_fail(call, "%s: is %s; must be float32, bfloat16, float16 or float64", v->name, rbe_torch_dtype_name(v->dtype));
    }
    if (v->dims < 1) return rbe_call_fail(call, "%s: is a scalar; must have at least one dimension [..., n]", v->name);

    int64_t last = v->dims - 1, rows = 1, row_stride = v->sizes[last];
    bool uniform = true, first = true;
    for (int64_t d = last - 1; d >= 0; d--) {
        // Rows are evenly spaced while each outer stride continues the inner ones.
        if (v->sizes[d] != 1) {
            if (first) row_stride = v->strides[d];
            uniform = uniform && (first || v->strides[d] == row_stride * rows);
            first = false;
        }
        rows *= v->sizes[d];
    }
    *out = (rbe_matrix){(void *)(uintptr_t)v->data, dtype, rows, v->sizes[last], row_stride, v->strides[last]};
    if (uniform || rows == 0) return RBE_OK;

    const void *dense;
    rbe_status status = rbe_dense_bytes(call, v, rbe_dtype_size(dtype), &dense);
    *out = (rbe_matrix){(void *)(uintptr_t)dense, dtype, rows, v->sizes[last], v->sizes[last], 1};
    return status;
}
