// The representable scale nearest to a number, in float64 distance, ties to the lowest unsigned word.
#ifndef RBE_ENCODE_SCALE_H
#define RBE_ENCODE_SCALE_H

#include "rbe.h"

typedef struct rbe_nearest {
    double scale;   // the float32 value that the word decodes to
    uint32_t word;  // all fields but idx
} rbe_nearest;

// field: one whose codes have a scale. target must be finite. Thread-safe.
rbe_nearest rbe_nearest_scale(rbe_field field, double target);

#endif
