// y = x W^T + bias, its gradients and W itself in float64: the specification of ops/linear.c and of every SIMD and CUDA kernel.
//
//     y[t,i]         = sum over j of x[t,j] W[i,j] + bias[i]
//     dx[t,j]        = sum over i of dy[t,i] W[i,j]
//     D[i,k,s]       = sum over t of dy[t,i] P[t,k,s],  P[t,k,s] = sum over e of x[t, k*g + e] v[e],  v = the code's vector without its
//     scale dscale[i,k,s]  = gain[i] D[i,k,s];   damplitude = dscale * d scale/da;   dgain[i] = sum over k,s of scale D;   dbias[i] = sum
//     over t of dy dbasis[s,j,e]  = sum over codes [i,k,s] with idx j of gain[i] scale (+- rbe16s) sum over t of dy[t,i] x[t, k*g + e]
//
// x, dy, dx, y: any strides, any dtype; dx and y must not overlap an input. The rest is contiguous, of type w->real. T = 0 is valid.
#include "reference.h"

enum { BLOCK = 64 };  // tokens or elements that share one look at a weight: accumulators on the stack

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// elements of a group: the last may be cut short by n
static int64_t group_width(const rbe_weight *w, int64_t group) { return smaller(w->layout.group, w->cols - group * w->layout.group); }

void rbe_reference_decode(const rbe_weight *w, void *dense) {
    for (int64_t i = 0; i < w->rows; ++i)
        for (int64_t j = 0; j < w->cols; ++j) rbe_reference_store(dense, w->real, i * w->cols + j, rbe_reference_element(w, i, j));
}

void rbe_reference_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y) {
    for (int64_t i = 0; i < w->rows; ++i) {
        for (int64_t t0 = 0; t0 < x->rows; t0 += BLOCK) {
            const int64_t tokens = smaller(BLOCK, x->rows - t0);
            double sum[BLOCK] = {0};
            for (int64_t j = 0; j < w->cols; ++j) {
                const double weight = rbe_reference_element(w, i, j);
                for (int64_t t = 0; t < tokens; ++t) sum[t] += rbe_reference_at(x, t0 + t, j) * weight;
            }
            for (int64_t t = 0; t < tokens; ++t) {
                const double value = sum[t] + (bias ? rbe_reference_load(bias, w->real, i) : 0.0);
                rbe_reference_store(y->data, y->dtype, (t0 + t) * y->row_stride + i * y->col_stride, value);
            }
        }
    }
}

static void backward_x(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *dx) {
    for (int64_t j = 0; j < w->cols; ++j) {
        for (int64_t t0 = 0; t0 < dy->rows; t0 += BLOCK) {
            const int64_t tokens = smaller(BLOCK, dy->rows - t0);
            double sum[BLOCK] = {0};
            for (int64_t i = 0; i < w->rows; ++i) {
                const double weight = rbe_reference_element(w, i, j);
                for (int64_t t = 0; t < tokens; ++t) sum[t] += rbe_reference_at(dy, t0 + t, i) * weight;
            }
            for (int64_t t = 0; t < tokens; ++t)
                rbe_reference_store(dx->data, dx->dtype, (t0 + t) * dx->row_stride + j * dx->col_stride, sum[t]);
        }
    }
}

// sum over t of dy[t,i] x[t, k*g + e]: element e of the gradient of the code's vector, without gain and scale
static double outer(const rbe_matrix *dy, const rbe_matrix *x, int64_t i, int64_t col) {
    double sum = 0.0;
    for (int64_t t = 0; t < dy->rows; ++t) sum += rbe_reference_at(dy, t, i) * rbe_reference_at(x, t, col);
    return sum;
}

// One row's D, and from it dgain, dscale and damplitude.
static void backward_row(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out, int64_t i) {
    const double gain = rbe_reference_load(w->gain, w->real, i);
    double dgain = 0.0;
    for (int64_t k = 0; k < w->groups; ++k) {
        for (int64_t s = 0; s < w->layout.stages; ++s) {
            const int64_t code = (i * w->groups + k) * w->layout.stages + s;
            double d = 0.0;
            for (int64_t e = 0; e < group_width(w, k); ++e)
                d += outer(dy, x, i, k * w->layout.group + e) * rbe_reference_code_element(w, i, k, s, e);
            dgain += rbe_reference_code_scale(w, i, k, s) * d;
            if (out->scale) rbe_reference_store(out->scale, w->real, code, gain * d);
            if (out->amplitude) {
                const double a = rbe_reference_load(w->amplitude, w->real, code);
                const uint32_t word = rbe_reference_word(w, i, k, s);
                rbe_reference_store(out->amplitude, w->real, code,
                                    rbe_reference_amplitude_gradient(w->layout.field, word, a, w->rounded, gain * d));
            }
        }
    }
    if (out->gain) rbe_reference_store(out->gain, w->real, i, dgain);
}

// One basis vector, elements e0 .. e0 + count: looks through all codes for those that use it, so that sums are float64 without a buffer.
static void backward_vector(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, void *dbasis, int64_t s, uint32_t idx,
                            int64_t e0, int64_t count) {
    double sum[BLOCK] = {0};
    for (int64_t i = 0; i < w->rows; ++i) {
        for (int64_t k = 0; k < w->groups; ++k) {
            const uint32_t word = rbe_reference_word(w, i, k, s);
            if (rbe_word_idx(word) != idx) continue;
            const double factor = rbe_reference_load(w->gain, w->real, i) * rbe_reference_code_scale(w, i, k, s);
            for (int64_t e = e0; e < smaller(e0 + count, group_width(w, k)); ++e) {
                const double sign = w->layout.field == RBE_FIELD_RBE16S && (word >> e & 1u) ? -1.0 : 1.0;
                sum[e - e0] += factor * sign * outer(dy, x, i, k * w->layout.group + e);
            }
        }
    }
    const int64_t first = (s * RBE_BASIS_VECTORS + idx) * w->layout.group + e0;
    for (int64_t e = 0; e < count; ++e) rbe_reference_store(dbasis, w->real, first + e, sum[e]);
}

void rbe_reference_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out) {
    if (out->dx) backward_x(w, dy, out->dx);
    for (int64_t i = 0; i < w->rows; ++i) {
        if (out->gain || out->scale || out->amplitude) backward_row(w, dy, x, out, i);
        if (out->bias) {
            double sum = 0.0;
            for (int64_t t = 0; t < dy->rows; ++t) sum += rbe_reference_at(dy, t, i);
            rbe_reference_store(out->bias, w->real, i, sum);
        }
    }
    for (int64_t s = 0; out->basis && s < w->layout.stages; ++s)
        for (uint32_t idx = 0; idx < RBE_BASIS_VECTORS; ++idx)
            for (int64_t e0 = 0; e0 < w->layout.group; e0 += BLOCK)
                backward_vector(w, dy, x, out->basis, s, idx, e0, smaller(BLOCK, w->layout.group - e0));
}
