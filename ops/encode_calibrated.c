// rbe_encode_calibrated: codes Q of W that make tr(E H E^T) small, E = W - Q: what the layer's outputs lose on the inputs that H was gathered from.
//
// Feedback. With H = V V^T, V upper triangular, the loss of a row e is sum over groups k of |e_k V_kk + c_k|^2, c_k = sum over i < k of e_i V_ik.
// Groups are chosen from left to right, so c_k is known and group k minimises |(w_k V_kk + c_k) - q_k V_kk|^2 (GPTQ; LDLQ of QuIP), which is the
// search of rbe_encode with every basis vector turned by V_kk.
// Sweeps. Given all other groups, e_k minimises e_k H_kk e_k^T + 2 e_k l, l = (e H)_k - e_k H_kk; with H_kk = U U^T that is
// |(w_k U + l U^-T) - q_k U|^2: the same search again. A group keeps its codes unless the loss falls.
// A block of rows goes through the groups together, so that a turned basis and g rows of H serve all of them.
#include "dispatch.h"
#include "encode.h"

enum { BLOCK = 64 };

typedef struct job {
    const rbe_weight *w;
    const rbe_matrix *dense;
    const rbe_calibration *c;
    const rbe_kernels *kernels;
    int32_t *words;
    atomic_bool failed, indefinite;
} job;

// Of one thread.
typedef struct worker {
    job *j;
    rbe_encoder encoder;   // of the turned basis
    double *basis;         // as it is, element-major [M, g, 256]
    double *factor, *v;    // of the group at hand: F [depth, depth], target [g]
    float *buffer, *step;  // step [BLOCK, g]: changes of the errors of a group
    float *moved[BLOCK];   // rows of `pull` that they concern
    float *error, *pull;   // [BLOCK, n]: E, and c or E H
} worker;

// q = gain * sum of vectors of a group's words
static void reconstruct(const rbe_weight *w, double gain, const int32_t *words, int64_t depth, double *q) {
    for (int64_t e = 0; e < depth; ++e) q[e] = 0;
    for (int64_t s = 0; s < w->layout.stages; ++s) {
        const uint32_t word = (uint32_t)words[s];
        const double scale = gain * rbe_reference_scale(w->layout.field, word);
        for (int64_t e = 0; e < depth; ++e) {
            const double b = rbe_real_at(w->basis, w->real, (s * RBE_BASIS_VECTORS + rbe_word_idx(word)) * w->layout.group + e);
            q[e] += scale * (w->layout.field == RBE_FIELD_RBE16S && (word >> e & 1) ? -b : b);
        }
    }
}

static double weight_at(const job *j, int64_t i, int64_t col) {
    return rbe_real_at(j->dense->data, j->dense->dtype, i * j->dense->row_stride + col * j->dense->col_stride);
}

// factor := U, U U^T = matrix's diagonal block of group k; false where that is not positive definite.
static bool factor_block(const float *matrix, int64_t n, int64_t first, int64_t depth, double *u) {
    for (int64_t j = depth - 1; j >= 0; --j) {
        double square = matrix[(first + j) * n + first + j];
        for (int64_t k = j + 1; k < depth; ++k) square -= u[j * depth + k] * u[j * depth + k];
        if (!(square > 0)) return false;
        u[j * depth + j] = sqrt(square);
        for (int64_t i = 0; i < j; ++i) {
            double value = matrix[(first + i) * n + first + j];
            for (int64_t k = j + 1; k < depth; ++k) value -= u[i * depth + k] * u[j * depth + k];
            u[i * depth + j] = value / u[j * depth + j];
            u[j * depth + i] = 0;
        }
    }
    return true;
}

