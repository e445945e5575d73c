// The rows of a weight sorted by code, once a call of a backward by tables, so that P[j] and dP[j] stay in registers while the rows of a code pass.
#include <math.h>
#include <string.h>

#include "product.h"

typedef struct sorting {
    const rbe_kernels *kernels;
    const rbe_weight *w;
    rbe_codes codes;
    const rbe_sorted *out;
    float unit;  // of gain in a float16 factor
    float *d;    // where unsort puts D
    atomic_bool *failed;
} sorting;

enum { SORTED = RBE_SORTED_TOGETHER, STRIP = 32 };  // rows whose factors are made together

// start[q][j], and in next[q][j] where the first place of code j goes.
static void count_codes(const sorting *s, int64_t q0, int64_t some, const uint8_t *idx, int32_t next[SORTED][RBE_BASIS_VECTORS]) {
    memset(next, 0, SORTED * sizeof *next);
    for (int64_t i = 0; i < s->w->rows; ++i)
        for (int64_t q = 0; q < some; ++q) ++next[q][idx[i * s->codes.row + q]];
    for (int64_t q = 0; q < some; ++q) {
        int32_t *start = s->out->start + (q0 + q) * (RBE_BASIS_VECTORS + 1), sum = 0;
        for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
            start[j] = sum;
            sum += next[q][j];
            next[q][j] = start[j];
        }
        start[RBE_BASIS_VECTORS] = sum;
    }
}

// gain * scale of all rows, [m][some], in float32 or float16.
static void make_factors(const sorting *s, int64_t at, int64_t some, float *factor, uint16_t *half) {
    const float *gain = s->w->gain;
    float strip[STRIP * SORTED];
    for (int64_t i0 = 0; i0 < s->w->rows; i0 += STRIP) {
        const int64_t rows = rbe_min(STRIP, s->w->rows - i0);
        float *out = half ? strip : factor + i0 * some;
        for (int64_t i = 0; i < rows; ++i) {
            const float *scale = s->codes.scale ? s->codes.scale + at + (i0 + i) * s->codes.row : NULL, each = gain[i0 + i] * s->unit;
            for (int64_t q = 0; q < some; ++q) out[i * some + q] = scale ? each * scale[q] : each;
        }
        if (half) s->kernels->f32_to_f16(strip, rows * some, half + i0 * some);
    }
}

// Code after code, so that L1 holds its places.
static void sort_codes(int64_t begin, int64_t end, void *context) {
    const sorting *s = context;
    const int64_t m = s->w->rows, codes = rbe_codes_a_row(s->w);
    int32_t next[SORTED][RBE_BASIS_VECTORS];
    const rbe_scratch_mark mark = rbe_scratch_begin();
    void *factors = rbe_scratch_take(SORTED * m, s->out->half ? sizeof(uint16_t) : sizeof(float));
    float *factor = s->out->half ? NULL : factors;
    uint16_t *half = s->out->half ? factors : NULL;
    if (!factors) atomic_store(s->failed, true);
    for (int64_t q0 = begin * SORTED; factors && q0 < rbe_min(end * SORTED, codes); q0 += SORTED) {
        const int64_t some = rbe_min(SORTED, codes - q0), at = q0 / SORTED * s->codes.step;
        count_codes(s, q0, some, s->codes.idx + at, next);
        make_factors(s, at, some, factor, half);
        for (int64_t q = 0; q < some; ++q) {
            const uint8_t *idx = s->codes.idx + at + q;
            for (int64_t i = 0; i < m; ++i) {
                const int64_t place = (q0 + q) * m + next[q][idx[i * s->codes.row]]++;
                if (half) {
                    s->out->half[place] = (uint32_t)i | (uint32_t)half[i * some + q] << 16;
                    continue;
                }
                s->out->row[place] = (int32_t)i;
                s->out->factor[place] = factor[i * some + q];
            }
        }
    }
    rbe_scratch_end(mark);
}

rbe_status rbe_sort_codes(const rbe_kernels *kernels, const rbe_weight *w, bool half, const rbe_parallel *threads, rbe_sorted *out, rbe_error *err) {
    atomic_bool failed = false;
    const int64_t codes = rbe_codes_a_row(w), places = codes * w->rows, blocks = (codes + SORTED - 1) / SORTED;
    *out = (rbe_sorted){.unit = 0};
    out->start = rbe_scratch_take(codes * (RBE_BASIS_VECTORS + 1), sizeof *out->start);
    uint32_t *rows = rbe_scratch_take(places + RBE_PLACES_AHEAD, sizeof *rows);  // or with their factors
    out->d = rbe_scratch_take(places, sizeof *out->d);
    if (half)
        out->half = rows;
    else
        out->factor = rbe_scratch_take(places, sizeof *out->factor);
    if (!out->start || !rows || !(half || out->factor) || !out->d) return rbe_out_of_memory(err);
    if (!half) out->row = (int32_t *)rows;
    memset(rows + places, 0, RBE_PLACES_AHEAD * sizeof *rows);
    if (!half) memset(out->d, 0, (size_t)places * sizeof *out->d);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    sorting s = {.kernels = kernels, .w = w, .out = out, .unit = 1.0f, .failed = &failed};
    if (half) {
        float most = 0.0f;
        for (int64_t i = 0; i < w->rows; ++i) most = fmaxf(most, fabsf(((const float *)w->gain)[i]));
        out->unit = -rbe_half_power(most, 0, 0);
        s.unit = ldexpf(1.0f, -out->unit);
    }
    rbe_status status = rbe_unpack_codes(kernels, w, SORTED, false, threads, &s.codes, err);
    if (status == RBE_OK) rbe_run(threads, blocks, 1, sort_codes, &s);
    if (status == RBE_OK && atomic_load(&failed)) status = rbe_out_of_memory(err);
    rbe_scratch_end(mark);
    return status;
}

// Code after code into columns that L1 holds, then the columns of a line of the result turned together.
static void unsort(int64_t begin, int64_t end, void *context) {
    const sorting *s = context;
    const int64_t m = s->w->rows, codes = rbe_codes_a_row(s->w);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    float *columns = rbe_scratch_take(SORTED * m, sizeof *columns);
    if (!columns) atomic_store(s->failed, true);
    for (int64_t q0 = begin * SORTED; columns && q0 < rbe_min(end * SORTED, codes); q0 += SORTED) {
        const int64_t some = rbe_min(SORTED, codes - q0);
        for (int64_t q = 0; q < some; ++q)
            for (int64_t p = (q0 + q) * m; p < (q0 + q + 1) * m; ++p)
                columns[q * m + (s->out->half ? (int32_t)(s->out->half[p] & 0xFFFF) : s->out->row[p])] = s->out->d[p];
        s->kernels->transpose(columns, m, some, m, s->d + q0, codes, some);
    }
    rbe_scratch_end(mark);
}

void rbe_unsort(rbe_backward_job *backward, const rbe_sorted *sorted) {
    rbe_job *job = &backward->job;
    sorting s = {.kernels = job->kernels, .w = job->w, .out = sorted, .d = backward->d, .failed = &job->failed};
    rbe_run(job->threads, (rbe_codes_a_row(job->w) + SORTED - 1) / SORTED, 1, unsort, &s);
}
