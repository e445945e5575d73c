// y = x W^T for bfloat16 and float16 and codes of 8 columns without a scale (rbe8xM_g8, rbe16sxM_g8): W is decoded into the very registers
// that the tensor cores multiply from, and is never in memory.
//
//     table[s, j, copy] = basis[s, j, 0..7]                                in the type of x, 16 bytes
//     y[t, i] = gain[i] sum over k, s of <table[s, idx], x[t, group k]> + bias[i]        with rbe16s's signs on the table's entry
//
// A lane holds of mma.m16n8k16's first operand columns 2l, 2l+1, 2l+8, 2l+9 (l = lane % 4) of rows lane/4 and lane/4 + 8. Which columns of W
// those are is free as long as x follows: here a lane's are 8 neighbouring ones, a group, four for each of two products. So an entry of the
// table is one 16-byte load and needs no other lane, and x, put in that order once a call (arrange), is another.
//
//     span = 256 columns; of a span lane l has columns 64*l .. 64*l+63, and in step j of 8 the group 8*l + j
//     arranged[token tile][span][j][8 tokens][lane] = x[8*tile + lane/4, columns of (span, l, j)]
//
// The table has a copy for each of the 8 groups of banks where shared memory has room, so the loads of a quarter of a warp never meet.
// Stages are added in the type of x, the products in float32.
#include "fragments.cuh"

constexpr int SPAN = 256, FEW = 2, MANY = 16;       // FEW, MANY: tiles of 8 tokens
constexpr int FEW_COLUMNS = 4;  // warps that share rows, and add up at the end

// Tiles of 16 rows a warp: as many as registers hold, so that a load of x serves them all.
static __host__ __device__ constexpr int row_tiles(int unit, int tiles) { return tiles == MANY ? 2 : unit <= 2 ? 6 : 4; }

struct fragments_arguments {
    const uint8_t *codes;  // rows of whole and aligned words, `groups` groups a row, a multiple of 8
    int64_t stride;
    int groups, rows, cols, tokens, spans, splits, copies;  // copies: log2
    const float *basis, *gain, *bias;
    const cu_vector16 *x;  // arranged
    uint16_t *y;
    int64_t y_stride;
    float *partial;  // [split, t, i] without gain and bias, or NULL
};

static __global__ void __launch_bounds__(THREADS) arrange(const uint16_t *x, int64_t stride, bool aligned, int64_t tokens, int64_t cols,
                                                          int64_t spans, int tiles, int64_t count, cu_vector16 *out) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= count) return;
    const int lane = (int)(at & 31), step = (int)(at / 32 / tiles % STEPS);
    const int64_t tile = at / 32 % tiles, span = at / 32 / tiles / STEPS % spans, above = at / 32 / tiles / STEPS / spans;
    const int64_t t = (above * tiles + tile) * 8 + (lane >> 2), col = span * SPAN + (lane & 3) * (SPAN / 4) + step * 8;
    const uint16_t *from = x + t * stride + col;
    cu_vector16 eight = {};
    if (t < tokens && aligned && col + 8 <= cols) {
        eight = *(const cu_vector16 *)from;
    } else if (t < tokens) {
        CU_UNROLL
        for (int e = 0; e < 8; ++e)
            if (col + e < cols) eight.word[e >> 1] |= (uint32_t)from[e] << 16 * (e & 1);
    }
    out[at] = eight;
}

// Codes as bytes in rows of whole and aligned words, from any form.
static __global__ void __launch_bounds__(THREADS) pad_codes(rbe_cu_codes codes, int unit, int64_t stride, int64_t bytes, uint8_t *out) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, i = at / stride, b = at - i * stride;
    if (at >= bytes) return;
    const int code = unit / codes.stages;
    const uint32_t word = b / unit < codes.groups ? cu_word(codes, i, b / code) : 0u;
    out[at] = (uint8_t)(b % code < code - 1 ? word : cu_idx(word));
}

