// Codes of one byte between rows (packed) and columns of 64 rows (interleaved), which is what lookups in registers read:
//
//     interleaved[i / 64][q][i % 64] = packed[i][q],   rows that do not exist are zero
//
// Bytes move in squares of 8 x 8 held in eight integers of 64 bits.
#include <string.h>

#include "dispatch.h"
#include "product.h"

enum { TILE = RBE_INTERLEAVED_ROWS, SQUARE = 8 };

// a[r] byte c <-> a[c] byte r, on integers that were loaded little-endian: blocks of 4, 2 and 1 bytes change places.
static inline void turn(uint64_t a[SQUARE]) {
    static const uint64_t low[3] = {0x00000000FFFFFFFFull, 0x0000FFFF0000FFFFull, 0x00FF00FF00FF00FFull};
    for (int step = 4, level = 0; step; step /= 2, ++level) {
        for (int r = 0; r < SQUARE; ++r) {
            if (r & step) continue;
            const uint64_t change = ((a[r] >> (8 * step)) ^ a[r + step]) & low[level];
            a[r] ^= change << (8 * step);
            a[r + step] ^= change;
        }
    }
}

// out[c * out_row + r] = in[r * in_row + c] for rows x cols bytes, at most 64 x 64
static void turn_square(const rbe_kernels *kernels, const uint8_t *in, int64_t in_row, int64_t rows, int64_t cols, uint8_t *out, int64_t out_row) {
    if (kernels->turn_bytes && rows == TILE && cols == TILE) {
        kernels->turn_bytes(in, in_row, out, out_row);
        return;
    }
    for (int64_t r = 0; r < rows; r += SQUARE) {
        for (int64_t c = 0; c < cols; c += SQUARE) {
            const int64_t height = rbe_min(SQUARE, rows - r), width = rbe_min(SQUARE, cols - c);
            uint64_t a[SQUARE] = {0};
            if (height == SQUARE && width == SQUARE && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) {
                for (int i = 0; i < SQUARE; ++i) memcpy(&a[i], in + (r + i) * in_row + c, SQUARE);
                turn(a);
                for (int i = 0; i < SQUARE; ++i) memcpy(out + (c + i) * out_row + r, &a[i], SQUARE);
                continue;
            }
            for (int64_t i = 0; i < height; ++i)
                for (int64_t j = 0; j < width; ++j) out[(c + j) * out_row + r + i] = in[(r + i) * in_row + c + j];
        }
    }
}

// Tiles of 64 rows, begin .. end, of `rows`.
static void interleave(const rbe_kernels *kernels, const uint8_t *packed, int64_t stride, int64_t rows, int64_t count, int64_t begin, int64_t end,
                       uint8_t *out) {
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t i = tile * TILE, here = rbe_min(TILE, rows - i);
        uint8_t *to = out + i * count;
        if (here < TILE) memset(to, 0, (size_t)(TILE * count));
        for (int64_t q = 0; q < count; q += TILE)
            turn_square(kernels, packed + i * stride + q, stride, here, rbe_min(TILE, count - q), to + q * TILE, TILE);
    }
}

static void deinterleave(const rbe_kernels *kernels, const uint8_t *interleaved, int64_t rows, int64_t count, int64_t begin, int64_t end,
                         uint8_t *out) {
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t i = tile * TILE;
        for (int64_t q = 0; q < count; q += TILE)
            turn_square(kernels, interleaved + i * count + q * TILE, TILE, rbe_min(TILE, count - q), rbe_min(TILE, rows - i), out + i * count + q,
                        count);
    }
}

void rbe_interleave_tile(const rbe_kernels *kernels, const uint8_t *packed, int64_t stride, int64_t rows, int64_t count, uint8_t *out) {
    interleave(kernels, packed, stride, rows, count, 0, 1, out);
}

rbe_status rbe_interleave(const uint8_t *packed, int64_t stride, int64_t rows, int64_t count, uint8_t *out, rbe_error *err) {
    const rbe_kernels *kernels;
    const rbe_status status = rbe_choose_kernels(&kernels, err);
    if (status == RBE_OK) interleave(kernels, packed, stride, rows, count, 0, rbe_interleaved_tiles(rows), out);
    return status;
}

rbe_status rbe_deinterleave(const uint8_t *interleaved, int64_t rows, int64_t count, uint8_t *out, rbe_error *err) {
    const rbe_kernels *kernels;
    const rbe_status status = rbe_choose_kernels(&kernels, err);
    if (status == RBE_OK) deinterleave(kernels, interleaved, rows, count, 0, rbe_interleaved_tiles(rows), out);
    return status;
}

typedef struct pass {
    const rbe_kernels *kernels;
    const rbe_weight *w;
    uint8_t *out;
} pass;

static void deinterleave_tiles(int64_t begin, int64_t end, void *context) {
    const pass *s = context;
    deinterleave(s->kernels, s->w->interleaved, s->w->rows, rbe_codes_a_row(s->w), begin, end, s->out);
}

rbe_status rbe_as_packed(const rbe_kernels *kernels, const rbe_weight *w, const rbe_parallel *threads, rbe_weight *out, rbe_error *err) {
    *out = *w;
    if (!w->interleaved) return RBE_OK;
    const int64_t count = rbe_codes_a_row(w), tiles = rbe_interleaved_tiles(w->rows);
    pass s = {kernels, w, rbe_scratch_take(w->rows * count, 1)};
    if (!s.out) return rbe_out_of_memory(err);
    rbe_run(threads, tiles, rbe_share(threads, tiles, 1), deinterleave_tiles, &s);
    out->interleaved = NULL;
    out->packed = s.out;
    out->packed_stride = count;
    return RBE_OK;
}
