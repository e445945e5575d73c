// Views of torch tensors and the copies that make an odd one dense.
#include "tensor.h"

#include <stdio.h>
#include <string.h>

rbe_status rbe_view_of(rbe_call *call, torch_tensor t, const char *name, rbe_view *out) {
    int32_t device = -1, layout = -1;
    torch.aoti_torch_get_device_type(t, &device);
    if (device != torch.aoti_torch_device_type_cpu()) {
        return rbe_call_fail(call, "%s: is not on the CPU; all tensors of a call must be on one device", name);
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
    gather(v, element, copy);
    *out = copy;
    return RBE_OK;
}

static float bits_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static uint32_t float_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // subnormals and zero are exact multiples of 2^-24; normals move their exponent by 112
    float f = magnitude < 0x400u ? (float)magnitude * 0x1p-24f : bits_float((magnitude << 13) + (112u << 23));
    return bits_float(float_bits(f) | sign);
}

static uint16_t float_to_half(float f) {
    uint32_t bits = float_bits(f), magnitude = bits & 0x7FFFFFFFu;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {
        // below 2^-14: adding 0.5 leaves the value, in units of 2^-24, in the low bits, rounded to nearest even by the addition
        return sign | (uint16_t)(float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u);
    }
    return sign | (uint16_t)((magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13);
}

static uint16_t float_to_bfloat(float f) {
    uint32_t bits = float_bits(f);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

static double load(const void *data, rbe_dtype dtype, int64_t i) {
    switch (dtype) {
        case RBE_F32: return ((const float *)data)[i];
        case RBE_F64: return ((const double *)data)[i];
        case RBE_BF16: return bits_float((uint32_t)((const uint16_t *)data)[i] << 16);
        case RBE_F16: return half_to_float(((const uint16_t *)data)[i]);
    }
    return 0;
}

rbe_status rbe_dense_float(rbe_call *call, const rbe_view *v, rbe_dtype real, const void **out) {
    rbe_dtype dtype;
    if (!rbe_float_dtype(v->dtype, &dtype)) {
        return rbe_call_fail(call, "%s: is %s; must be float32, float64, bfloat16 or float16", v->name, rbe_torch_dtype_name(v->dtype));
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
    for (int64_t i = 0; i < count; i++) {
        if (real == RBE_F64) {
            ((double *)copy)[i] = load(dense, dtype, i);
        } else {
            ((float *)copy)[i] = (float)load(dense, dtype, i);
        }
    }
    *out = copy;
    return RBE_OK;
}

void rbe_store_float(const void *from, rbe_dtype real, void *to, rbe_dtype dtype, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        double value = load(from, real, i);
        switch (dtype) {
            case RBE_F32: ((float *)to)[i] = (float)value; break;
            case RBE_F64: ((double *)to)[i] = value; break;
            case RBE_BF16: ((uint16_t *)to)[i] = float_to_bfloat((float)value); break;
            case RBE_F16: ((uint16_t *)to)[i] = float_to_half((float)value); break;
        }
    }
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
