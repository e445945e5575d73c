// The products on a CUDA device: as rbe.h, every pointer of a weight or matrix on the device, nothing waits for it.
//
// Values are not checked, because looking at them would wait for the device: codes of any content are safe to read (launch.h), a gain that
// is not finite gives rows that are not finite. What makes or takes codes (pack, unpack, encode) does check and so waits, once and before its
// own work; only while a graph is captured, where nothing may wait, values go unchecked.
#ifndef RBE_OPS_CUDA_H
#define RBE_OPS_CUDA_H

#include "../kernels/cuda/launch.h"
#include "rbe.h"

#ifdef __cplusplus
extern "C" {
#endif

// Memory that the dense products of a call share, one after the other.
typedef struct rbe_products {
    void *workspace;
    size_t bytes;
} rbe_products;

// Where a call runs, and who lends it memory.
typedef struct rbe_device {
    void *(*allocate)(void *owner, size_t bytes);  // on the device, aligned to 256 bytes, until the call ends; NULL if there is none
    void *owner;
    rbe_products *products;                        // zero before the first one
    void *stream;
    int index;
} rbe_device;

rbe_status rbe_cuda_linear(const rbe_weight *w, const rbe_matrix *x, const void *bias, const rbe_matrix *y, rbe_accuracy accuracy,
                           const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_linear_backward(const rbe_weight *w, const rbe_matrix *dy, const rbe_matrix *x, const rbe_gradients *out,
                                    const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_decode(const rbe_weight *w, void *dense, const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_decode_backward(const rbe_weight *w, const float *dense, float *dbasis, float *dgain, const rbe_device *device,
                                    rbe_error *err);
rbe_status rbe_cuda_encode(const rbe_weight *w, const rbe_matrix *dense, int32_t *words, const rbe_device *device, rbe_error *err);
// Codes to start from, where calibration has no factor, are w->words.
rbe_status rbe_cuda_encode_calibrated(const rbe_weight *w, const rbe_matrix *dense, const rbe_calibration *calibration, int32_t *words,
                                      const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_pack(const rbe_weight *w, uint8_t *packed, const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_unpack(const rbe_weight *w, int32_t *words, const rbe_device *device, rbe_error *err);
rbe_status rbe_cuda_interleave(const uint8_t *packed, int64_t rows, int64_t count, uint8_t *interleaved, const rbe_device *device,
                               rbe_error *err);
rbe_status rbe_cuda_deinterleave(const uint8_t *interleaved, int64_t rows, int64_t count, uint8_t *packed, const rbe_device *device,
                                 rbe_error *err);

// Which path a product takes, by a cost model of operations and bytes (docs/cuda.md); its constants are estimates, not measurements.
typedef enum rbe_cuda_path {
    RBE_CUDA_LOOKUP,       // tables in shared memory, a few tokens of rbe8
    RBE_CUDA_TOKEN,        // a table in memory, up to 16 tokens
    RBE_CUDA_TILES,        // the table of a tile of tokens on the chip, half types
    RBE_CUDA_GATHER,       // the table by cuBLASLt, float32
    RBE_CUDA_FRAGMENTS,    // W decoded into the registers of tensor cores, half types, groups of 8 without a scale
    RBE_CUDA_DECODE_MMA,   // W decoded on the chip, half types
    RBE_CUDA_DECODE_GEMM,  // W decoded into memory, cuBLASLt
} rbe_cuda_path;
rbe_cuda_path rbe_cuda_plan(const rbe_layout *layout, rbe_dtype x, int64_t rows, int64_t cols, int64_t tokens);
bool rbe_cuda_plan_backward_table(const rbe_layout *layout, rbe_dtype x, int64_t rows, int64_t cols, int64_t tokens);
// For tests: an rbe_cuda_path where the layout has it (-1: as planned), and the bytes that a product cut into pieces takes at a time (0:
// 128 MiB).
void rbe_cuda_use_path(int path);
void rbe_cuda_use_workspace(int64_t bytes);

#ifdef __cplusplus
}
#endif
#endif
