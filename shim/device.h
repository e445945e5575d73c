// Where a call runs: the CPU, or a CUDA device with its current stream and memory from torch's caching allocator.
#ifndef RBE_SHIM_DEVICE_H
#define RBE_SHIM_DEVICE_H

#include "call.h"

// Reads where the first tensor is and, on a CUDA device, makes that device current. On failure the call has a message.
rbe_status rbe_enter_device(rbe_call *call);
void rbe_leave_device(rbe_call *call);

// "cpu" or "cuda:1", in a buffer that lives until the next call on this thread.
const char *rbe_device_text(int32_t type, int32_t index);

// Copies between the host and the call's CUDA device; to the host waits for the stream.
rbe_status rbe_from_device(rbe_call *call, void *to, const void *from, size_t bytes);
rbe_status rbe_to_device(rbe_call *call, void *to, const void *from, size_t bytes);

#endif