// out = the vectors times F, zero beyond the columns that exist; rounded to float32.
HOT static void turn(int64_t g, int64_t depth, const double *factor, const double *basis, double *out) {
    double sum[RBE_BASIS_VECTORS];
    for (int64_t e = 0; e < g; ++e) {
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) sum[j] = 0;
        for (int64_t i = 0; i <= e && e < depth; ++i) {
            const double f = factor[i * depth + e], *column = basis + i * RBE_BASIS_VECTORS;
            for (int j = 0; j < RBE_BASIS_VECTORS; ++j) sum[j] += column[j] * f;
        }
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) out[e * RBE_BASIS_VECTORS + j] = (float)sum[j];
    }
}

static void turn_basis(worker *t, int64_t depth) {
    const int64_t g = t->j->w->layout.group;
    for (int64_t s = 0; s < t->j->w->layout.stages; ++s)
        turn(g, depth, t->factor, t->basis + s * g * RBE_BASIS_VECTORS, t->encoder.columns + s * g * RBE_BASIS_VECTORS);
    rbe_encoder_fill(&t->encoder);
}

// The codes of group k of row i whose turned target is t->v.
static void search(worker *t, int64_t i, int64_t k, int64_t depth, double gain, int32_t *words) {
    const rbe_weight *w = t->j->w;
    const int64_t stages = w->layout.stages;
    int only[RBE_ENCODE_STAGES];
    for (int64_t s = 0; s < stages; ++s) {
        only[s] = -1;
        if (rbe_field_seeded(w->layout.field))
            only[s] = (int)rbe_seeded_idx(w->seed, (uint64_t)(w->row0 + i), (uint64_t)k, (uint64_t)s, (uint64_t)w->groups_total, (uint64_t)stages);
    }
    if (w->layout.field == RBE_FIELD_RBE16S) {
        for (int64_t e = 0; e < depth; ++e) t->v[e] /= gain;
        rbe_encode_signs(w, depth, t->factor, t->basis, t->v, words);
        return;
    }
    for (int64_t e = 0; e < depth; ++e) t->v[e] = t->v[e] / gain * t->encoder.unit;
    rbe_encode_group(&t->encoder, 1, depth, t->v, &t->encoder.whole, only, t->buffer, &words);
}

static void feed_back(worker *t, int64_t begin, int64_t rows) {
    const rbe_weight *w = t->j->w;
    const int64_t g = w->layout.group, n = w->cols, stages = w->layout.stages;
    const float *V = t->j->c->factor;
    double q[RBE_ENCODE_DEPTH];
    for (int64_t r = 0; r < rows * n; ++r) t->pull[r] = 0;
    for (int64_t k = 0, first = 0; k < w->groups; ++k, first += g) {
        const int64_t depth = rbe_min(g, n - first);
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t e = 0; e < depth; ++e) t->factor[i * depth + e] = e < i ? 0 : V[(first + i) * n + first + e];
        turn_basis(t, depth);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = begin + r;
            const double gain = rbe_real_at(w->gain, w->real, row);
            int32_t *words = t->j->words + (row * w->groups + k) * stages;
            for (int64_t e = 0; e < depth; ++e) {
                double sum = t->pull[r * n + first + e];
                for (int64_t i = 0; i <= e; ++i) sum += weight_at(t->j, row, first + i) * t->factor[i * depth + e];
                t->v[e] = sum;
            }
            search(t, row, k, depth, gain, words);
            reconstruct(w, gain, words, depth, q);
            float *error = t->error + r * n + first;
            for (int64_t e = 0; e < depth; ++e) t->step[r * depth + e] = error[e] = (float)(weight_at(t->j, row, first + e) - q[e]);
            t->moved[r] = t->pull + r * n + first + depth;
        }
        t->j->kernels->add_rows(rows, depth, t->step, V + first * n + first + depth, n, n - first - depth, t->moved);
    }
}

// e H_kk e^T + 2 e l
static double loss_of(const float *H, int64_t n, int64_t first, int64_t depth, const double *e, const double *l) {
    double sum = 0;
    for (int64_t i = 0; i < depth; ++i) {
        double along = 2 * l[i];
        for (int64_t j = 0; j < depth; ++j) along += e[j] * H[(first + j) * n + first + i];
        sum += e[i] * along;
    }
    return sum;
}

