// Nearest representable scale. All but rbe32: a sorted list of all their values, found through buckets of 2^-7 of a power of two. rbe32 has 16.7 million: its 8192 cells (curve, amp), each a
// monotone run of 1024 values, are bounded first and searched only where a nearer value can be.
#include "encode_scale.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { CELLS = RBE_CURVES * 256, LAST_FINE = 1023, COARSE = 2 * CELLS, EXP_COARSE = 2 * 256 };

enum { SEEDED = RBE_FIELD_COUNT - RBE_FIELD_RBE9R };  // layouts ending in r: the values of one curve, or some of them

enum { FINE_BITS = 7, LEAST = (127 - 8) << 23, MOST = (127 + 4) << 23, STEPS = (MOST - LEAST) >> (23 - FINE_BITS), BUCKETS = 2 * STEPS + 2 };

// Sorted values; those of bucket b are at start[b] .. start[b + 1].
typedef struct value_list {
    rbe_nearest *at;
    int count;
    uint16_t start[BUCKETS + 1];
} value_list;

static rbe_nearest coarse_values[COARSE], seeded_values[SEEDED][EXP_COARSE];
static value_list coarse, seeded[SEEDED];
static float cell_low[CELLS], cell_high[CELLS];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t cell_word(int cell) {
    const uint32_t curve = (uint32_t)cell / 256, amp = (uint32_t)cell % 256;
    return (curve >> 1) << RBE_SUB_SHIFT | (curve & 1) << RBE_DERIV_SHIFT | amp;
}

// FORMAT section 3, every operation rounded to float32
static float cell_value(int cell, int fine) {
    const float *t = &rbe_curve_table[cell / 256][cell % 256];
    const float step = t[1] - t[0], part = step * ((float)fine / 1024.0f);
    return t[0] + part;
}

static int by_value_then_word(const void *left, const void *right) {
    const rbe_nearest *a = left, *b = right;
    if (a->scale != b->scale) return a->scale < b->scale ? -1 : 1;
    return a->word < b->word ? -1 : a->word > b->word;
}

// Never falls as x rises: the sign, the exponent and FINE_BITS of the fraction, from 2^-8 to 2^4.
static int bucket_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const int size = (int)(bits & 0x7FFFFFFFu), kept = size < LEAST ? LEAST : size > MOST ? MOST : size, step = (kept - LEAST) >> (23 - FINE_BITS);
    return bits >> 31 ? STEPS - step : STEPS + 1 + step;
}

// Sorted, each value once with its lowest word.
static void sort_unique(value_list *list) {
    qsort(list->at, (size_t)list->count, sizeof *list->at, by_value_then_word);
    int kept = 0, bucket = 0;
    for (int i = 0; i < list->count; ++i)
        if (!kept || list->at[i].scale != list->at[kept - 1].scale) list->at[kept++] = list->at[i];
    list->count = kept;
    for (int i = 0; i < kept; ++i)
        while (bucket <= bucket_of(list->at[i].scale)) list->start[bucket++] = (uint16_t)i;
    while (bucket <= BUCKETS) list->start[bucket++] = (uint16_t)kept;
}

static void build(void) {
    coarse.at = coarse_values;
    for (int s = 0; s < SEEDED; ++s) seeded[s].at = seeded_values[s];
    for (int cell = 0; cell < CELLS; ++cell) {
        const float first = cell_value(cell, 0), last = cell_value(cell, LAST_FINE);
        cell_low[cell] = first < last ? first : last;
        cell_high[cell] = first < last ? last : first;
        for (uint32_t sign = 0; sign < 2; ++sign) {
            const rbe_nearest entry = {sign ? -first : first, cell_word(cell) | sign << RBE_SIGN_SHIFT};
            coarse.at[coarse.count++] = entry;
            for (int s = 0; s < SEEDED; ++s) {
                const rbe_field field = (rbe_field)(RBE_FIELD_RBE9R + s);
                const uint32_t constant = rbe_field_constant(field), fixed = ~rbe_field_mask(field) | constant;
                if (((entry.word ^ constant) & fixed) == 0) seeded[s].at[seeded[s].count++] = entry;
            }
        }
    }
    sort_unique(&coarse);
    for (int s = 0; s < SEEDED; ++s) sort_unique(&seeded[s]);
}

static void keep_nearer(rbe_nearest *best, double *distance, rbe_nearest candidate, double target) {
    const double d = fabs(candidate.scale - target);
    if (d < *distance || (d == *distance && candidate.word < best->word)) {
        *best = candidate;
        *distance = d;
    }
}

static rbe_nearest in_list(const value_list *list, double target) {
    const int bucket = bucket_of((float)target);
    int low = list->start[bucket];  // the first value that is not below the target: halving without a branch that guesses
    for (int length = list->start[bucket + 1] - low; length > 0;) {
        const int half = length / 2, step = list->at[low + half].scale < target ? length - half : 0;
        low += step;
        length = half;
    }
    rbe_nearest best = {0};
    double distance = INFINITY;
    if (low > 0) keep_nearer(&best, &distance, list->at[low - 1], target);
    if (low < list->count) keep_nearer(&best, &distance, list->at[low], target);
    return best;
}

// The first fine whose value, in the direction of the run, is not before `target`; 1024 if none.
static int first_not_before(int cell, bool rising, double target) {
    int low = 0, high = LAST_FINE + 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        const double value = cell_value(cell, middle);
        if (rising ? value < target : value > target) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void search_cell(int cell, uint32_t sign, double target, rbe_nearest *best, double *distance) {
    const bool rising = cell_value(cell, 0) <= cell_value(cell, LAST_FINE);
    const double aim = sign ? -target : target;
    int fine[2] = {first_not_before(cell, rising, aim), -1};
    if (fine[0] > 0) fine[1] = first_not_before(cell, rising, cell_value(cell, fine[0] - 1));  // lowest of its plateau
    for (int i = 0; i < 2; ++i) {
        if (fine[i] < 0 || fine[i] > LAST_FINE) continue;
        const float value = cell_value(cell, fine[i]);
        const uint32_t word = cell_word(cell) | sign << RBE_SIGN_SHIFT | (uint32_t)fine[i] << RBE_FINE_SHIFT;
        keep_nearer(best, distance, (rbe_nearest){sign ? -value : value, word}, target);
    }
}

static rbe_nearest in_cells(double target) {
    rbe_nearest best = in_list(&coarse, target);
    double distance = fabs(best.scale - target);
    for (uint32_t sign = 0; sign < 2; ++sign) {
        const double aim = sign ? -target : target;
        for (int cell = 0; cell < CELLS; ++cell) {
            // outside the cell the nearest value is one of its ends
            if (cell_low[cell] - aim <= distance && aim - cell_high[cell] <= distance) search_cell(cell, sign, target, &best, &distance);
        }
    }
    return best;
}

rbe_nearest rbe_nearest_scale(rbe_field field, double target) {
    pthread_once(&once, build);
    if (field == RBE_FIELD_RBE32) return in_cells(target);
    const int s = (int)field - RBE_FIELD_RBE9R;
    return s >= 0 ? in_list(&seeded[s], target) : in_list(&coarse, target);
}
