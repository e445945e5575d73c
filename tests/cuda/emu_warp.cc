// Warp operations of the fiber runtime: lanes meet, the last to arrive computes for all. And cp.async, which moves bytes only when waited
// for.
#include "emu_internal.h"

namespace emu {
namespace {

float half(uint16_t bits, bool bf16) {
    const uint32_t wide = (uint32_t)bits << 16;
    return bf16 ? from_bits<float>(wide) : cu_f16_to_f32(bits);
}

// m16n8k16, fragments as the PTX ISA lays them out: g = lane / 4, t = lane % 4,
// A[g + 8((i>>1)&1)][2t + (i&1) + 8(i>>2)], B[2t + (i&1) + 8(i>>1)][g], C and D[g + 8(i>>1)][2t + (i&1)].
void multiply(WarpState &w, bool bf16) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < 8; ++i)
            a[g + 8 * ((i >> 1) & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = half((uint16_t)(w.lanes[lane].a[i >> 1] >> 16 * (i & 1)), bf16);
        for (int i = 0; i < 4; ++i) b[2 * t + (i & 1) + 8 * (i >> 1)][g] = half((uint16_t)(w.lanes[lane].b[i >> 1] >> 16 * (i & 1)), bf16);
    }
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane >> 2, t = lane & 3;
        float d[4];
        for (int i = 0; i < 4; ++i) {
            double sum = w.lanes[lane].c[i];
            for (int k = 0; k < 16; ++k) sum += (double)a[g + 8 * (i >> 1)][k] * b[k][2 * t + (i & 1)];
            d[i] = (float)sum;
        }
        for (int i = 0; i < 4; ++i) w.lanes[lane].d[i] = d[i];
    }
}

uint64_t result(const WarpState &w, int lane) {
    const int width = w.width, segment = lane & ~(width - 1), argument = w.lanes[lane].argument;
    int source = lane;
    switch (w.operation) {
        case Warp::shfl: source = segment | (argument & (width - 1)); break;
        case Warp::shfl_up: source = lane - argument < segment ? lane : lane - argument; break;
        case Warp::shfl_down: source = lane + argument >= segment + width ? lane : lane + argument; break;
        case Warp::shfl_xor: source = (lane ^ argument) >= segment + width ? lane : lane ^ argument; break;
        case Warp::sync: return 0;
        case Warp::match: {
            uint64_t same = 0;
            for (int i = 0; i < 32; ++i) same |= (uint64_t)((w.mask >> i & 1) && w.lanes[i].value == w.lanes[lane].value) << i;
            return same;
        }
        default: {
            uint64_t bits = 0;
            for (int i = 0; i < 32; ++i) bits |= (uint64_t)((w.mask >> i & 1) && w.lanes[i].value) << i;
            return w.operation == Warp::ballot ? bits : w.operation == Warp::any ? bits != 0 : bits == w.mask;
        }
    }
    if (!(w.mask >> source & 1)) fail("a shuffle reads a lane that is not in the mask", w.site);
    return w.lanes[source].value;
}

void complete(WarpState &w, int first) {
    if (w.operation == Warp::mma_bf16 || w.operation == Warp::mma_f16) {
        multiply(w, w.operation == Warp::mma_bf16);
    } else if (w.operation == Warp::ldmatrix) {
        for (int k = 0; k < w.width; ++k) {
            for (int i = 0; i < 32; ++i) {
                const char *row = (const char *)w.lanes[k * 8 + (i >> 2)].row + (i & 3) * 4;
                uint32_t word = 0;
                for (int b = 0; b < 4; ++b) word |= (uint32_t)(uint8_t)row[b] << 8 * b;
                w.lanes[i].registers[k] = word;
            }
        }
    } else {
        for (int i = 0; i < 32; ++i)
            if (w.mask >> i & 1) w.results[i] = result(w, i);
    }
    w.arrived = 0;
    for (int i = 0; i < 32; ++i)
        if ((w.mask >> i & 1) && first + i != self) make_ready(first + i);
}