// Sum n of a lane: of row tile n / (4*TILES), token tile n/4 % TILES.
template <class Act, int TILES>
CU_DEVICE void store(const fragments_arguments &a, int i0, int t0, int n, float sum) {
    const int i = i0 + n / 4 / TILES * 16 + (n & 2) * 4, t = t0 + n / 4 % TILES * 8 + (n & 1);
    if (i >= a.rows || t >= a.tokens) return;
    if (a.partial) a.partial[((int64_t)blockIdx.z * a.tokens + t) * a.rows + i] = sum;
    else a.y[(int64_t)t * a.y_stride + i] = Act::store(a.gain[i] * sum + (a.bias ? a.bias[i] : 0.0f));
}

template <class Act, int UNIT, bool SIGNS, int TILES>
static __global__ void __launch_bounds__(THREADS, 1) fragments(fragments_arguments a) {
        constexpr int STAGES = SIGNS ? UNIT / 2 : UNIT, ROW_TILES = row_tiles(UNIT, TILES), COLUMNS = TILES == FEW ? FEW_COLUMNS : 1, ROWS = 16 * ROW_TILES, CHUNK = TILES * 32, SUMS = ROW_TILES * TILES * 4;
    CU_DYNAMIC_SHARED(cu_vector16, table);
    cu_vector16 *chunks = table + ((STAGES * RBE_BASIS_VECTORS) << a.copies);
    const int lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, copy = lane & ((1 << a.copies) - 1);
    const int row0 = ((int)blockIdx.x * (WARPS / COLUMNS) + warp / COLUMNS) * ROWS, share = (a.spans + a.splits - 1) / a.splits;
    const int begin = (int)blockIdx.z * share, end = begin + share < a.spans ? begin + share : a.spans;
    const cu_vector16 *x = a.x + (int64_t)blockIdx.y * a.spans * STEPS * TILES * 32;
    fill_table<Act>(a.basis, STAGES * RBE_BASIS_VECTORS, a.copies, table);
    __syncthreads();

    float sum[ROW_TILES][TILES][4] = {};
    uint32_t codes[ROW_TILES][2][2 * UNIT];
    const auto read = [&](int span, int r) {
        CU_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int wanted = row0 + 16 * r + 8 * h + (lane >> 2), group = (span * 4 + (lane & 3)) * STEPS;
            const int64_t i = wanted < a.rows ? wanted : a.rows - 1;  // not stored then
            load_codes<UNIT>(a.codes + i * a.stride + group * UNIT, span < end && group < a.groups, codes[r][h]);
        }
    };
    const auto fetch = [&](int step) {
        CU_NO_UNROLL
        for (int p = (int)threadIdx.x; p < CHUNK; p += THREADS) cu_cp_async16(&chunks[(step & 1) * CHUNK + p], x + (int64_t)step * CHUNK + p);
        cu_cp_commit();
    };
    const auto multiply = [&](int r, int tile, const cu_vector16 *rows, const cu_vector16 &tokens) {
        CU_UNROLL
        for (int w = 0; w < 4; w += 2) {
            const uint32_t first[4] = {rows[0].word[w], rows[1].word[w], rows[0].word[w + 1], rows[1].word[w + 1]};
            Act::mma(sum[r][tile], first, tokens.word + w);
        }
    };
    const int mine = begin + (COLUMNS == 1 ? 0 : warp % COLUMNS);
    CU_UNROLL
    for (int r = 0; r < ROW_TILES; ++r) read(mine, r);
    if (COLUMNS == 1 && mine < end) fetch(mine * STEPS);
    for (int span = mine; span < end; span += COLUMNS) {
        CU_NO_UNROLL
        for (int step = 0; step < STEPS; ++step) {
            const bool last = step + 1 == STEPS;
            const cu_vector16 *at = x + (int64_t)(span * STEPS + step) * CHUNK + lane;
            if (COLUMNS == 1) {
                cu_cp_wait(0);
                __syncthreads();  // the chunk is there, and no warp reads the one before
                if (!last || span + 1 < end) fetch(span * STEPS + step + 1);
                at = chunks + (step & 1) * CHUNK + lane;
            }
            cu_vector16 rows[ROW_TILES][2], tokens[FEW];
            CU_UNROLL
            for (int tile = 0; TILES == FEW && tile < FEW; ++tile) tokens[tile] = at[tile * 32];
            CU_UNROLL
            for (int r = 0; r < ROW_TILES; ++r) {
                CU_UNROLL
                for (int h = 0; h < 2; ++h) {
                    rows[r][h] = decode<Act, UNIT, SIGNS>(table, a.copies, copy, codes[r][h]);
                    if ((span + 1) * SPAN > a.cols) trim(&rows[r][h], a.cols - span * SPAN - (lane & 3) * (SPAN / 4) - 8 * step);
                }
                if (last) {
                    read(span + COLUMNS, r);  // comes while tokens are multiplied
                } else {
                    next_group<UNIT>(codes[r][0]);
                    next_group<UNIT>(codes[r][1]);
                }
                CU_UNROLL
                for (int tile = 0; TILES == FEW && tile < FEW; ++tile) multiply(r, tile, rows[r], tokens[tile]);
            }
            CU_UNROLL
            for (int tile = 0; TILES == MANY && tile < MANY; ++tile) {
                const cu_vector16 eight = at[tile * 32];
                CU_UNROLL
                for (int r = 0; r < ROW_TILES; ++r) multiply(r, tile, rows[r], eight);
            }
        }
    }

    const int i0 = row0 + (lane >> 2), t0 = (int)blockIdx.y * TILES * 8 + 2 * (lane & 3);
    const float *one = &sum[0][0][0];
    if (COLUMNS == 1) {
        CU_UNROLL
        for (int n = 0; n < SUMS; ++n) store<Act, TILES>(a, i0, t0, n, one[n]);
        return;
    }
    float *parts = (float *)table;  // [warp][SUMS][lane]
    __syncthreads();                // no warp reads the table any more
    CU_UNROLL
    for (int n = 0; n < SUMS; ++n) parts[(warp * SUMS + n) * 32 + lane] = one[n];
    __syncthreads();
    const float *shared = parts + warp / COLUMNS * COLUMNS * SUMS * 32 + lane;
    CU_NO_UNROLL
    for (int n = warp % COLUMNS; n < SUMS; n += COLUMNS) {
        float total = 0.0f;
        CU_UNROLL
        for (int c = 0; c < COLUMNS; ++c) total += shared[(c * SUMS + n) * 32];
        store<Act, TILES>(a, i0, t0, n, total);
    }
}

