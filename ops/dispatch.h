// The kernels that this process uses, chosen once: the best the host has, lowered by RBE_ISA.
#ifndef RBE_DISPATCH_H
#define RBE_DISPATCH_H

#include "../kernels/kernels.h"
#include "rbe.h"

#ifdef __cplusplus
extern "C" {
#endif

// Refused where RBE_ISA has a value that is not an ISA's name.
rbe_status rbe_choose_kernels(const rbe_kernels **kernels, rbe_error *err);

// The table of that name: an ISA, or avx512vbmi, avx512amx (and those below it); NULL where the build or the host lacks it.
const rbe_kernels *rbe_kernels_of(const char *name);

// From now on this process uses that table (NULL: the one chosen from the host and RBE_ISA). For tests: not while a product is computed.
void rbe_use_kernels(const rbe_kernels *kernels);

#ifdef __cplusplus
}
#endif
#endif
