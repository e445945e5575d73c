// Fills the table of torch's C functions from the libtorch_cpu that the process has already loaded.
#define _GNU_SOURCE
#include "torch_abi.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

torch_abi torch;

#ifdef __APPLE__
static const char *const libtorch = "libtorch_cpu.dylib";
#else
static const char *const libtorch = "libtorch_cpu.so";
#endif

// ISO C has no cast from an object to a function pointer; POSIX promises that the bits fit.
static bool find(void *library, const char *name, void *slot) {
    void *symbol = dlsym(library, name);
    memcpy(slot, &symbol, sizeof symbol);
    return symbol != NULL;
}

bool torch_abi_load(char *message, size_t size) {
    // torch's libraries are loaded RTLD_LOCAL: their symbols are reached through the library's own handle, never through the global scope.
    void *library = dlopen(libtorch, RTLD_NOW | RTLD_NOLOAD);
    if (!library) {
        snprintf(message, size, "%s is not loaded: import torch before rbe_torch's library", libtorch);
        return false;
    }
#define X(name, result, arguments)                                                                                               \
    if (!find(library, #name, &torch.name)) {                                                                                    \
        snprintf(message, size, "this torch has no function %s; rbe_torch needs torch >= %s", #name, TORCH_MINIMUM);             \
        return false;                                                                                                            \
    }
    TORCH_SYMBOLS(X)
#undef X
#define X(name, result, arguments) find(library, #name, &torch.name);
    TORCH_OPTIONAL_SYMBOLS(X)
#undef X
    if (!torch.torch_delete_stable_ivalue && !torch._ZdlPv) {
        snprintf(message, size, "this torch offers no way to free an optional argument; rbe_torch needs torch >= %s", TORCH_MINIMUM);
        return false;
    }
    return true;
}
