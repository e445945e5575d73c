// out[c, r] = in[r, c] with zeros for rows <= r < out_width: squares of V_WIDTH x V_WIDTH in registers.
#include <stdbool.h>

#include "../kernels.h"
#include "simd.h"

V_INLINE void turn(const bool stream, const float *in, int64_t in_row, int64_t rows, int64_t cols, float *out, int64_t out_row, int64_t out_width) {
    for (int64_t r = 0; r < out_width; r += V_WIDTH) {
        const int64_t filled = rows - r;  // rows of this strip that exist; may be negative
        for (int64_t c = 0; c < cols; c += V_WIDTH) {
            vf square[V_WIDTH];
            if (filled >= V_WIDTH && c + V_WIDTH <= cols) {
                for (int i = 0; i < V_WIDTH; ++i) square[i] = v_load(in + (r + i) * in_row + c);
            } else {
                for (int i = 0; i < V_WIDTH; ++i) square[i] = i < filled ? v_load_n(in + (r + i) * in_row + c, cols - c) : v_zero();
            }
            v_transpose(square);
            const int64_t lines = cols - c < V_WIDTH ? cols - c : V_WIDTH;
            if (r + V_WIDTH <= out_width && lines == V_WIDTH) {
                for (int i = 0; i < V_WIDTH; ++i) {
                    if (stream)
                        v_stream(out + (c + i) * out_row + r, square[i]);
                    else
                        v_store(out + (c + i) * out_row + r, square[i]);
                }
            } else {
                for (int64_t i = 0; i < lines; ++i) v_store_n(out + (c + i) * out_row + r, square[i], out_width - r);
            }
        }
    }
}

void RBE_KERNEL(transpose)(const float *in, int64_t in_row, int64_t rows, int64_t cols, float *out, int64_t out_row, int64_t out_width) {
    turn(false, in, in_row, rows, cols, out, out_row, out_width);
}

void RBE_KERNEL(transpose_stream)(const float *in, int64_t in_row, int64_t rows, int64_t cols, float *out, int64_t out_row, int64_t out_width) {
    const bool lines = ((uintptr_t)out % V_STREAM | (uintptr_t)(out_row * 4) % V_STREAM) == 0;
    turn(lines, in, in_row, rows, cols, out, out_row, out_width);
    v_stream_end();
}
