// The rows of a weight sorted by code, once a call of a backward by tables, so that P[j] and dP[j] stay in registers while the rows of a code pass.
#include <math.h>
#include <string.h>

#include "product.h"

typedef struct sorting {
    const rbe_kernels *kernels;
    const rbe_weight *w;
    rbe_codes codes;
    const rbe_sorted *out;
    float factor;     // of gain in a float16 factor
    float *d;         // where unsort puts D
} sorting;

enum { SORTED = RBE_SORTED_TOGETHER };

static void sort_codes(int64_t begin, int64_t end, void *context) {
    const sorting *s = context;
    const rbe_weight *w = s->w;
    const float *gain = w->gain;
    const int64_t m = w->rows, codes = rbe_codes_a_row(w);
    int32_t next[SORTED][RBE_BASIS_VECTORS];
    for (int64_t q0 = begin * SORTED; q0 < rbe_min(end * SORTED, codes); q0 += SORTED) {
        const int64_t some = rbe_min(SORTED, codes - q0), at = q0 / SORTED * s->codes.step, stride = s->codes.row;
        memset(next, 0, sizeof next);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t q = 0; q < some; ++q) ++next[q][s->codes.idx[at + i * stride + q]];
        for (int64_t q = 0; q < some; ++q) {
            int32_t *start = s->out->start + (q0 + q) * (RBE_BASIS_VECTORS + 1), sum = 0;
            for (int j = 0; j < RBE_BASIS_VECTORS; ++j) {
                start[j] = sum;
                sum += next[q][j];
                next[q][j] = start[j];
            }
            start[RBE_BASIS_VECTORS] = sum;
        }
        for (int64_t i = 0; i < m; ++i) {
            const uint8_t *idx = s->codes.idx + at + i * stride;
            const float *scale = s->codes.scale ? s->codes.scale + at + i * stride : NULL, each = gain[i] * s->factor;
            uint16_t half[SORTED] = {0};
            if (s->out->half) {
                float factor[SORTED];
                for (int64_t q = 0; q < some; ++q) factor[q] = scale ? each * scale[q] : each;
                s->kernels->f32_to_f16(factor, some, half);
            }
            for (int64_t q = 0; q < some; ++q) {
                const int64_t place = (q0 + q) * m + next[q][idx[q]]++;
                s->out->row[place] = (int32_t)i;
                if (s->out->half)
                    s->out->half[place] = half[q];
                else
                    s->out->factor[place] = scale ? each * scale[q] : each;
            }
        }
    }
}

rbe_status rbe_sort_codes(const rbe_kernels *kernels, const rbe_weight *w, bool half, const rbe_parallel *threads, rbe_sorted *out, rbe_error *err) {
    const int64_t codes = rbe_codes_a_row(w), places = codes * w->rows, blocks = (codes + SORTED - 1) / SORTED;
    *out = (rbe_sorted){.unit = 0};
    out->start = rbe_scratch_take(codes * (RBE_BASIS_VECTORS + 1), sizeof *out->start);
    out->row = rbe_scratch_take(places + RBE_PLACES_AHEAD, sizeof *out->row);
    if (half)
        out->half = rbe_scratch_take(places, sizeof *out->half);
    else
        out->factor = rbe_scratch_take(places, sizeof *out->factor);
    out->d = rbe_scratch_take(places, sizeof *out->d);
    if (!out->start || !out->row || !(half ? (void *)out->half : (void *)out->factor) || !out->d) return rbe_out_of_memory(err);
    const rbe_scratch_mark mark = rbe_scratch_begin();
    sorting s = {.kernels = kernels, .w = w, .out = out, .factor = 1.0f};
    if (half) {
        float most = 0.0f;
        for (int64_t i = 0; i < w->rows; ++i) most = fmaxf(most, fabsf(((const float *)w->gain)[i]));
        frexpf(most, &out->unit);  // 0 for 0
        out->unit = out->unit > RBE_HALF_RANGE ? RBE_HALF_RANGE : out->unit < -RBE_HALF_RANGE ? -RBE_HALF_RANGE : out->unit;
        s.factor = ldexpf(1.0f, -out->unit);
    }
    const rbe_status status = rbe_unpack_codes(kernels, w, SORTED, false, threads, &s.codes, err);
    if (status == RBE_OK) rbe_run(threads, blocks, 1, sort_codes, &s);
    rbe_scratch_end(mark);
    memset(out->d, 0, (size_t)places * sizeof *out->d);
    memset(out->row + places, 0, RBE_PLACES_AHEAD * sizeof *out->row);
    return status;
}

// A line of the result at a time.
static void unsort(int64_t begin, int64_t end, void *context) {
    const sorting *s = context;
    const int64_t m = s->w->rows, codes = rbe_codes_a_row(s->w);
    for (int64_t q = begin * SORTED; q < rbe_min(end * SORTED, codes); ++q)
        for (int64_t p = q * m; p < (q + 1) * m; ++p) s->d[s->out->row[p] * codes + q] = s->out->d[p];
}

void rbe_unsort(const rbe_weight *w, const rbe_sorted *sorted, const rbe_parallel *threads, float *d) {
    sorting s = {.w = w, .out = sorted, .d = d};
    rbe_run(threads, (rbe_codes_a_row(w) + SORTED - 1) / SORTED, 1, unsort, &s);
}
