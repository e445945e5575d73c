// rbe_decode_backward: gradients of the basis and the gain from that of the decoded weight.
//
//   dbasis[s, idx, :] += gain[i] scale(code) (signs of the code) o dW[i, group k]        dgain[i] = sum over a row of dW (W / gain)
//
// Rows are summed in CHUNKS fixed chunks, and these in order, so that the result does not depend on the number of threads.
#include "../kernels/reference/reference.h"
#include "product.h"

enum { CHUNKS = 8 };

typedef struct job {
    const rbe_weight *w;
    const float *dense, *basis;
    float *partial, *gain;  // [CHUNKS, M, 256, g], [m]
    int64_t rows;           // of a chunk
} job;

static void add_rows(int64_t begin, int64_t end, void *context) {
    const job *j = context;
    const rbe_weight *w = j->w;
    const int64_t g = w->layout.group, stages = w->layout.stages, size = stages * RBE_BASIS_VECTORS * g;
    for (int64_t c = begin; c < end; ++c) {
        float *basis = j->partial + c * size;
        for (int64_t i = 0; i < size; ++i) basis[i] = 0;
        for (int64_t i = c * j->rows; i < rbe_min((c + 1) * j->rows, w->rows); ++i) {
            const float gain = (float)rbe_real_at(w->gain, w->real, i);
            double along = 0;
            for (int64_t k = 0; k < w->groups; ++k) {
                const int64_t depth = rbe_min(g, w->cols - k * g);
                const float *grad = j->dense + i * w->cols + k * g;
                for (int64_t s = 0; s < stages; ++s) {
                    const uint32_t word = (uint32_t)w->words[(i * w->groups + k) * stages + s];
                    const int64_t at = (s * RBE_BASIS_VECTORS + rbe_word_idx(word)) * g;
                    const float scale = rbe_reference_scale(w->layout.field, word), factor = gain * scale;
                    const float *from = j->basis + at;
                    float *to = basis + at, dot = 0;
                    if (w->layout.field == RBE_FIELD_RBE16S) {
                        for (int64_t e = 0; e < depth; ++e) {
                            const float value = word >> e & 1 ? -grad[e] : grad[e];
                            dot += value * from[e];
                            to[e] += factor * value;
                        }
                    } else {
                        for (int64_t e = 0; e < depth; ++e) dot += grad[e] * from[e];
                        for (int64_t e = 0; e < depth; ++e) to[e] += factor * grad[e];
                    }
                    along += (double)scale * dot;
                }
            }
            j->gain[i] = (float)along;
        }
    }
}

rbe_status rbe_decode_backward(const rbe_weight *w, const float *dense, float *dbasis, float *dgain, const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = rbe_check_weight(w, err);
    if (status != RBE_OK) return status;
    if (!w->words || w->real != RBE_F32 || w->amplitude || !dense || !dbasis || !dgain)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "codes: must be int32 words without an amplitude, with a float32 basis and gradient");
    const int64_t size = (int64_t)w->layout.stages * RBE_BASIS_VECTORS * w->layout.group;
    const rbe_scratch_mark mark = rbe_scratch_begin();
    job j = {.w = w, .dense = dense, .basis = w->basis, .gain = dgain, .rows = (w->rows + CHUNKS - 1) / CHUNKS};
    j.partial = rbe_scratch_take(CHUNKS * size, sizeof *j.partial);
    if (!j.partial) {
        status = rbe_out_of_memory(err);
    } else {
        rbe_run(threads, CHUNKS, 1, add_rows, &j);
        for (int64_t i = 0; i < size; ++i) {
            float sum = 0;
            for (int64_t c = 0; c < CHUNKS; ++c) sum += j.partial[c * size + i];
            dbasis[i] = sum;
        }
    }
    rbe_scratch_end(mark);
    return status;
}
