// A weight's codes, unpacked, and stretches of its rows decoded to float32 with the residual added.
#include <math.h>
#include <string.h>

#include "../kernels/reference/reference.h"
#include "product.h"

rbe_code_row rbe_code_row_at(const rbe_weight *w, int64_t row) {
    const int64_t count = rbe_codes_a_row(w);
    return (rbe_code_row){
        .field = w->layout.field,
        .count = count,
        .words = w->words ? w->words + row * count : NULL,
        .packed = w->packed ? w->packed + row * w->packed_stride : NULL,
        .amplitude = w->amplitude ? (const float *)w->amplitude + row * count : NULL,
        .seed = w->seed,
        .first = (uint32_t)(((uint64_t)(w->row0 + row) * (uint64_t)w->groups_total + (uint64_t)w->k0) * (uint64_t)w->layout.stages),
    };
}


enum { STRETCH = 64 };  // scales on their way to float16

typedef struct unpacking {
    const rbe_kernels *kernels;
    const rbe_weight *w;
    int64_t block;
    uint8_t *idx;
    float *scale;
    uint16_t *half;
} unpacking;

static void unpack_rows(int64_t begin, int64_t end, void *context) {
    const unpacking *u = context;
    const int64_t count = rbe_codes_a_row(u->w), step = u->w->rows * u->block;
    for (int64_t i = begin; i < end; ++i) {
        const rbe_code_row row = rbe_code_row_at(u->w, i);
        for (int64_t q = 0, at = i * u->block; q < count; q += u->block, at += step) {
            const int64_t some = rbe_min(u->block, count - q);
            if (!u->half) {
                u->kernels->unpack(&row, q, some, u->idx + at, u->scale ? u->scale + at : NULL, NULL);
                continue;
            }
            float scale[STRETCH];
            for (int64_t o = 0; o < some; o += STRETCH) {
                const int64_t here = rbe_min(STRETCH, some - o);
                u->kernels->unpack(&row, q + o, here, u->idx + at + o, scale, NULL);
                u->kernels->f32_to_f16(scale, here, u->half + at + o);
            }
        }
    }
}

rbe_status rbe_unpack_codes(const rbe_kernels *kernels, const rbe_weight *w, int64_t block, bool half, const rbe_parallel *threads, rbe_codes *out,
                            rbe_error *err) {
    if (w->packed && w->layout.field == RBE_FIELD_RBE8) {  // a packed row is its idx
        *out = (rbe_codes){w->packed, NULL, NULL, w->packed_stride, block};
        return RBE_OK;
    }
    const int64_t size = (rbe_codes_a_row(w) + block - 1) / block * block * w->rows;
    unpacking u = {kernels, w, block, rbe_scratch_take(size, 1), NULL, NULL};
    const bool scaled = rbe_field_has_scale(w->layout.field);
    if (scaled && half) u.half = rbe_scratch_take(size, sizeof *u.half);
    if (scaled && !half) u.scale = rbe_scratch_take(size, sizeof *u.scale);
    if (!u.idx || (scaled && !u.scale && !u.half)) return rbe_out_of_memory(err);
    rbe_run(threads, w->rows, 64, unpack_rows, &u);
    *out = (rbe_codes){u.idx, u.scale, u.half, block, w->rows * block};
    return RBE_OK;
}

const uint16_t *rbe_split_basis(const rbe_kernels *kernels, const rbe_weight *w) {
    const int64_t g = w->layout.group, size = rbe_split_size(RBE_BASIS_VECTORS, g);
    uint16_t *basis = rbe_scratch_take(w->layout.stages * size, sizeof *basis);
    for (int64_t s = 0; basis && s < w->layout.stages; ++s)
        kernels->split_rows(RBE_BASIS_VECTORS, g, (const float *)w->basis + s * RBE_BASIS_VECTORS * g, g, RBE_WHOLE, basis + s * size);
    return basis;
}

