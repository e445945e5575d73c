// A row of W from its codes, its transpose for gradients, and the dense helpers of the decoding paths.
//
//     out[k*g + e] = gain * sum over s of scale[q] (+-) basis[s, idx[q], e],   q = k*M + s
#include "../kernels.h"
#include "simd.h"

// Negates lane t where bit e + t of signs is set.
V_INLINE vf flip(vf x, uint16_t signs, int64_t e) {
    const vi bit = vi_shrv(vi_set1(signs), vi_min(vi_add(vi_iota(), vi_set1((int32_t)e)), vi_set1(31)));
    return v_of_bits(vi_xor(v_bits(x), vi_shl(bit, 31)));
}

// Two groups of half a vector, or whole vectors of a group: no masks. Returns the columns done.
V_INLINE int64_t decode_halves(bool scaled, bool flipped, int64_t stages, int64_t cols, const float *basis, const uint8_t *idx,
                               const float *scale, const uint8_t *signs, float gain, float *out) {
    enum { HALF = V_WIDTH / 2 };
    int64_t first = 0;
    for (; first + V_WIDTH <= cols; first += V_WIDTH, idx += 2 * stages) {
        vf sum = v_zero();
        for (int64_t s = 0; s < stages; ++s) {
            const float *table = basis + s * RBE_BASIS_VECTORS * HALF;
            vf value = v_load_halves(table + idx[s] * HALF, table + idx[stages + s] * HALF);
            if (flipped) value = flip(value, (uint16_t)(signs[s] | signs[stages + s] << 8), 0);
            sum = scaled ? v_fma(v_set_halves(scale[s], scale[stages + s]), value, sum) : v_add(value, sum);
        }
        v_store(out + first, v_mul(sum, v_set1(gain)));
        if (scaled) scale += 2 * stages;
        if (flipped) signs += 2 * stages;
    }
    return first;
}

V_INLINE void decode_as(bool scaled, bool flipped, int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx,
                        const float *scale, const uint8_t *signs, float gain, float *out) {
    int64_t first = 0;
    if (V_WIDTH >= 4 && g == V_WIDTH / 2 && (!flipped || V_WIDTH == 16)) {
        first = decode_halves(scaled, flipped, stages, cols, basis, idx, scale, signs, gain, out);
        idx += first / g * stages;
        if (scaled) scale += first / g * stages;
        if (flipped) signs += first / g * stages;
    }
    for (; first < cols; first += g, idx += stages) {
        const int64_t width = cols - first < g ? cols - first : g;
        for (int64_t e = 0; e < width; e += V_WIDTH) {
            const bool full = e + V_WIDTH <= width;
            vf sum = v_zero();
            for (int64_t s = 0; s < stages; ++s) {
                const float *vector = basis + (s * RBE_BASIS_VECTORS + idx[s]) * g + e;
                vf value = full ? v_load(vector) : v_load_n(vector, width - e);
                if (flipped) value = flip(value, signs[s], e);
                sum = scaled ? v_fma(v_set1(scale[s]), value, sum) : v_add(value, sum);
            }
            sum = v_mul(sum, v_set1(gain));
            if (full)
                v_store(out + first + e, sum);
            else
                v_store_n(out + first + e, sum, width - e);
        }
        if (scaled) scale += stages;
        if (flipped) signs += stages;
    }
}

void RBE_KERNEL(decode_row)(int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx, const float *scale,
                            const uint8_t *signs, float gain, float *out) {
    if (scale)
        decode_as(true, false, stages, g, cols, basis, idx, scale, signs, gain, out);
    else if (signs)
        decode_as(false, true, stages, g, cols, basis, idx, scale, signs, gain, out);
    else
        decode_as(false, false, stages, g, cols, basis, idx, scale, signs, gain, out);
}

