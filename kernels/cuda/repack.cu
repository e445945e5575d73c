// Packed bytes <-> interchange words, and the check that codes are ones the layout can hold. The bits are drawn in kernels/format.h.
#include "codes.cuh"

enum { THREADS = 256 };

static int64_t blocks_of(int64_t threads) { return (threads + THREADS - 1) / THREADS; }

// A thread makes one byte of a packed row from the codes that have bits in it: no two threads write one byte.
static __global__ void pack(rbe_cu_codes codes, int64_t bytes, uint8_t *packed, int64_t stride) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (at >= codes.rows * bytes) return;
    const int64_t i = at / bytes, byte = at % bytes, count = codes.groups * codes.stages;
    uint32_t value = 0;
    for (int64_t q = byte * 8 / codes.bits; q < count && q * codes.bits < byte * 8 + 8; ++q) {
        const uint32_t w = cu_word(codes, i, q);
        uint32_t stored = w;
        if (codes.field == RBE_FIELD_RBE8) stored = cu_idx(w);
        if (codes.field == RBE_FIELD_RBE16S) stored = (w & 255u) | cu_idx(w) << 8;
        if (codes.seeded) stored = (w & 255u) >> codes.unstored | (w >> RBE_SIGN_SHIFT & 1u) << (8 - codes.unstored);
        const int shift = (int)(q * codes.bits - byte * 8);
        value |= shift >= 0 ? stored << shift : stored >> -shift;
    }
    packed[i * stride + byte] = (uint8_t)value;
}

static __global__ void unpack_words(rbe_cu_codes codes, int32_t *words) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, count = codes.groups * codes.stages;
    if (at < codes.rows * count) words[at] = (int32_t)cu_word(codes, at / count, at % count);
}

static __global__ void check_words(rbe_cu_codes codes, uint32_t fixed, uint32_t constant, unsigned long long *first_bad) {
    const int64_t at = (int64_t)blockIdx.x * THREADS + threadIdx.x, count = codes.groups * codes.stages;
    if (at >= codes.rows * count) return;
    const uint32_t word = (uint32_t)codes.words[at];
    bool bad = ((word ^ constant) & fixed) != 0;
    if (codes.seeded)
        bad = bad ||
              cu_idx(word) != cu_seeded_idx(codes.seed, codes.first + (uint32_t)(at / count) * codes.row_step + (uint32_t)(at % count));
    if (bad) atomicMin(first_bad, (unsigned long long)at);  // the lowest place, whatever the order
}

static __global__ void check_padding(rbe_cu_codes codes, int64_t bytes, int used, unsigned long long *first_bad) {
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < codes.rows && codes.packed[i * codes.packed_stride + bytes - 1] >> used)
        atomicMin(first_bad, (unsigned long long)(i * codes.groups * codes.stages));
}

static __global__ void set_none(unsigned long long *first_bad) { *first_bad = ~0ull; }

int rbe_cu_pack(const rbe_cu_codes *codes, uint8_t *packed, int64_t packed_stride, void *stream) {
    const int64_t bytes = (codes->groups * codes->stages * codes->bits + 7) / 8;
    return cu_launch(pack, dim3((unsigned)blocks_of(codes->rows * bytes)), dim3(THREADS), 0, (cudaStream_t)stream, *codes, bytes, packed,
                     packed_stride);
}

int rbe_cu_unpack_words(const rbe_cu_codes *codes, int32_t *words, void *stream) {
    const int64_t places = codes->rows * codes->groups * codes->stages;
    return cu_launch(unpack_words, dim3((unsigned)blocks_of(places)), dim3(THREADS), 0, (cudaStream_t)stream, *codes, words);
}

int rbe_cu_check_codes(const rbe_cu_codes *codes, unsigned long long *scratch, unsigned long long *first_bad, void *stream) {
    const int64_t count = codes->groups * codes->stages, bytes = (count * codes->bits + 7) / 8;
    const int used = (int)(count * codes->bits % 8);
    const uint32_t constant = rbe_field_constant(codes->field), fixed = ~rbe_field_mask(codes->field) | constant;
    int error = cu_launch(set_none, dim3(1), dim3(1), 0, (cudaStream_t)stream, scratch);
    if (!error && codes->words)
        error = cu_launch(check_words, dim3((unsigned)blocks_of(codes->rows * count)), dim3(THREADS), 0, (cudaStream_t)stream, *codes,
                          fixed, constant, scratch);
    if (!error && codes->packed && used)
        error = cu_launch(check_padding, dim3((unsigned)blocks_of(codes->rows)), dim3(THREADS), 0, (cudaStream_t)stream, *codes, bytes,
                          used, scratch);
    return error ? error : cu_copy_to_host(first_bad, scratch, sizeof *first_bad, (cudaStream_t)stream);
}