static bool sweep(worker *t, int64_t begin, int64_t rows) {
    const rbe_weight *w = t->j->w;
    const int64_t g = w->layout.group, n = w->cols, stages = w->layout.stages;
    const float *H = t->j->c->hessian;
    double q[RBE_ENCODE_DEPTH], l[RBE_ENCODE_DEPTH], now[RBE_ENCODE_DEPTH], then[RBE_ENCODE_DEPTH];
    for (int64_t k = 0, first = 0; k < w->groups; ++k, first += g) {
        const int64_t depth = rbe_min(g, n - first);
        if (!factor_block(H, n, first, depth, t->factor)) return false;
        turn_basis(t, depth);
        int64_t moved = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = begin + r;
            const double gain = rbe_real_at(w->gain, w->real, row);
            float *error = t->error + r * n + first;
            int32_t *words = t->j->words + (row * w->groups + k) * stages, tried[RBE_ENCODE_STAGES];
            for (int64_t e = 0; e < depth; ++e) {
                now[e] = error[e];
                l[e] = t->pull[r * n + first + e];
                for (int64_t i = 0; i < depth; ++i) l[e] -= (double)error[i] * H[(first + i) * n + first + e];
            }
            for (int64_t j = depth - 1; j >= 0; --j) {  // v U^T = l
                double left = l[j];
                for (int64_t i = j + 1; i < depth; ++i) left -= t->v[i] * t->factor[j * depth + i];
                t->v[j] = left / t->factor[j * depth + j];
            }
            for (int64_t e = 0; e < depth; ++e)
                for (int64_t i = 0; i <= e; ++i) t->v[e] += weight_at(t->j, row, first + i) * t->factor[i * depth + e];
            search(t, row, k, depth, gain, tried);
            reconstruct(w, gain, tried, depth, q);
            for (int64_t e = 0; e < depth; ++e) then[e] = weight_at(t->j, row, first + e) - q[e];
            if (!(loss_of(H, n, first, depth, then, l) < loss_of(H, n, first, depth, now, l))) continue;
            for (int64_t s = 0; s < stages; ++s) words[s] = tried[s];
            for (int64_t e = 0; e < depth; ++e) {
                t->step[moved * depth + e] = (float)(then[e] - error[e]);
                error[e] = (float)then[e];
            }
            t->moved[moved++] = t->pull + r * n;
        }
        t->j->kernels->add_rows(moved, depth, t->step, H + first * n, n, n, t->moved);
    }
    return true;
}

static void encode_block(worker *t, int64_t begin, int64_t rows) {
    const rbe_weight *w = t->j->w;
    const int64_t g = w->layout.group, n = w->cols;
    double q[RBE_ENCODE_DEPTH];
    if (t->j->c->factor) {
        feed_back(t, begin, rows);
    } else {
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t k = 0; k < w->groups; ++k) {
                const int64_t depth = rbe_min(g, n - k * g);
                reconstruct(w, rbe_real_at(w->gain, w->real, begin + r), t->j->words + ((begin + r) * w->groups + k) * w->layout.stages, depth, q);
                for (int64_t e = 0; e < depth; ++e) t->error[r * n + k * g + e] = (float)(weight_at(t->j, begin + r, k * g + e) - q[e]);
            }
        }
    }
    if (t->j->c->sweeps < 1) return;
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < n; ++i) t->pull[r * n + i] = 0;
        t->moved[r] = t->pull + r * n;
    }
    t->j->kernels->add_rows(rows, n, t->error, t->j->c->hessian, n, n, t->moved);
    for (int round = 0; round < t->j->c->sweeps; ++round) {
        if (!sweep(t, begin, rows)) {
            atomic_store(&t->j->indefinite, true);
            return;
        }
    }
}

