// The life of one boxed call: take the stack, run the body, free what was given, hand over the results or raise.
#include "device.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

rbe_status rbe_call_fail(rbe_call *call, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->err.text, sizeof call->err.text, format, arguments);
    va_end(arguments);
    return RBE_BAD_ARGUMENT;
}

torch_tensor rbe_call_tensor(const rbe_call *call, int i) {
    torch_value value = call->arguments[i];
    if (call->kinds[i] == 'O') {
        return value ? (torch_tensor)(uintptr_t)*(const torch_value *)(uintptr_t)value : NULL;
    }
    return (torch_tensor)(uintptr_t)value;
}

void rbe_call_string(const rbe_call *call, int i, const char **text, size_t *length) {
    torch_string s = (torch_string)(uintptr_t)call->arguments[i];
    torch.torch_string_c_str(s, text);
    torch.torch_string_length(s, length);
}

void *rbe_call_allocate(rbe_call *call, size_t bytes) {
    if (rbe_on_cuda(call)) return call->place.device.allocate(call, bytes ? bytes : 1);
    if (call->temporary_count == RBE_CALL_TEMPORARIES) return NULL;
    void *memory = malloc(bytes ? bytes : 1);
    if (memory) call->temporaries[call->temporary_count++] = memory;
    return memory;
}

static int64_t element_size(int32_t dtype) {
    if (dtype == torch.aoti_torch_dtype_uint8()) return 1;
    if (dtype == torch.aoti_torch_dtype_bfloat16() || dtype == torch.aoti_torch_dtype_float16()) return 2;
    return dtype == torch.aoti_torch_dtype_float64() ? 8 : 4;
}

// A result so large that malloc takes it from the system each time is written first in pages that the system clears one by one: a third of the time
// of a product with many tokens. Asks for large pages; a refusal costs nothing.
static void ask_for_large_pages(void *data, int64_t bytes) {
#ifdef __linux__
    enum { LARGE_RESULT = 16 << 20, LARGE_PAGE = 2 << 20 };
    if (bytes < LARGE_RESULT) return;
    const uintptr_t begin = ((uintptr_t)data + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE, end = ((uintptr_t)data + (uintptr_t)bytes) / LARGE_PAGE * LARGE_PAGE;
    madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

rbe_status rbe_call_result(rbe_call *call, int dims, const int64_t *sizes, int32_t dtype, void **data) {
    int64_t strides[64], step = 1;
    for (int d = dims - 1; d >= 0; d--) {
        strides[d] = step;
        step *= sizes[d] > 0 ? sizes[d] : 1;
    }
    torch_tensor t = NULL;
    if (torch.aoti_torch_empty_strided(dims, sizes, strides, dtype, call->place.type, call->place.index, &t)) {
        rbe_call_fail(call, "out of memory: torch could not allocate a result of %lld elements", (long long)step);
        return RBE_OUT_OF_MEMORY;
    }
    call->results[call->result_count++] = t;
    torch.torch_get_mutable_data_ptr(t, data);
    if (!rbe_on_cuda(call)) ask_for_large_pages(*data, step * element_size(dtype));
    return RBE_OK;
}

static void free_argument(char kind, torch_value value) {
    void *handle = (void *)(uintptr_t)value;
    if (kind == 'T') torch.aoti_torch_delete_tensor_object(handle);
    if (kind == 'S') torch.torch_delete_string(handle);
    if (kind == 'O' && handle) {
        torch_value *box = handle;
        torch.aoti_torch_delete_tensor_object((void *)(uintptr_t)*box);
        if (torch.torch_delete_stable_ivalue) {
            torch.torch_delete_stable_ivalue(box);
        } else {
            torch._ZdlPv(box);
        }
    }
}

void rbe_call_run(const char *name, const char *kinds, rbe_status (*body)(rbe_call *), torch_value *stack, uint64_t inputs,
                  uint64_t outputs) {
    rbe_call call = {.name = name, .kinds = kinds};
    (void)outputs;
    memcpy(call.arguments, stack, inputs * sizeof *stack);

    rbe_status status = rbe_enter_device(&call);
    if (status == RBE_OK) status = body(&call);
    rbe_leave_device(&call);

    for (uint64_t i = 0; i < inputs; i++) free_argument(kinds[i], call.arguments[i]);
    for (int i = 0; i < call.temporary_count; i++) free(call.temporaries[i]);
    if (status == RBE_OK) {
        for (int i = 0; i < call.result_count; i++) stack[i] = (torch_value)(uintptr_t)call.results[i];
        return;
    }
    for (int i = 0; i < call.result_count; i++) torch.aoti_torch_delete_tensor_object(call.results[i]);

    // Raising is the last statement: it unwinds through this frame, and nothing is left to free.
    char message[sizeof call.err.text + 64];
    snprintf(message, sizeof message, "%s: %s", name, call.err.text);
    torch.aoti_torch_check(false, name, __FILE__, __LINE__, message);
}

static void run_on_torch_pool(void *pool, int64_t begin, int64_t end, int64_t grain, rbe_body body, void *context) {
    (void)pool;
    torch.torch_parallel_for(begin, end, grain, body, context);
}

rbe_parallel rbe_torch_threads(void) {
    uint32_t threads = 1;
    torch.torch_get_num_threads(&threads);
    return (rbe_parallel){.run = run_on_torch_pool, .threads = (int)threads};
}
