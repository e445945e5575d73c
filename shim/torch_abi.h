// The part of PyTorch's stable C ABI that the shim uses: own prototypes and a table of functions filled by dlsym at load time.
//
// No torch header is included and libtorch is not linked: one binary serves every torch from 2.10 on. A tensor handle that a boxed kernel
// finds on its stack belongs to the kernel, which frees it on every path; handles written to the stack belong to torch.
#ifndef RBE_TORCH_ABI_H
#define RBE_TORCH_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef void *torch_tensor;
typedef void *torch_string;
typedef void *torch_library;
typedef uint64_t torch_value;  // StableIValue: a handle, an integer, or the bits of a double
typedef int32_t torch_error;   // 0 is success
typedef void (*torch_boxed)(torch_value *stack, uint64_t inputs, uint64_t outputs);
typedef void (*torch_body)(int64_t begin, int64_t end, void *context);

#define TORCH_MINIMUM "2.10"
#define TORCH_BUILD_VERSION ((2ULL << 56) | (10ULL << 48))

// X(name, result, arguments): every function is in torch >= 2.10, except those of TORCH_OPTIONAL_SYMBOLS, which may stay NULL.
#define TORCH_SYMBOLS(X)                                                                                                              \
    X(aoti_torch_library_init_def, torch_error, (const char *ns, const char *file, uint32_t line, torch_library *out))                \
    X(aoti_torch_library_init_impl, torch_error, (const char *ns, const char *key, const char *file, uint32_t line, torch_library *out)) \
    X(aoti_torch_library_def, torch_error, (torch_library lib, const char *schema))                                                   \
    X(torch_library_impl, torch_error, (torch_library lib, const char *name, torch_boxed kernel, uint64_t build_version))             \
    X(aoti_torch_check, void, (bool condition, const char *func, const char *file, uint32_t line, const char *message))               \
    X(aoti_torch_delete_tensor_object, torch_error, (torch_tensor t))                                                                 \
    X(aoti_torch_empty_strided, torch_error,                                                                                          \
      (int64_t dims, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device, int32_t index, torch_tensor *out))  \
    X(aoti_torch_get_dim, torch_error, (torch_tensor t, int64_t *out))                                                                \
    X(aoti_torch_get_sizes, torch_error, (torch_tensor t, int64_t **out))                                                             \
    X(aoti_torch_get_strides, torch_error, (torch_tensor t, int64_t **out))                                                           \
    X(aoti_torch_get_dtype, torch_error, (torch_tensor t, int32_t *out))                                                              \
    X(aoti_torch_get_layout, torch_error, (torch_tensor t, int32_t *out))                                                             \
    X(aoti_torch_get_device_type, torch_error, (torch_tensor t, int32_t *out))                                                        \
    X(aoti_torch_get_device_index, torch_error, (torch_tensor t, int32_t *out))                                                       \
    X(torch_get_const_data_ptr, torch_error, (torch_tensor t, const void **out))                                                      \
    X(torch_get_mutable_data_ptr, torch_error, (torch_tensor t, void **out))                                                          \
    X(torch_string_c_str, torch_error, (torch_string s, const char **out))                                                            \
    X(torch_string_length, torch_error, (torch_string s, size_t *out))                                                                \
    X(torch_delete_string, torch_error, (torch_string s))                                                                             \
    X(torch_parallel_for, torch_error, (int64_t begin, int64_t end, int64_t grain, torch_body body, void *context))                   \
    X(torch_get_num_threads, torch_error, (uint32_t *out))                                                                            \
    X(aoti_torch_device_type_cpu, int32_t, (void))                                                                                    \
    X(aoti_torch_device_type_cuda, int32_t, (void))                                                                                   \
    X(aoti_torch_layout_strided, int32_t, (void))                                                                                     \
    X(aoti_torch_dtype_float32, int32_t, (void))                                                                                      \
    X(aoti_torch_dtype_float64, int32_t, (void))                                                                                      \
    X(aoti_torch_dtype_float16, int32_t, (void))                                                                                      \
    X(aoti_torch_dtype_bfloat16, int32_t, (void))                                                                                     \
    X(aoti_torch_dtype_float8_e4m3fn, int32_t, (void))                                                                                \
    X(aoti_torch_dtype_uint8, int32_t, (void))                                                                                        \
    X(aoti_torch_dtype_int8, int32_t, (void))                                                                                         \
    X(aoti_torch_dtype_int32, int32_t, (void))

// torch_delete_stable_ivalue is in torch >= 2.13; before, the box of an optional argument is freed by C++'s operator delete.
#define TORCH_OPTIONAL_SYMBOLS(X)                                   \
    X(torch_delete_stable_ivalue, torch_error, (torch_value * box)) \
    X(_ZdlPv, void, (void *box))

typedef struct torch_abi {
#define X(name, result, arguments) result(*name) arguments;
    TORCH_SYMBOLS(X)
    TORCH_OPTIONAL_SYMBOLS(X)
#undef X
} torch_abi;

extern torch_abi torch;

// Fills the table. On failure writes which function was missing into `message` and returns false.
bool torch_abi_load(char *message, size_t size);

#endif