V_INLINE float scatter_as(bool scaled, bool flipped, int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx,
                          const float *scale, const uint8_t *signs, float gain, const float *dw, float *d, float *dbasis) {
    vf total = v_zero();
    int64_t q = 0;
    for (int64_t first = 0; first < cols; first += g) {
        const int64_t width = cols - first < g ? cols - first : g;
        for (int64_t s = 0; s < stages; ++s, ++q) {
            const int64_t vector = (s * RBE_BASIS_VECTORS + idx[q]) * g;
            const vf factor = v_set1(scaled ? gain * scale[q] : gain);
            vf dot = v_zero();
            for (int64_t e = 0; e < width; e += V_WIDTH) {
                const bool full = e + V_WIDTH <= width;
                const float *table = basis + vector + e, *in = dw + first + e;
                vf value = full ? v_load(in) : v_load_n(in, width - e);
                if (flipped) value = flip(value, signs[q], e);
                dot = v_fma(value, full ? v_load(table) : v_load_n(table, width - e), dot);
                if (!dbasis) continue;
                float *out = dbasis + vector + e;
                if (full)
                    v_store(out, v_fma(factor, value, v_load(out)));
                else
                    v_store_n(out, v_fma(factor, value, v_load_n(out, width - e)), width - e);
            }
            total = scaled ? v_fma(v_set1(scale[q]), dot, total) : v_add(dot, total);
            if (d) d[q] += v_sum(dot);
        }
    }
    return v_sum(total);
}

float RBE_KERNEL(scatter_row)(int64_t stages, int64_t g, int64_t cols, const float *basis, const uint8_t *idx, const float *scale,
                              const uint8_t *signs, float gain, const float *dw, float *d, float *dbasis) {
    if (scale) return scatter_as(true, false, stages, g, cols, basis, idx, scale, signs, gain, dw, d, dbasis);
    if (signs) return scatter_as(false, true, stages, g, cols, basis, idx, scale, signs, gain, dw, d, dbasis);
    return scatter_as(false, false, stages, g, cols, basis, idx, scale, signs, gain, dw, d, dbasis);
}

void RBE_KERNEL(dot_rows)(int64_t tokens, int64_t cols, const float *x, int64_t x_row, const float *w, float *out) {
    for (int64_t t = 0; t < tokens; ++t) {
        const float *line = x + t * x_row;
        vf acc[4] = {v_zero(), v_zero(), v_zero(), v_zero()};
        int64_t j = 0;
        for (; j + 4 * V_WIDTH <= cols; j += 4 * V_WIDTH)
            for (int v = 0; v < 4; ++v) acc[v] = v_fma(v_load(line + j + v * V_WIDTH), v_load(w + j + v * V_WIDTH), acc[v]);
        for (; j < cols; j += V_WIDTH) acc[0] = v_fma(v_load_n(line + j, cols - j), v_load_n(w + j, cols - j), acc[0]);
        out[t] = v_sum(v_add(v_add(acc[0], acc[1]), v_add(acc[2], acc[3])));
    }
}

void RBE_KERNEL(add_scaled)(int64_t count, float factor, const float *in, float *out) {
    const vf f = v_set1(factor);
    int64_t i = 0;
    for (; i + V_WIDTH <= count; i += V_WIDTH) v_store(out + i, v_fma(f, v_load(in + i), v_load(out + i)));
    if (i < count) v_store_n(out + i, v_fma(f, v_load_n(in + i, count - i), v_load_n(out + i, count - i)), count - i);
}

void RBE_KERNEL(add_scaled_i8)(int64_t count, float factor, const int8_t *in, float *out) {
    const vf f = v_set1(factor);
    int64_t i = 0;
    for (; i < count; i += V_WIDTH) {
        const int64_t lanes = count - i;
        uint8_t tail[V_WIDTH] = {0};
        const uint8_t *bytes = (const uint8_t *)in + i;
        if (lanes < V_WIDTH) bytes = memcpy(tail, bytes, (size_t)lanes);
        const vi value = vi_sub(vi_xor(vi_load_u8(bytes), vi_set1(128)), vi_set1(128));  // sign extension of 8 bits
        v_store_n(out + i, v_fma(f, v_from_int(value), v_load_n(out + i, lanes)), lanes);
    }
}

void RBE_KERNEL(add_lookup)(int64_t count, float factor, const float *table, const uint8_t *in, float *out) {
    const vf f = v_set1(factor);
    for (int64_t i = 0; i < count; i += V_WIDTH) {
        const int64_t lanes = count - i;
        uint8_t tail[V_WIDTH] = {0};
        const uint8_t *bytes = in + i;
        if (lanes < V_WIDTH) bytes = memcpy(tail, bytes, (size_t)lanes);
        v_store_n(out + i, v_fma(f, v_gather(table, vi_load_u8(bytes)), v_load_n(out + i, lanes)), lanes);
    }
}
