// Unpacked codes, q after q: idx, scale and the two in one word, from words, packed bytes and amplitudes [m, Q].
//
// A block turns a tile of 32 rows and 32 codes over in shared memory, so that it reads codes along rows and writes along q.
#include "codes.cuh"

enum { TILE = 32, TILE_ROWS = 8 };

template <class Real>
static __global__ void unpack(rbe_cu_codes codes, int64_t pitch, int64_t row_tiles, uint8_t *idx, Real *scale, uint32_t *mixed) {
    CU_SHARED(uint8_t, tile_idx, [TILE][TILE + 4]);
    CU_SHARED(Real, tile_scale, [TILE][TILE + 1]);
    const int64_t count = codes.groups * codes.stages;
    const int64_t row0 = (int64_t)blockIdx.x % row_tiles * TILE, q0 = (int64_t)blockIdx.x / row_tiles * TILE;
    const int tx = (int)threadIdx.x, ty = (int)threadIdx.y;
    for (int r = ty; r < TILE; r += TILE_ROWS) {
        const int64_t i = row0 + r, q = q0 + tx;
        uint32_t at = 0;
        Real value = 0;
        if (i < codes.rows && q < count) {
            const uint32_t word = cu_word(codes, i, q);
            at = cu_idx(word);
            value = cu_scale<Real>(codes, word, i, q);
        }
        tile_idx[r][tx] = (uint8_t)at;
        tile_scale[r][tx] = value;
    }
    __syncthreads();
    for (int r = ty; r < TILE; r += TILE_ROWS) {
        const int64_t i = row0 + tx, q = q0 + r;
        if (i >= pitch || q >= count) continue;
        const uint8_t at = tile_idx[tx][r];
        const Real value = tile_scale[tx][r];
        if (idx) idx[q * pitch + i] = at;
        if (scale) scale[q * pitch + i] = value;
        if (mixed) mixed[q * pitch + i] = (cu_f32_to_bits((float)value) & ~255u) | at;
    }
}

template <class Real>
static int launch_unpack(const rbe_cu_codes *codes, int64_t pitch, uint8_t *idx, void *scale, uint32_t *mixed, void *stream) {
    const int64_t row_tiles = (pitch + TILE - 1) / TILE, q_tiles = (codes->groups * codes->stages + TILE - 1) / TILE;
    return cu_launch(unpack<Real>, dim3((unsigned)(row_tiles * q_tiles)), dim3(TILE, TILE_ROWS), 0, (cudaStream_t)stream, *codes, pitch,
                     row_tiles, idx, (Real *)scale, mixed);
}

int rbe_cu_unpack(const rbe_cu_codes *codes, int64_t pitch, uint8_t *idx, void *scale, uint32_t *mixed, void *stream) {
    return codes->real == RBE_F64 ? launch_unpack<double>(codes, pitch, idx, scale, mixed, stream)
                                  : launch_unpack<float>(codes, pitch, idx, scale, mixed, stream);
}