const uint16_t *rbe_split_basis_turned(const rbe_kernels *kernels, const rbe_weight *w) {
    const int64_t g = w->layout.group, size = rbe_split_size(g, RBE_BASIS_VECTORS);
    uint16_t *basis = rbe_scratch_take(w->layout.stages * size, sizeof *basis);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *turned = rbe_scratch_take(g * RBE_BASIS_VECTORS, sizeof *turned);
    for (int64_t s = 0; basis && turned && s < w->layout.stages; ++s) {
        kernels->transpose((const float *)w->basis + s * RBE_BASIS_VECTORS * g, g, RBE_BASIS_VECTORS, g, turned, RBE_BASIS_VECTORS,
                           RBE_BASIS_VECTORS);
        kernels->split_rows(g, RBE_BASIS_VECTORS, turned, RBE_BASIS_VECTORS, RBE_WHOLE, basis + s * size);
    }
    rbe_scratch_end(mark);
    return turned ? basis : NULL;
}

bool rbe_take_row_buffers(const rbe_weight *w, int64_t groups, rbe_row_buffers *out) {
    const int64_t count = groups * w->layout.stages;
    *out = (rbe_row_buffers){rbe_scratch_take(count, 1), NULL, NULL};
    if (w->layout.field == RBE_FIELD_RBE16S) out->signs = rbe_scratch_take(count, 1);
    if (rbe_field_has_scale(w->layout.field)) out->scale = rbe_scratch_take(count, sizeof(float));
    return out->idx && (out->signs || w->layout.field != RBE_FIELD_RBE16S) && (out->scale || !rbe_field_has_scale(w->layout.field));
}

static const float *e4m3fn_table(void) {
    static __thread float table[256];  // filled once a thread: 1 kB, no locking
    if (table[1] == 0.0f)
        for (int b = 0; b < 256; ++b) table[b] = rbe_reference_e4m3fn_to_f32((uint8_t)b);
    return table;
}

static void add_sparse(const rbe_weight *w, int64_t row, int64_t j0, int64_t cols, float *out) {
    const int64_t count = rbe_reference_sparse_count(w);
    const int32_t *column = (const int32_t *)w->residual.right + row * count;
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (column[middle] < j0)
            low = middle + 1;
        else
            high = middle;
    }
    const uint16_t *value = (const uint16_t *)w->residual.values + row * count;
    for (; low < count && column[low] < j0 + cols; ++low) out[column[low] - j0] += rbe_reference_f16_to_f32(value[low]);
}

static void add_residual(const rbe_kernels *kernels, const rbe_weight *w, int64_t row, int64_t j0, int64_t cols, float *out) {
    const rbe_residual *r = &w->residual;
    switch (w->layout.residual) {
        case RBE_RESIDUAL_INT8:
            kernels->add_scaled_i8(cols, r->scale[row], (const int8_t *)r->values + row * w->cols + j0, out);
            break;
        case RBE_RESIDUAL_FP8:
            kernels->add_lookup(cols, r->scale[row], e4m3fn_table(), (const uint8_t *)r->values + row * w->cols + j0, out);
            break;
        case RBE_RESIDUAL_LOWRANK:
            for (int64_t p = 0; p < w->layout.rank; ++p) {
                const float a = (float)((const int8_t *)r->values)[row * w->layout.rank + p] * r->scale[p];
                kernels->add_scaled_i8(cols, a * r->right_scale[p], (const int8_t *)r->right + p * w->cols + j0, out);
            }
            break;
        case RBE_RESIDUAL_SPARSE: add_sparse(w, row, j0, cols, out); break;
        default: break;
    }
}

void rbe_decode_row(const rbe_kernels *kernels, const rbe_weight *w, int64_t row, int64_t k0, int64_t groups, rbe_row_buffers b,
                    float *out) {
    const rbe_layout *l = &w->layout;
    const rbe_code_row codes = rbe_code_row_at(w, row);
    const int64_t j0 = k0 * l->group, cols = rbe_min(groups * l->group, w->cols - j0);
    kernels->unpack(&codes, k0 * l->stages, groups * l->stages, b.idx, b.scale, b.signs);
    kernels->decode_row(l->stages, l->group, cols, w->basis, b.idx, b.scale, b.signs, ((const float *)w->gain)[row], out);
    add_residual(kernels, w, row, j0, cols, out);
}
