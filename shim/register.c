// torch.ops.rbe: the schemas and the exported function that registers them. docs/operators.md describes every argument.
#include <stdio.h>
#include <string.h>

#include "operators.h"

#define RESIDUALS "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_right=None, Tensor? residual_right_scale=None"
#define PLACE "str layout, int in_features, int seed=0, int row0=0, int k0=0"

#define LINEAR_SCHEMA                                                                                                      \
    "(Tensor x, Tensor codes, Tensor basis, Tensor gain, Tensor? bias=None, Tensor? amplitude=None, " RESIDUALS ", *, " PLACE \
    ", bool rounded=True, str accuracy=\"auto\") -> Tensor"
#define BACKWARD_SCHEMA                                                                                                    \
    "linear_backward(Tensor dy, Tensor x, Tensor codes, Tensor basis, Tensor gain, Tensor? bias=None, Tensor? amplitude=None, " \
    RESIDUALS ", *, " PLACE ", bool rounded=True, int wanted=31, str accuracy=\"auto\") -> (Tensor dx, Tensor dbasis, Tensor dgain, Tensor dbias, Tensor damplitude)"

// One letter an argument, as rbe_call wants them: the weight's optional tensors are O, the place is SIIII.
#define LINEAR_KINDS "TTTTOOOOOO" "SIIII" "BS"
#define BOXED(operator, kinds)                                                                \
    static void boxed_##operator(torch_value *stack, uint64_t inputs, uint64_t outputs) {      \
        rbe_call_run("rbe::" #operator, kinds, rbe_op_##operator, stack, inputs, outputs);     \
    }
BOXED(linear, LINEAR_KINDS)
BOXED(linear_backward, "TTTTTOOOOOO" "SIIII" "BIS")
BOXED(decode, "TTTOOOOO" "SIIII" "B")
BOXED(decode_backward, "TTTT" "SIIII")
BOXED(encode, "TTT" "SIIII")
BOXED(encode_calibrated, "TTTTOO" "SIIII" "I")
BOXED(pack, "T" "SIIII")
BOXED(unpack, "T" "SIIII")
BOXED(interleave, "T")
BOXED(deinterleave, "TI")

static const struct {
    const char *name, *schema;
    torch_boxed kernel;
} operators[] = {
    {"linear", "linear" LINEAR_SCHEMA, boxed_linear},
    // The same product without an autograd kernel in front of it: what inference calls.
    {"linear_inference", "linear_inference" LINEAR_SCHEMA, boxed_linear},
    {"linear_backward", BACKWARD_SCHEMA, boxed_linear_backward},
    {"decode", "decode(Tensor codes, Tensor basis, Tensor gain, Tensor? amplitude=None, " RESIDUALS ", *, " PLACE ", bool rounded=True) -> Tensor",
     boxed_decode},
    {"decode_backward", "decode_backward(Tensor gradient, Tensor codes, Tensor basis, Tensor gain, *, " PLACE ") -> (Tensor dbasis, Tensor dgain)",
     boxed_decode_backward},
    {"encode", "encode(Tensor weight, Tensor basis, Tensor gain, *, " PLACE ") -> Tensor", boxed_encode},
    {"encode_calibrated", "encode_calibrated(Tensor weight, Tensor basis, Tensor gain, Tensor hessian, Tensor? factor=None, Tensor? codes=None, *, " PLACE
     ", int sweeps=2) -> Tensor", boxed_encode_calibrated},
    {"pack", "pack(Tensor codes, *, " PLACE ") -> Tensor", boxed_pack},
    {"unpack", "unpack(Tensor packed, *, " PLACE ") -> Tensor", boxed_unpack},
    {"interleave", "interleave(Tensor packed) -> Tensor", boxed_interleave},
    {"deinterleave", "deinterleave(Tensor codes, int rows) -> Tensor", boxed_deinterleave},
};

// Registers everything once a process. Returns 0, or 1 with one sentence in `message`. Called by rbe_torch/_ops.py through ctypes.
__attribute__((visibility("default"))) int rbe_torch_init(char *message, size_t size) {
    static torch_library definitions, kernels, cuda;  // kept for the life of the process, as torch asks
    if (definitions) return 0;
    if (!torch_abi_load(message, size)) return 1;
    torch_error failed = torch.aoti_torch_library_init_def("rbe", __FILE__, __LINE__, &definitions);
    failed |= torch.aoti_torch_library_init_impl("rbe", "CPU", __FILE__, __LINE__, &kernels);
    failed |= torch.aoti_torch_library_init_impl("rbe", "CUDA", __FILE__, __LINE__, &cuda);
    for (size_t i = 0; !failed && i < sizeof operators / sizeof *operators; i++) {
        failed |= torch.aoti_torch_library_def(definitions, operators[i].schema);
        failed |= torch.torch_library_impl(kernels, operators[i].name, operators[i].kernel, TORCH_BUILD_VERSION);
        failed |= torch.torch_library_impl(cuda, operators[i].name, operators[i].kernel, TORCH_BUILD_VERSION);
        if (failed) snprintf(message, size, "torch refused the operator rbe::%s", operators[i].name);
    }
    return failed ? 1 : 0;
}

// For show_config(): the ISA in use, and the kernel that a product takes.
__attribute__((visibility("default"))) const char *rbe_torch_isa(void) { return rbe_isa_name(); }

__attribute__((visibility("default"))) int rbe_torch_has_cuda(void) {
#ifdef RBE_HAVE_CUDA
    return 1;
#else
    return 0;
#endif
}

__attribute__((visibility("default"))) int rbe_torch_reads_interleaved(void) { return rbe_reads_interleaved(); }

__attribute__((visibility("default"))) int rbe_torch_describe_linear(const char *layout, int64_t rows, int64_t cols, int64_t tokens,
                                                                     int dtype, int accuracy, char *text, size_t size) {
    rbe_layout parsed;
    rbe_error err;
    if (rbe_layout_parse(layout, strlen(layout), &parsed, &err) != RBE_OK) return snprintf(text, size, "%s", err.text);
    return rbe_describe_linear(&parsed, rows, cols, tokens, (rbe_dtype)dtype, (rbe_accuracy)accuracy, text, size);
}
