// The searches for the codes of one group by one warp: ops/encode_stage.c (one stage), ops/encode_stages.c (a beam) and ops/encode_signs.c
// (signs under a metric; encode_signs.cuh). A lane has the eight vectors lane, lane + 32, ...; float operations have the order of the C
// code, so the words are the same.
#pragma once

#include "codes.cuh"
#include "encode.h"

constexpr int CU_BEAM = 8, CU_STAGES = 16, CU_ROUNDS = 4, CU_EACH = RBE_BASIS_VECTORS / 32;
constexpr unsigned CU_WARP = 0xFFFFFFFFu;

CU_DEVICE double cu_real_at(const void *data, rbe_dtype real, int64_t at) {
    return real == RBE_F64 ? ((const double *)data)[at] : (double)((const float *)data)[at];
}
// Element e of basis vector j, in units of the table.
CU_DEVICE double cu_element(const rbe_cu_search &s, int64_t table, int64_t stage, int64_t j, int64_t e) {
    const int64_t vector = (table * s.codes.stages + stage) * RBE_BASIS_VECTORS + j;
    return s.unit[table] * cu_real_at(s.vectors, s.codes.real, vector * s.codes.group + e);
}

// The idx of code q of row i where a seed gives it, else -1.
CU_DEVICE int cu_only(const rbe_cu_codes &c, int64_t i, int64_t q) {
    return c.seeded ? (int)cu_seeded_idx(c.seed, c.first + (uint32_t)i * c.row_step + (uint32_t)q) : -1;
}

// Memory of one warp, shared where it fits: v, l, e [g] double; step [g], paths [2 BEAM + 1, g + 1] float; words [2, BEAM, STAGES], from.
struct cu_desk {
    double *v, *l, *e;
    float *step, *paths;
    uint32_t *words;
    int *from;
};
static inline __host__ __device__ size_t cu_desk_bytes(int group, bool several, bool calibrated) {
    const size_t g = (size_t)group;
    const size_t bytes = (calibrated ? 3 * g * 8 + g * 4 : g * 8) + (several ? (2 * CU_BEAM + 1) * (g + 1) * 4 : 0) +
                         (2 * CU_BEAM * CU_STAGES + CU_BEAM) * 4;
    return (bytes + 15) / 16 * 16;
}
// How many of `most` desks fit into a block's shared memory beside 4 KiB of its own; 0: none does, so they lie in memory.
static inline int cu_desks_fitting(size_t bytes, int most) {
    const size_t fit = (cu_shared_limit() - 4096) / bytes;
    return fit < (size_t)most ? (int)fit : most;
}
CU_DEVICE cu_desk cu_desk_at(char *base, int group, bool several, bool calibrated) {
    cu_desk d;
    d.v = (double *)base;
    d.l = d.v + (calibrated ? group : 0);
    d.e = d.l + (calibrated ? group : 0);
    d.step = (float *)(d.v + (calibrated ? 3 : 1) * group);
    d.paths = d.step + (calibrated ? group : 0);
    d.words = (uint32_t *)(d.paths + (several ? (2 * CU_BEAM + 1) * (group + 1) : 0));
    d.from = (int *)(d.words + 2 * CU_BEAM * CU_STAGES);
    return d;
}

// ---- the smallest of a warp ----
template <class T>
struct cu_least {
    T value;
    int at;
};
// Of equal values the lowest place; the same in every lane.
template <class T>
CU_DEVICE cu_least<T> cu_warp_least(cu_least<T> mine) {
    CU_UNROLL
    for (int step = 16; step; step >>= 1) {
        const T value = __shfl_xor_sync(CU_WARP, mine.value, step);
        const int at = __shfl_xor_sync(CU_WARP, mine.at, step);
        const bool better = value < mine.value || (value == mine.value && at < mine.at);
        mine.value = better ? value : mine.value;
        mine.at = better ? at : mine.at;
    }
    mine.value = __shfl_sync(CU_WARP, mine.value, 0);  // numbers that are not could leave lanes apart
    mine.at = __shfl_sync(CU_WARP, mine.at, 0);
    return mine;
}
// Of 256 numbers, eight a lane.
template <class T>
CU_DEVICE cu_least<T> cu_least_of(const T *each) {
    cu_least<T> mine = {each[0], (int)threadIdx.x & 31};
    CU_UNROLL
    for (int u = 1; u < CU_EACH; ++u) {
        if (each[u] < mine.value) {
            mine.value = each[u];
            mine.at = ((int)threadIdx.x & 31) + 32 * u;
        }
    }
    return cu_warp_least(mine);
}
// Number j of 256. By halves: a choice of one in eight would be made by an index, which puts the numbers into memory.
template <class T>
CU_DEVICE T cu_pick(const T *each, int j) {
    const bool odd = j >> 5 & 1, second = j >> 6 & 1, upper = j >> 7 & 1;
    const T a = odd ? each[1] : each[0], b = odd ? each[3] : each[2], c = odd ? each[5] : each[4], d = odd ? each[7] : each[6];
    const T low = second ? b : a, high = second ? d : c;
    return __shfl_sync(CU_WARP, upper ? high : low, j & 31);
}

