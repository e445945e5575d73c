// y = x W^T for bfloat16 and float16 and any layout, W decoded tile by tile into shared memory and never written out:
//
//     block = 128 rows x TOKENS tokens x a share of the columns, in steps of 64 columns
//         w[i, c] = gain[i] sum over s of scale basis[s, idx, e] + residual[i, c]       rounded to the type of x
//         y[t, i] += sum over c of w[i, c] x[t, c]                                      tensor cores, 16 rows a warp
//
// A thread decodes 8 neighbouring columns, which lie in one group where g is a multiple of 8. The basis is copied into shared memory if
// it takes up to 32 KiB. Rows of 72 halves put ldmatrix's eight rows on eight groups of banks.
#include "codes.cuh"

constexpr int ROWS = 128, WARPS = 8, THREADS = 32 * WARPS, STEP = 64, STRIDE = STEP + 8, FEW = 16, MANY = 128, BASIS_BYTES = 32 << 10;

// Two blocks a multiprocessor, so that one multiplies while the other decodes, where 128 registers are enough: not on sm_80, not with a
// residual.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
constexpr int BLOCKS = 1;
#else
constexpr int BLOCKS = 2;
#endif

template <int TOKENS>
struct Tiles {
    uint16_t w[ROWS][STRIDE], x[TOKENS][STRIDE];
};

struct decode_arguments {
    rbe_cu_codes codes;
    rbe_cu_residual residual;
    const uint16_t *x;
    int64_t x_stride, tokens;
    bool x_aligned, basis_in_shared;
    const float *basis, *gain, *bias;
    uint16_t *y;
    int64_t y_stride, splits;
    float *partial;
};

// Columns col .. col+7 of row i: all in one group, or (SPAN 1) one by one.
template <class Act, int SPAN, bool RESIDUAL>
CU_DEVICE void decode8(const decode_arguments &a, const float *basis, int64_t i, int64_t col, uint16_t *to) {
    const rbe_cu_codes &codes = a.codes;
    const float gain = a.gain[i];
    CU_NO_UNROLL
    for (int c0 = 0; c0 < 8; c0 += SPAN) {
        const int64_t k = (col + c0) / codes.group, e = col + c0 - k * codes.group;
        float sum[SPAN] = {};
        for (int s = 0; s < codes.stages && col + c0 < codes.cols; ++s) {
            const int64_t q = k * codes.stages + s;
            const uint32_t word = cu_word(codes, i, q), signs = codes.field == RBE_FIELD_RBE16S ? word >> e : 0u;
            const float scale = cu_scale<float>(codes, word, i, q);
            const float *vector = basis + ((int64_t)s * RBE_BASIS_VECTORS + cu_idx(word)) * codes.group + e;
            CU_UNROLL
            for (int c = 0; c < SPAN; ++c) sum[c] += scale * (signs >> c & 1u ? -vector[c] : vector[c]);
        }
        CU_UNROLL
        for (int c = 0; c < SPAN; ++c) {
            const int64_t j = col + c0 + c;
            float value = j < codes.cols ? gain * sum[c] : 0.0f;
            if (RESIDUAL && j < codes.cols) value += cu_residual<float>(a.residual, codes.cols, i, j);
            to[c0 + c] = Act::store(value);
        }
    }
}

template <class Act, int TOKENS, int SPAN, bool RESIDUAL>
CU_DEVICE void fill(const decode_arguments &a, const float *basis, Tiles<TOKENS> *tiles, int64_t row0, int64_t t0, int64_t col) {
    const int64_t cols = a.codes.cols;
    CU_NO_UNROLL
    for (int p = (int)threadIdx.x; p < TOKENS * (STEP / 8); p += THREADS) {
        const int t = p / (STEP / 8), c = p % (STEP / 8) * 8;
        const bool there = t0 + t < a.tokens;
        const uint16_t *from = a.x + (t0 + t) * a.x_stride + col + c;
        if (a.x_aligned && there && col + c + 8 <= cols) {
            cu_cp_async16(&tiles->x[t][c], from);
        } else {
            for (int u = 0; u < 8; ++u) tiles->x[t][c + u] = there && col + c + u < cols ? from[u] : (uint16_t)0;
        }
    }
    cu_cp_commit();
    CU_NO_UNROLL
    for (int p = (int)threadIdx.x; p < ROWS * (STEP / 8); p += THREADS) {
        const int r = p / (STEP / 8), c = p % (STEP / 8) * 8;
        const int64_t i = row0 + r < a.codes.rows ? row0 + r : a.codes.rows - 1;  // rows beyond the last are not stored
        decode8<Act, SPAN, RESIDUAL>(a, basis, i, col + c, &tiles->w[r][c]);
    }
    cu_cp_wait(0);
}

