// y = x W^T for many tokens of bfloat16 or float16 and codes with a scale. The table never leaves the chip:
//
//     block = 64 tokens x 512 rows; for every q = k*M + s:
//         table[j, t] = <basis[s, j], x[t, k-th group]>     tensor cores, 256 x 64, kept as bfloat16 in shared memory
//         sum[i, t]  += scale(i, q) table[idx(i, q), t]     a warp has 32 rows, a lane 2 tokens: 64 float32 sums in registers
//     y[t, i] = gain[i] sum[i, t] + bias[i]
//
// The product with the basis goes in steps of 64 columns. A step's x, codes and (where it is another one) basis come by cp.async while the
// gather of the step before runs. Bank conflicts: rows of 72 halves put ldmatrix's eight rows on eight groups of banks, rows of 36 words
// the table's stores; a gather reads 32 neighbouring words.
#include "cu.h"
#include "launch.h"

constexpr int TOKENS = 64, WARPS = 16, THREADS = 32 * WARPS, WARP_ROWS = 32, ROWS = WARPS * WARP_ROWS;
constexpr int STEP = 64, STRIDE = STEP + 8, TABLE_STRIDE = 36;

struct tiles_shared {
    uint16_t basis[RBE_BASIS_VECTORS][STRIDE];
    uint16_t x[TOKENS][STRIDE];
    uint32_t table[RBE_BASIS_VECTORS][TABLE_STRIDE];
    uint32_t codes[2][ROWS];
};

struct tiles_arguments {
    const uint16_t *x;
    int64_t x_stride, tokens, cols;
    bool x_aligned;  // 16-byte pieces of a group start at multiples of 16 bytes
    const uint16_t *basis;
    int depth, group, stages;
    const uint32_t *codes;
    int64_t pitch, rows, count;
    const float *gain, *bias;
    void *y;
    int64_t y_stride;
    bool y_aligned;
};

// x[t0 .. t0+63, columns of step `part` of group k], zero where there is none
CU_DEVICE void load_x(const tiles_arguments &a, tiles_shared *shared, int64_t t0, int64_t k, int part, int width) {
    const int64_t first = k * a.group;
    const int inside = (int)(a.cols - first < a.group ? a.cols - first : a.group);
    CU_NO_UNROLL
    for (int p = (int)threadIdx.x; p < TOKENS * (STEP / 8); p += THREADS) {
        const int t = p / (STEP / 8), c = p % (STEP / 8) * 8, e = part * STEP + c;
        if (c >= width) continue;
        uint16_t *to = &shared->x[t][c];
        const uint16_t *from = a.x + (t0 + t) * a.x_stride + first + e;
        const bool there = t0 + t < a.tokens;
        if (a.x_aligned && there && e + 8 <= inside) {
            cu_cp_async16(to, from);
        } else {
            for (int u = 0; u < 8; ++u) to[u] = there && e + u < inside ? from[u] : (uint16_t)0;
        }
    }
}

CU_DEVICE void load_basis(const tiles_arguments &a, tiles_shared *shared, int stage, int part, int width) {
    const uint16_t *from = a.basis + (int64_t)stage * RBE_BASIS_VECTORS * a.depth + part * STEP;
    CU_NO_UNROLL
    for (int p = (int)threadIdx.x; p < RBE_BASIS_VECTORS * (STEP / 8); p += THREADS) {
        const int j = p / (STEP / 8), c = p % (STEP / 8) * 8;
        if (c < width) cu_cp_async16(&shared->basis[j][c], from + (int64_t)j * a.depth + c);
    }
}

// table += of one step; a warp has 16 of the 256 vectors and all tokens
template <class Act>
CU_DEVICE void multiply(const tiles_shared *shared, int width, float (*sum)[4]) {
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    CU_NO_UNROLL
    for (int c = 0; c < width; c += 16) {
        uint32_t vectors[4];
        cu_ldmatrix_x4(vectors, &shared->basis[16 * warp + (lane & 15)][c + (lane >> 4) * 8]);
        CU_UNROLL
        for (int pair = 0; pair < TOKENS / 16; ++pair) {
            uint32_t tokens[4];
            cu_ldmatrix_x4(tokens, &shared->x[16 * pair + (lane >> 4) * 8 + (lane & 7)][c + ((lane >> 3) & 1) * 8]);
            Act::mma(sum[2 * pair], vectors, tokens);
            Act::mma(sum[2 * pair + 1], vectors, tokens + 2);
        }
    }
}

CU_DEVICE void store_table(tiles_shared *shared, float (*sum)[4]) {
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, j = 16 * warp + (lane >> 2);
    CU_UNROLL
    for (int tile = 0; tile < TOKENS / 8; ++tile) {
        shared->table[j][tile * 4 + (lane & 3)] = cu_pack_bf16(sum[tile][0], sum[tile][1]);
        shared->table[j + 8][tile * 4 + (lane & 3)] = cu_pack_bf16(sum[tile][2], sum[tile][3]);
        CU_UNROLL
        for (int i = 0; i < 4; ++i) sum[tile][i] = 0.0f;
    }
}

