// Backward of codes with a table, rows sorted by code (sort.cu). For every q and j, with the rows i of code j:
//
//     d[q, i]       (+)= sum over t of dy[i, t] table[q, j, t]
//     dtable[q, j, t]  = sum over i of gain[i] scale[q, i] dy[i, t]
//
// A warp a (q, j), 16 rows at a time: table and dtable stay in registers over the rows, the sums of d over the tokens, so dy is read once
// for both and nothing is added across warps. A lane has 2 neighbouring tokens. From the 17th row of a code on, dtable goes through memory.
#include "cu.h"
#include "launch.h"

constexpr int WARPS = 4, THREADS = 32 * WARPS, BATCH = 16;

struct Pair {
    float low, high;
};
struct alignas(8) FloatPair {
    float at[2];
};

struct F32 {
    static __device__ __forceinline__ Pair load(const void *data, int64_t at) {
        const FloatPair p = *(const FloatPair *)((const float *)data + at);
        return Pair{p.at[0], p.at[1]};
    }
    static __device__ __forceinline__ void store(void *data, int64_t at, Pair p) {
        *(FloatPair *)((float *)data + at) = FloatPair{{p.low, p.high}};
    }
};
struct Bf16 {
    static __device__ __forceinline__ Pair load(const void *data, int64_t at) {
        const uint32_t word = *(const uint32_t *)((const uint16_t *)data + at);
        return Pair{cu_bits_to_f32(word << 16), cu_bits_to_f32(word & 0xFFFF0000u)};
    }
    static __device__ __forceinline__ void store(void *data, int64_t at, Pair p) {
        *(uint32_t *)((uint16_t *)data + at) = cu_pack_bf16(p.low, p.high);
    }
};

struct backward_arguments {
    const int32_t *order, *start;
    const float *scale, *gain;
    int64_t pitch, rows, count;
    const void *dy, *table;
    void *dtable;
    int64_t tokens, pitch_t;
    bool accumulate;
    float *d;
};

template <class Type>
static __global__ void __launch_bounds__(THREADS) backward_table(backward_arguments a) {
    const int lane = (int)threadIdx.x & 31;
    const int64_t at = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5), q = at / RBE_BASIS_VECTORS, j = at % RBE_BASIS_VECTORS;
    if (q >= a.count) return;  // a whole warp
    const int32_t *start = a.start + q * (RBE_BASIS_VECTORS + 1) + j;
    const int first = start[0], last = start[1];
    const int64_t table = (q * RBE_BASIS_VECTORS + j) * a.pitch_t;
    if (first == last)
        for (int64_t t = 2 * lane; t < a.tokens; t += 64) Type::store(a.dtable, table + t, Pair{0.0f, 0.0f});
    for (int batch = first; batch < last; batch += BATCH) {
        const int some = last - batch < BATCH ? last - batch : BATCH;
        const int mine = lane < some ? a.order[q * a.rows + batch + lane] : 0;
        const float factor = lane < some ? a.gain[mine] * a.scale[q * a.pitch + mine] : 0.0f;
        float sum[BATCH];
        CU_UNROLL
        for (int r = 0; r < BATCH; ++r) sum[r] = 0.0f;
        for (int64_t t0 = 0; t0 < a.tokens; t0 += 64) {
            const int64_t t = t0 + 2 * lane;
            const bool low = t < a.tokens, high = t + 1 < a.tokens;
            Pair p = {0.0f, 0.0f}, dp = {0.0f, 0.0f};
            if (low) p = Type::load(a.table, table + t);
            if (!high) p.high = 0.0f;  // what lies there belongs to nothing
            if (low && batch > first) dp = Type::load(a.dtable, table + t);
            CU_UNROLL
            for (int r = 0; r < BATCH; ++r) {
                const int64_t i = __shfl_sync(0xFFFFFFFFu, mine, r);
                const float f = __shfl_sync(0xFFFFFFFFu, factor, r);
                if (r < some && low) {
                    const Pair dy = Type::load(a.dy, i * a.pitch_t + t);
                    sum[r] = fmaf(dy.low, p.low, sum[r]);
                    if (high) sum[r] = fmaf(dy.high, p.high, sum[r]);
                    dp.low = fmaf(f, dy.low, dp.low);
                    dp.high = fmaf(f, dy.high, dp.high);
                }
            }
            if (low) Type::store(a.dtable, table + t, dp);
        }
        CU_UNROLL
        for (int r = 0; r < BATCH; ++r) {
            const float total = cu_warp_sum(sum[r]);
            if (lane == r && r < some) {
                float *to = a.d + q * a.pitch + mine;
                *to = a.accumulate ? *to + total : total;
            }
        }
    }
}

int rbe_cu_backward_table(const int32_t *order, const int32_t *start, const float *scale, int64_t pitch, const float *gain, int64_t rows,
                          int64_t count, rbe_dtype dtype, const void *dy, const void *table, void *dtable, int64_t tokens, int64_t pitch_t,
                          bool accumulate, float *d, void *stream) {
    const backward_arguments a = {order, start, scale, gain, pitch, rows, count, dy, table, dtable, tokens, pitch_t, accumulate, d};
    const dim3 blocks((unsigned)(count * RBE_BASIS_VECTORS / WARPS));
    return dtype == RBE_BF16 ? cu_launch(backward_table<Bf16>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, a)
                             : cu_launch(backward_table<F32>, blocks, dim3(THREADS), 0, (cudaStream_t)stream, a);
}
