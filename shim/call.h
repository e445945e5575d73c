// One call of a boxed kernel: its arguments, what it allocated, its results, and the one way out.
//
// A kernel is written as `rbe_status body(rbe_call *call)` that reads arguments by position, stores results with rbe_call_result and returns a
// status. rbe_call_run frees every argument and every temporary on every path; on failure it also frees the results and raises.
#ifndef RBE_SHIM_CALL_H
#define RBE_SHIM_CALL_H

#include "../ops/cuda.h"
#include "../ops/rbe.h"
#include "torch_abi.h"

enum { RBE_CALL_ARGUMENTS = 20, RBE_CALL_TEMPORARIES = 24, RBE_CALL_RESULTS = 5 };

// Where the tensors of the call are (device.h).
typedef struct rbe_place {
    int32_t type, index;  // torch's numbers
    bool cuda;
    int before;         // the device that was current
    rbe_device device;  // of a CUDA call
    rbe_products products;
    torch_tensor *tensors;  // its workspaces
    int tensor_count, tensor_room;
} rbe_place;

typedef struct rbe_call {
    const char *name;   // "rbe::linear", the start of every message
    const char *kinds;  // one letter an argument: T tensor, O optional tensor, S str, I int, B bool
    torch_value arguments[RBE_CALL_ARGUMENTS];
    void *temporaries[RBE_CALL_TEMPORARIES];
    int temporary_count;
    torch_tensor results[RBE_CALL_RESULTS];
    int result_count;
    rbe_place place;
    rbe_error err;
} rbe_call;

// Fails with "<name>: <sentence>".
rbe_status rbe_call_fail(rbe_call *call, const char *format, ...) __attribute__((format(printf, 2, 3)));

torch_tensor rbe_call_tensor(const rbe_call *call, int i);  // NULL for an optional tensor that is None
void rbe_call_string(const rbe_call *call, int i, const char **text, size_t *length);
static inline int64_t rbe_call_int(const rbe_call *call, int i) { return (int64_t)call->arguments[i]; }
static inline bool rbe_call_bool(const rbe_call *call, int i) { return call->arguments[i] != 0; }

// A constant in a build without CUDA kernels, so that what it guards is not compiled in.
#ifdef RBE_HAVE_CUDA
#define rbe_on_cuda(call) ((call)->place.cuda)
#else
#define rbe_on_cuda(call) ((void)(call), false)
#endif

// Memory where the call's tensors are that lives until the call ends, or NULL.
void *rbe_call_allocate(rbe_call *call, size_t bytes);

// A new contiguous tensor on the call's device, the next result; *data is where to write. dtype is torch's number.
rbe_status rbe_call_result(rbe_call *call, int dims, const int64_t *sizes, int32_t dtype, void **data);

void rbe_call_run(const char *name, const char *kinds, rbe_status (*body)(rbe_call *), torch_value *stack, uint64_t inputs, uint64_t outputs);

// torch's thread pool, as rbe_parallel wants it.
rbe_parallel rbe_torch_threads(void);

#endif
