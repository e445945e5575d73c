// Entering and leaving the device of a call, and its memory.
#define _GNU_SOURCE
#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *rbe_device_text(int32_t type, int32_t index) {
    static _Thread_local char text[32];
    if (type == torch.aoti_torch_device_type_cpu()) return "cpu";
    snprintf(text, sizeof text, type == torch.aoti_torch_device_type_cuda() ? "cuda:%d" : "another device", (int)index);
    return text;
}

// 1 in the library of tests/cuda whose kernels run on the CPU: CPU tensors go the way of CUDA tensors.
#ifndef RBE_CUDA_ON_HOST
#define RBE_CUDA_ON_HOST 0
#endif

#ifdef RBE_HAVE_CUDA
// Device memory is a torch tensor of bytes: torch's caching allocator keeps it for later work on the same stream once the tensor is freed,
// so it may be freed before the kernels have run, and it belongs to the graph where one is captured.
static void *allocate(void *owner, size_t bytes) {
    rbe_call *call = owner;
    rbe_place *place = &call->place;
    if (place->tensor_count == place->tensor_room) {
        const int room = place->tensor_room ? 2 * place->tensor_room : 32;
        torch_tensor *more = realloc(place->tensors, (size_t)room * sizeof *more);
        if (!more) return NULL;
        place->tensors = more;
        place->tensor_room = room;
    }
    const int64_t size[1] = {(int64_t)bytes}, stride[1] = {1};
    torch_tensor t = NULL;
    void *data = NULL;
    if (torch.aoti_torch_empty_strided(1, size, stride, torch.aoti_torch_dtype_uint8(), place->type, place->index, &t)) return NULL;
    place->tensors[place->tensor_count++] = t;
    torch.torch_get_mutable_data_ptr(t, &data);
    return data;
}

// In a library of its own, which a CPU build of torch does not have.
static rbe_status current_stream(rbe_call *call, void **stream) {
    static torch_error (*get)(int32_t index, void **stream);
    if (!get) {
        void *library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
        void *symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : NULL;
        memcpy(&get, &symbol, sizeof symbol);
    }
    if (get && get(call->place.index, stream) == 0) return RBE_OK;
    rbe_call_fail(call, "cuda:%d: torch does not say which stream is current", (int)call->place.index);
    return RBE_DEVICE_FAILED;
}
#endif

rbe_status rbe_enter_device(rbe_call *call) {
    rbe_place *place = &call->place;
    torch_tensor first = rbe_call_tensor(call, 0);  // every operator has a tensor there
    torch.aoti_torch_get_device_type(first, &place->type);
    torch.aoti_torch_get_device_index(first, &place->index);
    place->cuda = RBE_CUDA_ON_HOST || place->type == torch.aoti_torch_device_type_cuda();
    if (!place->cuda) return RBE_OK;
#ifdef RBE_HAVE_CUDA
    place->device = (rbe_device){.allocate = allocate, .owner = call, .products = &place->products,
                                   .index = RBE_CUDA_ON_HOST ? 0 : place->index};
    place->before = rbe_cu_use_device(place->index);
    if (place->before < 0) {
        rbe_call_fail(call, "cuda:%d: cannot be made the current device", (int)place->index);
        return RBE_DEVICE_FAILED;
    }
    return RBE_CUDA_ON_HOST ? RBE_OK : current_stream(call, &place->device.stream);
#else
    rbe_call_fail(
        call, "the tensors are on %s, but this rbe_torch was built without CUDA kernels; build it where nvcc is: RBE_CUDA=1 pip install .",
        rbe_device_text(place->type, place->index));
    return RBE_DEVICE_FAILED;
#endif
}

void rbe_leave_device(rbe_call *call) {
    rbe_place *place = &call->place;
    for (int i = 0; i < place->tensor_count; i++) torch.aoti_torch_delete_tensor_object(place->tensors[i]);
    free(place->tensors);
#ifdef RBE_HAVE_CUDA
    if (place->cuda && place->before >= 0 && place->before != place->index) rbe_cu_use_device(place->before);
#endif
}

rbe_status rbe_from_device(rbe_call *call, void *to, const void *from, size_t bytes) {
    if (!rbe_on_cuda(call)) return RBE_OK;
    const int failed = rbe_cu_to_host(to, from, bytes, call->place.device.stream);
    return failed ? (rbe_call_fail(call, "CUDA: a copy to the host failed: %s", rbe_cu_error_text(failed)), RBE_DEVICE_FAILED) : RBE_OK;
}

rbe_status rbe_to_device(rbe_call *call, void *to, const void *from, size_t bytes) {
    if (!rbe_on_cuda(call)) return RBE_OK;
    const int failed = rbe_cu_to_device(to, from, bytes, call->place.device.stream);
    return failed ? (rbe_call_fail(call, "CUDA: a copy to the device failed: %s", rbe_cu_error_text(failed)), RBE_DEVICE_FAILED) : RBE_OK;
}