static int tiles_of(int64_t tokens) { return tokens > 3 * 8 * FEW ? MANY : FEW; }
static int64_t up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
static int64_t spans_of(const rbe_cu_codes *codes) { return up(codes->cols, SPAN); }
static int64_t rows_of(int unit, int tiles) { return 16 * row_tiles(unit, tiles) * WARPS / (tiles == FEW ? FEW_COLUMNS : 1); }
static int unit_of(const rbe_cu_codes *codes) { return codes->stages * codes->bits / 8; }

// Bytes of a copy of the codes, where they do not lie as the kernel reads them; else 0.
int64_t rbe_cu_fragments_padded(const rbe_cu_codes *codes) {
    const int unit = unit_of(codes), word = unit % 2 ? 8 : 16;
    const bool read = codes->packed && codes->groups % STEPS == 0 && ((uintptr_t)codes->packed | (uint64_t)codes->packed_stride) % word == 0;
    return read ? 0 : codes->rows * up(codes->groups, STEPS) * STEPS * unit;
}

int64_t rbe_cu_fragments_arranged(const rbe_cu_codes *codes, int64_t tokens) {
    const int tiles = tiles_of(tokens);
    return up(tokens, 8 * tiles) * tiles * spans_of(codes) * STEPS * 32;
}

// A block a multiprocessor, each warp with a span at least.
int64_t rbe_cu_fragments_splits(const rbe_cu_codes *codes, int64_t tokens) {
    const int tiles = tiles_of(tokens);
    const int64_t blocks = up(codes->rows, rows_of(unit_of(codes), tiles)) * up(tokens, 8 * tiles), most = up(spans_of(codes), tiles == FEW ? FEW_COLUMNS : 1);
    const int64_t wanted = (int64_t)cu_multiprocessors() / blocks, some = wanted < most ? wanted : most;
    return some < 1 ? 1 : some;
}