WarpState &arrive(const Site &site, Warp operation, unsigned mask, int width) {
    const Place &place = fibers[self].place;
    WarpState &w = warps[place.warp];
    const unsigned me = 1u << place.lane;
    if (!(mask & me)) fail("the calling lane is not in its own mask", site);
    if (!w.arrived) {
        w.mask = mask;
        w.operation = operation;
        w.site = site;
        w.width = width;
    } else if (w.mask != mask || w.operation != operation || w.site.line != site.line) {
        fail("lanes of one warp meet at different warp operations or masks", site);
    }
    w.arrived |= me;
    return w;
}

// orders_memory: __syncwarp alone does
void meet(WarpState &w, const Site &site, bool orders_memory) {
    (void)orders_memory;
    TSAN(if (orders_memory) __tsan_release(&w.token);)
    if (w.arrived == w.mask) {
        complete(w, (int)fibers[self].place.warp * 32);
        yield_to_any();
    } else {
        leave_until_woken(State::in_warp, site);
    }
    TSAN(if (orders_memory) __tsan_acquire(&w.token);)
}

}  // namespace

uint64_t warp_operation(const Site &site, Warp operation, unsigned mask, uint64_t value, int argument, int width) {
    WarpState &w = arrive(site, operation, mask, width);
    const unsigned lane = fibers[self].place.lane;
    w.lanes[lane].value = value;
    w.lanes[lane].argument = argument;
    meet(w, site, operation == Warp::sync);
    return w.results[lane];
}

void warp_mma(const Site &site, bool bf16, float *d, const uint32_t *a, const uint32_t *b, const float *c) {
    WarpState &w = arrive(site, bf16 ? Warp::mma_bf16 : Warp::mma_f16, ~0u, 32);
    Lane &lane = w.lanes[fibers[self].place.lane];
    lane.a = a, lane.b = b, lane.c = c, lane.d = d;
    meet(w, site, false);
}

void warp_ldmatrix(const Site &site, int matrices, uint32_t *registers, const void *row) {
    if ((uintptr_t)row & 15) fail("a row of ldmatrix is not aligned to 16 bytes", site);
    WarpState &w = arrive(site, Warp::ldmatrix, ~0u, matrices);
    const unsigned lane = fibers[self].place.lane;
    w.lanes[lane].registers = registers;
    w.lanes[lane].row = row;
    if ((int)lane < 8 * matrices) touch(row, 16, false, site);
    meet(w, site, false);
}

// Until the wait the destination holds NaN, so that a read before it shows.
void cp_async(const Site &site, void *to, const void *from, int bytes) {
    if (((uintptr_t)to | (uintptr_t)from) & (uintptr_t)(bytes - 1)) fail("cp.async is not aligned", site);
    touch(from, (size_t)bytes, false, site);
    touch(to, (size_t)bytes, true, site);
    for (int i = 0; i < bytes; ++i) ((volatile char *)to)[i] = -1;
    Fiber &f = fibers[self];
    if (f.last - f.first == kMaxCopies) fail("more than 256 cp.async under way in one thread", site);
    f.copies[f.last++ % kMaxCopies] = {to, from, bytes, site};
    ++f.open;
}

void cp_commit() {
    Fiber &f = fibers[self];
    f.group_size[f.last_group++ % kMaxCopies] = (unsigned short)f.open;
    f.open = 0;
}

void cp_wait(int groups) {
    Fiber &f = fibers[self];
    while ((int)(f.last_group - f.first_group) > groups) {
        for (int left = f.group_size[f.first_group++ % kMaxCopies]; left > 0; --left) {
            const Copy &copy = f.copies[f.first++ % kMaxCopies];
            touch(copy.to, (size_t)copy.bytes, true, copy.site);
            for (int i = 0; i < copy.bytes; ++i) ((volatile char *)copy.to)[i] = ((const char *)copy.from)[i];
        }
    }
}

}  // namespace emu
