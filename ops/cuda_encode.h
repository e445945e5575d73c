// What the two encoders share on a CUDA device: a search with its tables, and checks of values that are read back together.
#ifndef RBE_OPS_CUDA_ENCODE_H
#define RBE_OPS_CUDA_ENCODE_H

#include "../kernels/cuda/encode.h"
#include "cuda_internal.h"
#include "encode.h"

// Places of values that cannot be used, as rbe_cu_check_values leaves them.
typedef enum rbe_cuda_place {
    RBE_PLACE_WEIGHT,
    RBE_PLACE_BASIS,
    RBE_PLACE_GAIN,
    RBE_PLACE_GAIN_POSITIVE,
    RBE_PLACE_HESSIAN,
    RBE_PLACE_FACTOR,
    RBE_PLACE_DIAGONAL,
    RBE_PLACE_FACTOR_DIAGONAL,
    RBE_PLACE_INDEFINITE,  // of a group
    RBE_PLACES,
} rbe_cuda_place;

// Launches the checks of weight, basis and gain; *places: RBE_PLACES numbers on the device.
rbe_status rbe_cuda_check_encoding(const rbe_weight *w, const rbe_matrix *dense, const rbe_device *device, unsigned long long **places,
                                   rbe_error *err);
// Waits for the checks and refuses what they found; in the capture of a graph, where nothing may wait, does nothing.
rbe_status rbe_cuda_refuse(const rbe_weight *w, const unsigned long long *places, const rbe_device *device, rbe_error *err);

// A search for the codes of w with `tables` tables of vectors of type `real`; memory alone. Then the tables' contents.
rbe_status rbe_cuda_take_search(const rbe_cuda_weight *w, int64_t tables, const rbe_device *device, rbe_cu_search *out, rbe_error *err);
rbe_status rbe_cuda_fill_search(rbe_cu_search *search, const void *vectors, rbe_dtype real, const rbe_device *device, rbe_error *err);

rbe_cu_target rbe_cuda_target(const rbe_weight *w, const rbe_matrix *dense);

#endif