template <class Act, int TOKENS, int SPAN, bool RESIDUAL>
static __global__ void __launch_bounds__(THREADS, TOKENS == FEW || RESIDUAL ? 1 : BLOCKS) decode_mma(decode_arguments a) {
    CU_DYNAMIC_SHARED(Tiles<TOKENS>, tiles);
    float *shared_basis = (float *)(tiles + 1);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5;
    const int64_t row0 = (int64_t)blockIdx.x * ROWS, t0 = (int64_t)blockIdx.y * TOKENS, split = blockIdx.z;
    if (a.basis_in_shared)
        for (int p = (int)threadIdx.x; p < a.codes.stages * RBE_BASIS_VECTORS * a.codes.group; p += THREADS) shared_basis[p] = a.basis[p];
    const float *basis = a.basis_in_shared ? shared_basis : a.basis;
    float sum[TOKENS / 8][4] = {};
    const int64_t steps = (a.codes.cols + STEP - 1) / STEP, share = (steps + a.splits - 1) / a.splits;
    const int64_t end = (split + 1) * share < steps ? (split + 1) * share : steps;
    for (int64_t step = split * share; step < end; ++step) {
        __syncthreads();  // the basis is there; no warp reads the tiles of the step before
        fill<Act, TOKENS, SPAN, RESIDUAL>(a, basis, tiles, row0, t0, step * STEP);
        __syncthreads();
        CU_UNROLL
        for (int c = 0; c < STEP; c += 16) {
            uint32_t rows[4];
            cu_ldmatrix_x4(rows, &tiles->w[16 * warp + (lane & 15)][c + (lane >> 4) * 8]);
            CU_UNROLL
            for (int pair = 0; pair < TOKENS / 16; ++pair) {
                uint32_t tokens[4];
                cu_ldmatrix_x4(tokens, &tiles->x[16 * pair + (lane >> 4) * 8 + (lane & 7)][c + ((lane >> 3) & 1) * 8]);
                Act::mma(sum[2 * pair], rows, tokens);
                Act::mma(sum[2 * pair + 1], rows, tokens + 2);
            }
        }
    }
    CU_UNROLL
    for (int tile = 0; tile < TOKENS / 8; ++tile) {
        CU_UNROLL
        for (int u = 0; u < 4; ++u) {
            const int64_t i = row0 + 16 * warp + (lane >> 2) + 8 * (u >> 1), t = t0 + 8 * tile + 2 * (lane & 3) + (u & 1);
            if (i >= a.codes.rows || t >= a.tokens) continue;
            if (a.partial) a.partial[(split * a.tokens + t) * a.codes.rows + i] = sum[tile][u];
            else a.y[t * a.y_stride + i] = Act::store(sum[tile][u] + (a.bias ? a.bias[i] : 0.0f));
        }
    }
}

template <class Act, int TOKENS, int SPAN, bool RESIDUAL>
static int run(const decode_arguments &a, void *stream) {
    const size_t bytes =
        sizeof(Tiles<TOKENS>) + (a.basis_in_shared ? sizeof(float) * a.codes.stages * RBE_BASIS_VECTORS * a.codes.group : 0);
    const dim3 blocks((unsigned)((a.codes.rows + ROWS - 1) / ROWS), (unsigned)((a.tokens + TOKENS - 1) / TOKENS), (unsigned)a.splits);
    return cu_launch(decode_mma<Act, TOKENS, SPAN, RESIDUAL>, blocks, dim3(THREADS), bytes, (cudaStream_t)stream, a);
}

template <class Act>
static int sized(const decode_arguments &a, void *stream) {
    const bool many = a.tokens > 3 * FEW;
    if (a.codes.group % 8) return many ? run<Act, MANY, 1, true>(a, stream) : run<Act, FEW, 1, true>(a, stream);
    if (a.residual.kind != RBE_RESIDUAL_NONE) return many ? run<Act, MANY, 8, true>(a, stream) : run<Act, FEW, 8, true>(a, stream);
    return many ? run<Act, MANY, 8, false>(a, stream) : run<Act, FEW, 8, false>(a, stream);
}

// Enough blocks for two a multiprocessor, each with at least 4 steps.
int64_t rbe_cu_decode_mma_splits(const rbe_cu_codes *codes, int64_t tokens) {
    const int64_t tile = tokens > 3 * FEW ? MANY : FEW, steps = (codes->cols + STEP - 1) / STEP;
    const int64_t blocks = (codes->rows + ROWS - 1) / ROWS * ((tokens + tile - 1) / tile),
                  wanted = 2 * (int64_t)cu_multiprocessors() / blocks;
    const int64_t most = steps / 4 < 16 ? steps / 4 : 16;
    return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

int rbe_cu_decode_mma(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, const float *gain, const float *bias,
                      const rbe_cu_residual *residual, const rbe_cu_matrix *y, int64_t splits, float *partial, void *stream) {
    const int64_t basis_bytes = (int64_t)sizeof(float) * codes->stages * RBE_BASIS_VECTORS * codes->group;
    const decode_arguments a = {*codes,
                                *residual,
                                (const uint16_t *)x->data,
                                x->stride,
                                x->rows,
                                ((uintptr_t)x->data & 15) == 0 && x->stride % 8 == 0,
                                basis_bytes <= BASIS_BYTES,
                                basis,
                                gain,
                                bias,
                                (uint16_t *)y->data,
                                y->stride,
                                splits,
                                splits > 1 ? partial : NULL};
    return x->dtype == RBE_BF16 ? sized<cu_bf16>(a, stream) : sized<cu_f16>(a, stream);
}