// The `most` smallest numbers seen, rising, number p in lane p; of equal ones those that came first.
template <class T>
struct cu_kept {
    T value;
    int tag, count;
};
template <class T>
CU_DEVICE void cu_keep(cu_kept<T> *k, int most, T value, int tag) {
    const int lane = (int)threadIdx.x & 31;
    const int at = __popc(__ballot_sync(CU_WARP, lane < k->count && !(value < k->value)));
    const T above = __shfl_up_sync(CU_WARP, k->value, 1);
    const int tag_above = __shfl_up_sync(CU_WARP, k->tag, 1);
    if (lane >= at) {
        k->value = lane == at ? value : above;
        k->tag = lane == at ? tag : tag_above;
    }
    k->count = k->count < most ? k->count + 1 : most;
}
// Offers base + number of 32 neighbours, in order.
template <class T>
CU_DEVICE void cu_keep_row(cu_kept<T> *k, int most, T mine, int first_tag) {
    unsigned left = CU_WARP;
    while (left) {
        const T last = __shfl_sync(CU_WARP, k->value, most - 1);
        const unsigned enter = __ballot_sync(CU_WARP, k->count < most || mine < last) & left;
        if (!enter) return;
        const int lane = __ffs((int)enter) - 1;
        left = CU_WARP << lane << 1;
        cu_keep(k, most, __shfl_sync(CU_WARP, mine, lane), first_tag + lane);
    }
}

// ---- the nearest scale (ops/encode_scale.c) ----
struct cu_nearest {
    double scale;
    uint32_t word;
};
struct cu_best {
    cu_nearest at;
    double distance;
};
CU_DEVICE void cu_keep_nearer(cu_best *best, double scale, uint32_t word, double target) {
    const double d = fabs(scale - target);
    if (d < best->distance || (d == best->distance && word < best->at.word)) {
        best->at.scale = scale;
        best->at.word = word;
        best->distance = d;
    }
}
CU_DEVICE cu_best cu_in_list(const rbe_cu_scales &l, double target) {
    int low = 0, high = l.count;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (l.value[middle] < target) low = middle + 1;
        else high = middle;
    }
    cu_best best = {{0, 0}, INFINITY};
    if (low > 0) cu_keep_nearer(&best, l.value[low - 1], l.word[low - 1], target);
    if (low < l.count) cu_keep_nearer(&best, l.value[low], l.word[low], target);
    return best;
}
CU_DEVICE uint32_t cu_cell_word(int cell, uint32_t sign) {
    const uint32_t curve = (uint32_t)cell >> 8;
    return (curve >> 1) << RBE_SUB_SHIFT | (curve & 1u) << RBE_DERIV_SHIFT | sign << RBE_SIGN_SHIFT | ((uint32_t)cell & 255u);
}
CU_DEVICE float cu_cell_value(int cell, int fine) { return cu_word_scale(cu_cell_word(cell, 0) | (uint32_t)fine << RBE_FINE_SHIFT); }

// The first fine whose value, in the direction of the run, is not before `target`; 1024 if none.
CU_DEVICE int cu_first_not_before(int cell, bool rising, double target) {
    int low = 0, high = 1024;
    while (low < high) {
        const int middle = (low + high) / 2;
        const double value = cu_cell_value(cell, middle);
        if (rising ? value < target : value > target) low = middle + 1;
        else high = middle;
    }
    return low;
}
// The nearest scale of rbe32 to one target: a lane has every 32nd cell, and looks into those that may hold something nearer.
CU_DEVICE cu_best cu_in_cells(cu_best best, double target) {
    for (int cell = (int)threadIdx.x & 31; cell < RBE_CURVES * 256; cell += 32) {
        const float one = cu_cell_value(cell, 0), other = cu_cell_value(cell, 1023);
        const float low = one < other ? one : other, high = one < other ? other : one;
        for (uint32_t sign = 0; sign < 2; ++sign) {
            const double aim = sign ? -target : target;
            if (!(low - aim <= best.distance && aim - high <= best.distance)) continue;
            const int fine = cu_first_not_before(cell, one <= other, aim);
            const int flat = fine > 0 ? cu_first_not_before(cell, one <= other, cu_cell_value(cell, fine - 1)) : -1;
            CU_NO_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int f = i ? flat : fine;
                if (f < 0 || f > 1023) continue;
                const float value = cu_cell_value(cell, f);
                cu_keep_nearer(&best, sign ? -value : value, cu_cell_word(cell, sign) | (uint32_t)f << RBE_FINE_SHIFT, target);
            }
        }
    }
    CU_UNROLL
    for (int step = 16; step; step >>= 1) {
        const double scale = __shfl_xor_sync(CU_WARP, best.at.scale, step), distance = __shfl_xor_sync(CU_WARP, best.distance, step);
        const uint32_t word = __shfl_xor_sync(CU_WARP, best.at.word, step);
        if (distance < best.distance || (distance == best.distance && word < best.at.word)) best = {{scale, word}, distance};
    }
    return best;
}
// Lanes below `lanes` have targets of their own; what the others get means nothing.
CU_DEVICE cu_nearest cu_nearest_scale(const rbe_cu_search &s, double target, int lanes) {
    cu_best mine = cu_in_list(s.scales, target);
    if (s.codes.field == RBE_FIELD_RBE32) {
        for (int lane = 0; lane < lanes; ++lane) {
            cu_best one = {{__shfl_sync(CU_WARP, mine.at.scale, lane), __shfl_sync(CU_WARP, mine.at.word, lane)},
                           __shfl_sync(CU_WARP, mine.distance, lane)};
            one = cu_in_cells(one, __shfl_sync(CU_WARP, target, lane));
            if (((int)threadIdx.x & 31) == lane) mine = one;
        }
    }
    return mine.at;
}
