// What the two passes of calibrated encoding share (ops/encode_calibrated.c). A block has up to eight rows, a warp each, and takes them
// through the groups from left to right; rows do not depend on each other, so nothing waits for another block.
#pragma once

#include "encode_signs.cuh"
#include "encode_stage.cuh"
#include "encode_stages.cuh"

constexpr int CU_ROWS = RBE_CU_CALIBRATED_ROWS, CU_CHUNK = 32;
enum { CU_ONE, CU_SEVERAL, CU_BY_SIGNS };  // which search

CU_DEVICE double cu_weight_at(const rbe_cu_target &t, int64_t i, int64_t col) {
    return cu_real_at(t.data, t.dtype, i * t.row_stride + col * t.col_stride);
}

// pull[row0 + r, begin .. end) += sum over i < depth of e[r e_stride + i] matrix[first + i, begin .. end), for rows r in `moved`. By the
// whole block, which meets before it and after.
CU_DEVICE void cu_add_rows(const rbe_cu_calibrated &c, int64_t row0, unsigned moved, const float *e, int64_t e_stride, int64_t depth,
                           int64_t first, int64_t begin, int64_t end) {
    CU_SHARED(float, chunk, [CU_CHUNK][CU_ROWS]);
    const int64_t n = c.search.codes.cols;
    for (int64_t i0 = 0; i0 < depth; i0 += CU_CHUNK) {
        const int some = depth - i0 < CU_CHUNK ? (int)(depth - i0) : CU_CHUNK;
        __syncthreads();
        for (int p = (int)threadIdx.x; p < CU_CHUNK * CU_ROWS; p += (int)blockDim.x) {
            const int r = p % CU_ROWS, i = p / CU_ROWS;
            chunk[i][r] = moved >> r & 1u && i < some ? e[r * e_stride + i0 + i] : 0.0f;
        }
        __syncthreads();
        for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
            float sum[CU_ROWS];
            CU_UNROLL
            for (int r = 0; r < CU_ROWS; ++r) sum[r] = moved >> r & 1u ? c.pull[(row0 + r) * n + j] : 0.0f;
            for (int i = 0; i < some; ++i) {
                const float factor = c.matrix[(first + i0 + i) * n + j];
                CU_UNROLL
                for (int r = 0; r < CU_ROWS; ++r) sum[r] += chunk[i][r] * factor;
            }
            CU_UNROLL
            for (int r = 0; r < CU_ROWS; ++r)
                if (moved >> r & 1u) c.pull[(row0 + r) * n + j] = sum[r];
        }
    }
    __syncthreads();
}

// Element e of what the words of a group decode to.
template <class Word>
CU_DEVICE double cu_reconstructed(const rbe_cu_calibrated &c, double gain, const Word *words, int64_t e) {
    const rbe_cu_codes &codes = c.search.codes;
    double q = 0;
    for (int s = 0; s < codes.stages; ++s) {
        const uint32_t word = (uint32_t)words[s];
        const double scale = gain * (codes.scaled ? cu_word_scale(word) : 1.0f);
        const double b = cu_real_at(c.basis, c.target.real, ((int64_t)s * RBE_BASIS_VECTORS + cu_idx(word)) * codes.group + e);
        q += scale * (codes.field == RBE_FIELD_RBE16S && word >> e & 1u ? -b : b);
    }
    return q;
}

// d.v [depth] += w[i, k-th group] F, F the group's factor
CU_DEVICE void cu_add_target(const rbe_cu_calibrated &c, const cu_desk &d, int64_t i, int64_t k, int64_t depth) {
    const int64_t g = c.search.codes.group;
    const double *factor = c.factors + k * g * g;
    for (int64_t e = threadIdx.x & 31; e < depth; e += 32) {
        double sum = d.v[e];
        for (int64_t p = 0; p <= e; ++p) sum += cu_weight_at(c.target, i, k * g + p) * factor[p * depth + e];
        d.v[e] = sum;
    }
    __syncwarp();
}

// The codes of group k of row i whose turned target is d.v; they lie in d.words[0 .. M-1] afterwards.
template <int SEARCH>
CU_DEVICE void cu_search(const rbe_cu_calibrated &c, const cu_desk &d, int64_t i, int64_t k, int64_t depth, double gain) {
    const rbe_cu_search &s = c.search;
    const int lane = (int)threadIdx.x & 31;
    const int64_t g = s.codes.group, q = k * s.codes.stages;
    const double *square = s.square + 2 * k * s.codes.stages * RBE_BASIS_VECTORS;
    for (int64_t e = lane; e < depth; e += 32) {
        const double v = SEARCH == CU_BY_SIGNS ? d.v[e] / gain : d.v[e] / gain * s.unit[k];
        if (SEARCH == CU_SEVERAL) cu_path(s, d, 0)[e] = (float)v;
        else d.v[e] = v;
    }
    __syncwarp();
    if (SEARCH == CU_BY_SIGNS) {
        cu_encode_signs(s.codes.stages, c.basis, c.target.real, depth, c.factors + k * g * g, d.v, d.words);
    } else if (SEARCH == CU_SEVERAL) {
        cu_encode_stages(s, k, depth, square, d, i, q);
    } else {
        const uint32_t word = cu_encode_stage(s, k, depth, d.v, square, cu_only(s.codes, i, q));
        if (lane == 0) d.words[0] = word;
    }
    __syncwarp();
}

// Launches kernels[search] with as many rows a block as have room.
template <class Kernel>
static int cu_launch_rows(Kernel *const *kernels, const rbe_cu_calibrated *c, void *stream) {
    const rbe_cu_codes &codes = c->search.codes;
    const bool several = codes.stages > 1;
    const size_t bytes = cu_desk_bytes(codes.group, several, true);
    const int rows = c->memory ? CU_ROWS : cu_desks_fitting(bytes, CU_ROWS);
    const int search = codes.field == RBE_FIELD_RBE16S ? CU_BY_SIGNS : several ? CU_SEVERAL : CU_ONE;
    return cu_launch(kernels[search], dim3((unsigned)((codes.rows + rows - 1) / rows)), dim3((unsigned)(32 * rows)),
                     c->memory ? 0 : bytes * (size_t)rows, (cudaStream_t)stream, *c, (int64_t)bytes);
}
