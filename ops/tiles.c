// Activations of any type and stride <-> float32, as rows (token after token) or as tiles (column after column, tokens side by side).
#include <string.h>

#include "product.h"

enum {
    CHUNK = 256,       // columns that pass through a buffer at a time
    STREAMED = 1 << 20  // floats of a result that leaves L2 before anybody reads it
};

static int64_t size_of(rbe_dtype dtype) { return dtype == RBE_F32 ? 4 : 2; }
static const char *at(const rbe_matrix *a, int64_t t, int64_t j) {
    return (const char *)a->data + (t * a->row_stride + j * a->col_stride) * size_of(a->dtype);
}

// At most CHUNK columns of one token.
static void load_row(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t, int64_t j0, int64_t cols, float *out) {
    const char *in = at(a, t, j0);
    if (a->dtype == RBE_F32) {
        if (a->col_stride == 1)
            memcpy(out, in, (size_t)cols * 4);
        else
            for (int64_t j = 0; j < cols; ++j) out[j] = ((const float *)(const void *)in)[j * a->col_stride];
        return;
    }
    const uint16_t *half = (const uint16_t *)(const void *)in;
    uint16_t packed[CHUNK];
    if (a->col_stride != 1) {
        for (int64_t j = 0; j < cols; ++j) packed[j] = half[j * a->col_stride];
        half = packed;
    }
    (a->dtype == RBE_BF16 ? kernels->bf16_to_f32 : kernels->f16_to_f32)(half, cols, out);
}

static void store_row(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t, int64_t j0, int64_t cols, const float *in) {
    char *out = (char *)a->data + (t * a->row_stride + j0 * a->col_stride) * size_of(a->dtype);
    if (a->dtype == RBE_F32) {
        if (a->col_stride == 1)
            memcpy(out, in, (size_t)cols * 4);
        else
            for (int64_t j = 0; j < cols; ++j) ((float *)(void *)out)[j * a->col_stride] = in[j];
        return;
    }
    uint16_t packed[CHUNK], *half = (uint16_t *)(void *)out;
    uint16_t *target = a->col_stride == 1 ? half : packed;
    (a->dtype == RBE_BF16 ? kernels->f32_to_bf16 : kernels->f32_to_f16)(in, cols, target);
    if (a->col_stride != 1)
        for (int64_t j = 0; j < cols; ++j) half[j * a->col_stride] = packed[j];
}

void rbe_load_rows(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, float *out,
                   int64_t out_row) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < cols; j += CHUNK) load_row(kernels, a, t0 + t, j0 + j, rbe_min(CHUNK, cols - j), out + t * out_row + j);
}

void rbe_store_rows(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, const float *in,
                    int64_t in_row) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < cols; j += CHUNK) store_row(kernels, a, t0 + t, j0 + j, rbe_min(CHUNK, cols - j), in + t * in_row + j);
}

void rbe_load_tile(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, float *out,
                   int64_t width) {
    if (rbe_is_rows(a)) {
        kernels->transpose((const float *)(const void *)at(a, t0, j0), a->row_stride, tokens, cols, out, width, width);
        return;
    }
    if (a->dtype == RBE_F32 && a->row_stride == 1) {  // columns already lie token after token
        for (int64_t j = 0; j < cols; ++j) {
            memcpy(out + j * width, at(a, t0, j0 + j), (size_t)tokens * 4);
            memset(out + j * width + tokens, 0, (size_t)(width - tokens) * 4);
        }
        return;
    }
    float buffer[RBE_TILE_MAX * CHUNK];
    for (int64_t j = 0; j < cols; j += CHUNK) {
        const int64_t some = rbe_min(CHUNK, cols - j);
        for (int64_t t = 0; t < tokens; ++t) load_row(kernels, a, t0 + t, j0 + j, some, buffer + t * CHUNK);
        kernels->transpose(buffer, CHUNK, tokens, some, out + j * width, width, width);
    }
}

void rbe_store_tile(const rbe_kernels *kernels, const rbe_matrix *a, int64_t t0, int64_t tokens, int64_t j0, int64_t cols, const float *in,
                    int64_t width) {
    if (rbe_is_rows(a)) {
        const bool large = a->rows * a->cols >= STREAMED;
        (large ? kernels->transpose_stream : kernels->transpose)(in, width, cols, tokens, (float *)(void *)at(a, t0, j0), a->row_stride, cols);
        return;
    }
    float buffer[RBE_TILE_MAX * CHUNK];
    for (int64_t j = 0; j < cols; j += CHUNK) {
        const int64_t some = rbe_min(CHUNK, cols - j);
        kernels->transpose(in + j * width, width, some, tokens, buffer, CHUNK, some);
        for (int64_t t = 0; t < tokens; ++t) store_row(kernels, a, t0 + t, j0 + j, some, buffer + t * CHUNK);
    }
}
