// y = x W^T for 1 to 4 tokens of rbe8, in float32: tables of a run of codes in shared memory, 16 codes a load.
//
//     block = a run of RUN / T codes q x a run of rows
//         table[q, j, t] = <basis[s, j], x[t, k-th group]>            64 KiB
//         partial[split, t, i] = sum over the run's q of table[q, idx(i, q), t]
//
// The runs are added, times gain and plus bias, by rbe_cu_finish_product. A thread takes 16 codes of a row in one 16-byte load (where codes
// lie so; else one by one) and has AHEAD rows in flight.
#include "codes.cuh"

constexpr int RUN = 64, PER_LOAD = 16, THREADS = 256, AHEAD = 4, FEWEST_ROWS = 256;

template <int TOKENS>
struct Sums {
    float at[TOKENS];
};
template <>
struct alignas(16) Sums<4> {
    float at[4];
};
template <>
struct alignas(8) Sums<2> {
    float at[2];
};

// idx of codes q .. q+15 of a row, one a byte; 0 where the run has ended
CU_DEVICE cu_vector16 load_codes(const rbe_cu_codes &codes, bool aligned, int64_t i, int64_t q, int some) {
    if (aligned && some == PER_LOAD) return *(const cu_vector16 *)(codes.packed + i * codes.packed_stride + q);
    cu_vector16 v;
    CU_UNROLL
    for (int w = 0; w < 4; ++w) {
        uint32_t bits = 0;
        CU_NO_UNROLL
        for (int c = 4 * w; c < 4 * w + 4 && c < some; ++c) {
            const int64_t at = q + c;
            const uint32_t idx = codes.words ? cu_idx((uint32_t)codes.words[i * codes.groups * codes.stages + at])
                                             : codes.packed[i * codes.packed_stride + at];
            bits |= idx << 8 * (c & 3);
        }
        v.word[w] = bits;
    }
    return v;
}

CU_DEVICE float load_x(const rbe_cu_matrix &x, int64_t t, int64_t j) {
    const int64_t at = t * x.stride + j;
    if (x.dtype == RBE_F32) return ((const float *)x.data)[at];
    const uint16_t half = ((const uint16_t *)x.data)[at];
    return x.dtype == RBE_BF16 ? cu_bf16_to_f32(half) : cu_f16_to_f32(half);
}

template <int TOKENS>
CU_DEVICE void make_table(const rbe_cu_codes &codes, const rbe_cu_matrix &x, int64_t q0, int some, const float *basis,
                          Sums<TOKENS> *table, float *columns) {
    const int group = codes.group, stages = codes.stages, j = (int)threadIdx.x;
    const int64_t k0 = q0 / stages, first = k0 * group, last = ((q0 + some - 1) / stages + 1) * group;
    for (int p = j; p < (int)(last - first); p += THREADS) {
        CU_UNROLL
        for (int t = 0; t < TOKENS; ++t) columns[p * TOKENS + t] = t < x.rows && first + p < codes.cols ? load_x(x, t, first + p) : 0.0f;
    }
    __syncthreads();
    for (int s = 0; s < stages; ++s) {
        const float *vector = basis + ((int64_t)s * RBE_BASIS_VECTORS + j) * group;
        float eight[8];
        CU_UNROLL
        for (int e = 0; e < 8; ++e) eight[e] = e < group ? vector[e] : 0.0f;
        CU_NO_UNROLL
        for (int c = (int)((s - q0 % stages + stages) % stages); c < some; c += stages) {
            const float *at = columns + ((q0 + c) / stages - k0) * group * TOKENS;
            Sums<TOKENS> sum;
            CU_UNROLL
            for (int t = 0; t < TOKENS; ++t) sum.at[t] = 0.0f;
            CU_UNROLL
            for (int e = 0; e < 8; ++e) {
                CU_UNROLL
                for (int t = 0; t < TOKENS; ++t)
                    if (e < group) sum.at[t] = fmaf(at[e * TOKENS + t], eight[e], sum.at[t]);
            }
            CU_NO_UNROLL
            for (int e = 8; e < group; ++e) {
                CU_UNROLL
                for (int t = 0; t < TOKENS; ++t) sum.at[t] = fmaf(at[e * TOKENS + t], vector[e], sum.at[t]);
            }
            table[c * RBE_BASIS_VECTORS + j] = sum;
        }
    }
    for (int c = some; c < RUN / TOKENS; ++c) {
        CU_UNROLL
        for (int t = 0; t < TOKENS; ++t) table[c * RBE_BASIS_VECTORS + j].at[t] = 0.0f;
    }
    __syncthreads();
}

