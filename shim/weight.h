// From an operator's arguments to the rbe_weight of the C API: every check that needs a shape or a dtype.
#ifndef RBE_SHIM_WEIGHT_H
#define RBE_SHIM_WEIGHT_H

#include "tensor.h"

// Positions of the arguments that describe a weight, in the operator's stack; -1 where the operator has none.
typedef struct rbe_weight_positions {
    int codes, basis, gain, amplitude, residual;  // residual: the first of four
    int layout;                                   // followed by in_features, seed, row0, k0
    int rounded;
} rbe_weight_positions;

// What the gradients need to know of the tensors they are gradients of.
typedef struct rbe_weight_views {
    rbe_view codes, basis, gain, amplitude;
    bool has_amplitude;
} rbe_weight_views;

// Fills `out` but for cols where `cols` >= 0 gives it (the last dimension of x); -1 takes it from in_features, k0 and the codes.
// real: the type to compute in; basis, gain and amplitude are converted to it.
rbe_status rbe_bind_weight(rbe_call *call, const rbe_weight_positions *at, rbe_dtype real, int64_t cols, rbe_weight *out,
                           rbe_weight_views *views);

// The layout, place and seed alone (pack, unpack, encode), with K and M still to be set.
rbe_status rbe_bind_layout(rbe_call *call, int layout_position, rbe_weight *out, int64_t *in_features);

// Sets K groups and n columns of this shard and checks them against the whole layer's in_features. cols as above.
rbe_status rbe_bind_groups(rbe_call *call, int64_t in_features, int64_t groups, int64_t cols, rbe_weight *out);

// Codes of any form: sets words, packed or interleaved, and rows, and returns K in *groups. Interleaved codes do not tell their rows: they are
// taken where out->rows already says how many there are.
rbe_status rbe_bind_codes(rbe_call *call, const rbe_view *codes, rbe_weight *out, int64_t *groups);

#endif