CU_DEVICE void gather(const tiles_shared *shared, const uint32_t *codes, float (*y)[2]) {
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    CU_UNROLL
    for (int r = 0; r < WARP_ROWS; r += 4) {
        const cu_vector16 four = *(const cu_vector16 *)(codes + warp * WARP_ROWS + r);
        CU_UNROLL
        for (int u = 0; u < 4; ++u) {
            const uint32_t code = four.word[u], pair = shared->table[code & 255u][lane];
            const float scale = cu_bits_to_f32(code);  // idx is left in its lowest bits: 2^-15 of its size at most
            y[r + u][0] = fmaf(scale, cu_bits_to_f32(pair << 16), y[r + u][0]);
            y[r + u][1] = fmaf(scale, cu_bits_to_f32(pair & 0xFFFF0000u), y[r + u][1]);
        }
    }
}

// A lane has 32 neighbouring rows of two tokens: 64 bytes of y each.
template <class Act>
CU_DEVICE void store_y(const tiles_arguments &a, int64_t t0, int64_t row0, float (*sum)[2]) {
    const int lane = (int)threadIdx.x & 31;
    CU_UNROLL
    for (int half = 0; half < 2; ++half) {
        const int64_t t = t0 + 2 * lane + half;
        if (t >= a.tokens) continue;
        uint16_t *to = (uint16_t *)a.y + t * a.y_stride + row0;
        CU_UNROLL
        for (int r = 0; r < WARP_ROWS; r += 8) {
            cu_vector16 eight;
            CU_UNROLL
            for (int u = 0; u < 8; ++u) {
                const int64_t i = row0 + r + u < a.rows ? row0 + r + u : a.rows - 1;
                const uint32_t value = Act::store(a.gain[i] * sum[r + u][half] + (a.bias ? a.bias[i] : 0.0f));
                eight.word[u >> 1] = u & 1 ? eight.word[u >> 1] | value << 16 : value;
            }
            if (a.y_aligned && row0 + r + 8 <= a.rows) {
                *(cu_vector16 *)(to + r) = eight;
            } else {
                CU_UNROLL
                for (int u = 0; u < 8; ++u)
                    if (row0 + r + u < a.rows) to[r + u] = (uint16_t)(eight.word[u >> 1] >> 16 * (u & 1));
            }
        }
    }
}

template <class Act>
static __global__ void __launch_bounds__(THREADS, 1) tiles_half(tiles_arguments a) {
    CU_DYNAMIC_SHARED(tiles_shared, shared);
    const int parts = (a.depth + STEP - 1) / STEP, warp = (int)threadIdx.x >> 5;
    const int64_t t0 = (int64_t)blockIdx.x * TOKENS, row0 = (int64_t)blockIdx.y * ROWS;
    float sum[TOKENS / 8][4] = {}, y[WARP_ROWS][2] = {};
    int loaded = -1;  // stage and step of the basis in shared memory

    const auto load = [&](int64_t q, int64_t k, int stage, int part) {
        const int width = a.depth - part * STEP < STEP ? a.depth - part * STEP : STEP;
        load_x(a, shared, t0, k, part, width);
        if (loaded != stage * parts + part) load_basis(a, shared, stage, part, width);
        loaded = stage * parts + part;
        if (part == 0 && (int)threadIdx.x < ROWS / 4)
            cu_cp_async16(&shared->codes[q & 1][4 * threadIdx.x], a.codes + q * a.pitch + row0 + 4 * threadIdx.x);
        cu_cp_commit();
    };
    load(0, 0, 0, 0);
    int64_t k = 0;
    int stage = 0;
    for (int64_t q = 0; q < a.count; ++q) {
        CU_NO_UNROLL
        for (int part = 0; part < parts; ++part) {
            cu_cp_wait(0);
            __syncthreads();  // the step's data is there, and no warp gathers from the table any more
            multiply<Act>(shared, a.depth - part * STEP < STEP ? a.depth - part * STEP : STEP, sum);
            __syncthreads();  // its buffers are free
            const bool last = part + 1 == parts;
            if (last && ++stage == a.stages) {
                stage = 0;
                ++k;
            }
            if (!last || q + 1 < a.count) load(last ? q + 1 : q, k, stage, last ? 0 : part + 1);
        }
        store_table(shared, sum);
        __syncthreads();
        gather(shared, shared->codes[q & 1], y);
    }
    store_y<Act>(a, t0, row0 + warp * WARP_ROWS, y);
}

int rbe_cu_tiles_half(const rbe_cu_matrix *x, const uint16_t *basis, int32_t depth, int32_t group, int32_t stages, const uint32_t *mixed,
                      int64_t pitch, int64_t rows, const float *gain, const float *bias, const rbe_cu_matrix *y, void *stream) {
    const tiles_arguments a = {(const uint16_t *)x->data,
                               x->stride,
                               x->rows,
                               x->cols,
                               ((uintptr_t)x->data & 15) == 0 && x->stride % 8 == 0 && group % 8 == 0,
                               basis,
                               depth,
                               group,
                               stages,
                               mixed,
                               pitch,
                               rows,
                               (x->cols + group - 1) / group * stages,
                               gain,
                               bias,
                               y->data,
                               y->stride,
                               ((uintptr_t)y->data & 15) == 0 && y->stride % 8 == 0};
    const dim3 blocks((unsigned)((x->rows + TOKENS - 1) / TOKENS), (unsigned)((rows + ROWS - 1) / ROWS));
    return x->dtype == RBE_BF16 ? cu_launch(tiles_half<cu_bf16>, blocks, dim3(THREADS), sizeof(tiles_shared), (cudaStream_t)stream, a)
                                : cu_launch(tiles_half<cu_f16>, blocks, dim3(THREADS), sizeof(tiles_shared), (cudaStream_t)stream, a);
}