static void encode_rows(int64_t begin, int64_t end, void *context) {
    job *j = context;
    const rbe_weight *w = j->w;
    const int64_t g = w->layout.group, n = w->cols, block = rbe_min(BLOCK, end - begin);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    worker t = {.j = j, .encoder = {.w = w, .kernels = j->kernels}};
    t.basis = rbe_scratch_take((int64_t)w->layout.stages * RBE_BASIS_VECTORS * g, sizeof *t.basis);
    t.factor = rbe_scratch_take(g * g, sizeof *t.factor);
    t.v = rbe_scratch_take(g, sizeof *t.v);
    t.step = rbe_scratch_take(block * g, sizeof *t.step);
    t.buffer = rbe_scratch_take(RBE_ENCODE_BUFFER * g, sizeof *t.buffer);
    t.error = rbe_scratch_take(block * n, sizeof *t.error);
    t.pull = rbe_scratch_take(block * n, sizeof *t.pull);
    const bool whole = t.basis && t.factor && t.v && t.step && t.buffer && t.error && t.pull && rbe_encoder_take(&t.encoder);
    if (!whole) atomic_store(&j->failed, true);
    else rbe_encoder_columns(w, t.basis);
    for (int64_t row = begin; whole && row < end; row += BLOCK) encode_block(&t, row, rbe_min(BLOCK, end - row));
    rbe_scratch_end(mark);
}

rbe_status rbe_check_calibration_shape(const rbe_weight *w, const rbe_calibration *c, rbe_error *err) {
    if (!c || !c->hessian) return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian: is NULL; must not be");
    if (w->layout.group > RBE_ENCODE_DEPTH)
        return rbe_fail(err, RBE_BAD_ARGUMENT, "layout: has groups of %d; calibrated encoding takes at most %d", (int)w->layout.group, RBE_ENCODE_DEPTH);
    if (w->k0 != 0 || w->groups != w->groups_total) return rbe_fail(err, RBE_BAD_ARGUMENT, "k0: was %lld; must be 0, with whole rows", (long long)w->k0);
    if (c->sweeps < 0) return rbe_fail(err, RBE_BAD_ARGUMENT, "sweeps: was %d; must be 0 or more", c->sweeps);
    return RBE_OK;
}

static rbe_status check(const rbe_weight *w, const rbe_calibration *c, rbe_error *err) {
    const int64_t n = w->cols;
    const rbe_status status = rbe_check_calibration_shape(w, c, err);
    if (status != RBE_OK) return status;
    for (int64_t i = 0; i < w->rows; ++i)
        if (!(rbe_real_at(w->gain, w->real, i) > 0)) return rbe_fail(err, RBE_BAD_ARGUMENT, "gain: row %lld is not positive; must be", (long long)i);
    for (int64_t i = 0; i < n * n; ++i)
        if (!isfinite(c->hessian[i]) || (c->factor && !isfinite(c->factor[i])))
            return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian or factor: element [%lld, %lld] is not finite; must be", (long long)(i / n), (long long)(i % n));
    for (int64_t i = 0; i < n; ++i)
        if (!(c->hessian[i * n + i] > 0) || (c->factor && !(c->factor[i * n + i] > 0)))
            return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian or factor: diagonal element %lld is not positive; must be", (long long)i);
    return RBE_OK;
}

rbe_status rbe_encode_calibrated(const rbe_weight *w, const rbe_matrix *dense, const rbe_calibration *calibration, int32_t *words,
                                 const rbe_parallel *threads, rbe_error *err) {
    rbe_status status = rbe_check_encoding(w, dense, words, err);
    if (status == RBE_OK) status = check(w, calibration, err);
    if (status != RBE_OK) return status;
    job j = {.w = w, .dense = dense, .c = calibration, .words = words};
    status = rbe_choose_kernels(&j.kernels, err);
    if (status != RBE_OK) return status;
    rbe_run(threads, w->rows, rbe_share(threads, w->rows, 1), encode_rows, &j);
    if (atomic_load(&j.failed)) return rbe_out_of_memory(err);
    if (atomic_load(&j.indefinite)) return rbe_fail(err, RBE_BAD_ARGUMENT, "hessian: is not positive definite; must be (damp it)");
    return RBE_OK;
}