template <int TOKENS>
static __global__ void __launch_bounds__(THREADS)
    lookup(rbe_cu_codes codes, rbe_cu_matrix x, int64_t rows_a_block, bool aligned, const float *basis, float *partial) {
    constexpr int CODES = RUN / TOKENS, LOADS = CODES / PER_LOAD;  // threads that share a row
    CU_DYNAMIC_SHARED(Sums<TOKENS>, table);
    float *columns = (float *)(table + CODES * RBE_BASIS_VECTORS);
    const int64_t count = codes.groups * codes.stages, q0 = (int64_t)blockIdx.y * CODES;
    const int some = (int)(count - q0 < CODES ? count - q0 : CODES);
    make_table<TOKENS>(codes, x, q0, some, basis, table, columns);

    const int part = (int)threadIdx.x % LOADS * PER_LOAD, mine = some - part < PER_LOAD ? (some - part < 0 ? 0 : some - part) : PER_LOAD;
    const int64_t end = ((int64_t)blockIdx.x + 1) * rows_a_block < codes.rows ? ((int64_t)blockIdx.x + 1) * rows_a_block : codes.rows;
    const int64_t step = THREADS / LOADS;
    for (int64_t row = (int64_t)blockIdx.x * rows_a_block; row < end; row += AHEAD * step) {
        cu_vector16 loaded[AHEAD];
        CU_UNROLL
        for (int a = 0; a < AHEAD; ++a) {
            const int64_t i = row + a * step + threadIdx.x / LOADS;
            loaded[a] = load_codes(codes, aligned, i < end ? i : end - 1, q0 + part, mine);
        }
        CU_UNROLL
        for (int a = 0; a < AHEAD; ++a) {
            Sums<TOKENS> sum;
            CU_UNROLL
            for (int t = 0; t < TOKENS; ++t) sum.at[t] = 0.0f;
            CU_UNROLL
            for (int c = 0; c < PER_LOAD; ++c) {
                const uint32_t idx = loaded[a].word[c >> 2] >> 8 * (c & 3) & 255u;
                const Sums<TOKENS> found = table[(part + c) * RBE_BASIS_VECTORS + idx];  // of a run that has ended: zeros
                CU_UNROLL
                for (int t = 0; t < TOKENS; ++t) sum.at[t] += found.at[t];
            }
            const int64_t i = row + a * step + threadIdx.x / LOADS;
            CU_UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                CU_UNROLL
                for (int lanes = LOADS / 2; lanes; lanes >>= 1) sum.at[t] += __shfl_xor_sync(0xFFFFFFFFu, sum.at[t], lanes);
                if (part == 0 && i < end && t < x.rows) partial[((int64_t)blockIdx.y * x.rows + t) * codes.rows + i] = sum.at[t];
            }
        }
    }
}

static int64_t codes_a_block(int64_t tokens) { return RUN / (tokens == 3 ? 4 : tokens); }

int64_t rbe_cu_lookup_splits(const rbe_cu_codes *codes, int64_t tokens) {
    return (codes->groups * codes->stages + codes_a_block(tokens) - 1) / codes_a_block(tokens);
}

template <int TOKENS>
static int run(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *partial, void *stream) {
    const int64_t splits = rbe_cu_lookup_splits(codes, TOKENS), wanted = 4 * (int64_t)cu_multiprocessors();
    int64_t tiles = (wanted + splits - 1) / splits, most = (codes->rows + FEWEST_ROWS - 1) / FEWEST_ROWS;
    if (tiles > most) tiles = most;
    const int64_t rows_a_block = (codes->rows + tiles - 1) / tiles;
    const bool aligned = codes->packed && ((uintptr_t)codes->packed & 15) == 0 && codes->packed_stride % 16 == 0;
    const size_t bytes = sizeof(float) * (RUN * RBE_BASIS_VECTORS + (size_t)(RUN / TOKENS / codes->stages + 2) * codes->group * TOKENS);
    return cu_launch(lookup<TOKENS>, dim3((unsigned)((codes->rows + rows_a_block - 1) / rows_a_block), (unsigned)splits), dim3(THREADS),
                     bytes, (cudaStream_t)stream, *codes, *x, rows_a_block, aligned, basis, partial);
}

int rbe_cu_lookup(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, float *partial, void *stream) {
    return x->rows == 1   ? run<1>(codes, x, basis, partial, stream)
           : x->rows == 2 ? run<2>(codes, x, basis, partial, stream)
                          : run<4>(codes, x, basis, partial, stream);
}