template <class Act, int UNIT, bool SIGNS, int TILES>
static int run(fragments_arguments a, void *stream) {
        const size_t chunks = TILES == FEW ? 0 : 2 * sizeof(cu_vector16) * TILES * 32;
    const size_t sums = sizeof(float) * THREADS * row_tiles(UNIT, TILES) * TILES * 4;  // of FEW
    const size_t one = sizeof(cu_vector16) * (SIGNS ? UNIT / 2 : UNIT) * RBE_BASIS_VECTORS, limit = cu_shared_limit();
    a.copies = 3;
    while (a.copies && (one << a.copies) + chunks > limit) --a.copies;
    const size_t table = (one << a.copies) + chunks, bytes = TILES == FEW && sums > table ? sums : table;
    const dim3 blocks((unsigned)up(a.rows, rows_of(UNIT, TILES)), (unsigned)up(a.tokens, 8 * TILES), (unsigned)a.splits);
    return cu_launch(fragments<Act, UNIT, SIGNS, TILES>, blocks, dim3(THREADS), bytes, (cudaStream_t)stream, a);
}

template <class Act, int UNIT, bool SIGNS>
static int sized(const fragments_arguments &a, void *stream) {
    return tiles_of(a.tokens) == FEW ? run<Act, UNIT, SIGNS, FEW>(a, stream) : run<Act, UNIT, SIGNS, MANY>(a, stream);
}

template <class Act>
static int laid_out(const rbe_cu_codes &codes, const fragments_arguments &a, void *stream) {
    if (codes.field == RBE_FIELD_RBE16S) return codes.stages == 1 ? sized<Act, 2, true>(a, stream) : sized<Act, 4, true>(a, stream);
    switch (codes.stages) {
        case 1: return sized<Act, 1, false>(a, stream);
        case 2: return sized<Act, 2, false>(a, stream);
        case 3: return sized<Act, 3, false>(a, stream);
        default: return sized<Act, 4, false>(a, stream);
    }
}

int rbe_cu_fragments(const rbe_cu_codes *codes, const rbe_cu_matrix *x, const float *basis, const float *gain, const float *bias,
                     const rbe_cu_matrix *y, void *arranged, uint8_t *padded, int64_t splits, float *partial, void *stream) {
    const int64_t count = rbe_cu_fragments_arranged(codes, x->rows), spans = spans_of(codes), bytes = rbe_cu_fragments_padded(codes);
    const bool aligned = ((uintptr_t)x->data & 15) == 0 && x->stride % 8 == 0;
    int failed = cu_launch(arrange, dim3((unsigned)up(count, THREADS)), dim3(THREADS), 0, (cudaStream_t)stream, (const uint16_t *)x->data,
                           x->stride, aligned, x->rows, x->cols, spans, tiles_of(x->rows), count, (cu_vector16 *)arranged);
    if (!failed && bytes)
        failed = cu_launch(pad_codes, dim3((unsigned)up(bytes, THREADS)), dim3(THREADS), 0, (cudaStream_t)stream, *codes, unit_of(codes),
                           bytes / codes->rows, bytes, padded);
    if (failed) return failed;
    const fragments_arguments a = {bytes ? padded : codes->packed,
                                   bytes ? bytes / codes->rows : codes->packed_stride,
                                   (int)(up(codes->groups, STEPS) * STEPS),
                                   (int)codes->rows,
                                   (int)codes->cols,
                                   (int)x->rows,
                                   (int)spans,
                                   (int)splits,
                                   0,
                                   basis,
                                   gain,
                                   bias,
                                   (const cu_vector16 *)arranged,
                                   (uint16_t *)y->data,
                                   y->stride,
                                   splits > 1 ? partial : NULL};
    return x->dtype == RBE_BF16 ? laid_out<cu_bf16>(*codes, a, stream) : laid_out<cu_f16>(*codes, a, stream);
}
