"""Loads the C library, which registers ``torch.ops.rbe.*``, and adds what torch wants in Python: fake kernels, autograd, vmap, autocast.

The operators are described in docs/operators.md. How a call travels:

* ``rbe::linear`` has an autograd kernel (_autograd.py) in front of the C kernel. It is a new-style ``autograd.Function``, so that ``torch.func``
  transforms work; for those the call is caught at the functorch front key, before the dispatcher takes it apart.
* ``rbe::linear_inference`` is the same C kernel with no autograd kernel in front: 3 us a call instead of 9.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

import torch
from torch.utils import flop_counter

from . import _fake
from ._autograd import TENSORS, Decode, Linear, LinearBackward, eager, is_dual

MINIMUM_TORCH = (2, 10)
_LIBRARY = Path(__file__).with_name("librbe.dylib" if sys.platform == "darwin" else "librbe.so")
_MESSAGE_BYTES = 512


def _load() -> ctypes.CDLL:
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < MINIMUM_TORCH:
        raise ImportError(f"rbe_torch needs torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}; found torch {torch.__version__}")
    if not _LIBRARY.exists():
        raise ImportError(f"rbe_torch's library {_LIBRARY.name} is missing beside {__file__}: install the package with pip")
    library = ctypes.CDLL(os.fspath(_LIBRARY))
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if library.rbe_torch_init(message, ctypes.c_size_t(_MESSAGE_BYTES)):
        raise ImportError(f"rbe_torch could not register its operators (torch {torch.__version__}): {message.value.decode()}")
    library.rbe_torch_isa.restype = ctypes.c_char_p
    return library


_library = _load()
_ops = torch.ops.rbe

#: Differentiable product, ``docs/operators.md``.
linear = _ops.linear.default
#: The same product without the autograd kernel in front; gradients do not flow through it.
linear_inference = _ops.linear_inference.default


def isa() -> str:
    """Name of the instruction set in use: ``scalar``, ``avx2``, ``avx512`` or ``neon`` (``RBE_ISA`` may lower it)."""
    return _library.rbe_torch_isa().decode()


def has_cuda() -> bool:
    """Whether the library was built with CUDA kernels."""
    return bool(_library.rbe_torch_has_cuda())


def reads_interleaved() -> bool:
    """Whether the CPU kernels in use gain by interleaved codes (``docs/format.md``)."""
    return bool(_library.rbe_torch_reads_interleaved())


def describe_linear(layout: str, out_features: int, in_features: int, tokens: int, dtype: torch.dtype = torch.float32,
                    accuracy: str = "auto") -> str:
    """The kernel that a product of packed codes with x [tokens, in_features] of this dtype takes, in words."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the order of rbe_dtype
    if dtype not in dtypes:
        raise TypeError(f"dtype: is {dtype}, must be one of {', '.join(map(str, dtypes))}")
    if dtype == torch.float64:
        return "reference, float64"
    text = ctypes.create_string_buffer(_MESSAGE_BYTES)
    _library.rbe_torch_describe_linear(
        layout.encode(), ctypes.c_int64(out_features), ctypes.c_int64(in_features), ctypes.c_int64(tokens),
        ctypes.c_int(dtypes.index(dtype)),
        ctypes.c_int(("auto", "exact", "fast").index(accuracy)), text, ctypes.c_size_t(_MESSAGE_BYTES),
    )  # fmt: skip
    return text.value.decode()


# ---- registration ------------------------------------------------------------------------------------------------------------
def _register(library: torch.library.Library, name: str, function: type[torch.autograd.Function], tensors: int, autograd: bool) -> None:
    op, fast = getattr(_ops, name).default, eager(function)

    def apply(*args, **keywords):
        return function.apply(*args, *(None,) * (tensors - len(args)), keywords)

    def autograd_kernel(keyset, *args, **keywords):
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or is_dual(args):
            return fast.apply(*args, *(None,) * (tensors - len(args)), keywords)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **keywords)

    if autograd:
        library.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    library.impl(name, apply, "FuncTorchDynamicLayerFrontMode")


def _autocast_kernel(op, device: str, key: torch._C.DispatchKeySet, x: torch.Tensor, *args, **keywords):
    """Casts the activations alone: basis, gain and amplitude are the format's numbers and lose nothing."""
    with torch._C._ExcludeDispatchKeyGuard(key):
        if x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return op(x, *args, **keywords)


def _refuse_nested(name: str, *_, **__):
    raise RuntimeError(f"rbe::{name}: x: is a nested tensor, must be a dense one; of a jagged one pass x.values() [all rows, in_features], and make the "
                    "result nested with torch.nested.nested_tensor_from_jagged(y, x.offsets())")


def _register_all() -> torch.library.Library:
    library = torch.library.Library("rbe", "IMPL")
    for name in ("linear", "linear_inference", "linear_backward"):
        for key in ("AutogradNestedTensor", "NestedTensorCPU", "NestedTensorCUDA"):
            library.impl(name, functools.partial(_refuse_nested, name), key)
    _register(library, "linear", Linear, TENSORS, autograd=True)
    _register(library, "linear_inference", Linear, TENSORS, autograd=False)
    _register(library, "linear_backward", LinearBackward, TENSORS + 1, autograd=True)
    _register(library, "decode", Decode, 8, autograd=True)
    for device in ("cpu", "cuda"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
        for name in ("linear", "linear_inference"):
            kernel = functools.partial(_autocast_kernel, getattr(_ops, name).default, device, key)
            library.impl(name, kernel, f"Autocast{device.upper()}")
    for name, fake in _fake.KERNELS.items():
        torch.library.register_fake(f"rbe::{name}", fake, lib=library)
    for name, formula in _fake.FLOPS.items():
        flop_counter.register_flop_formula(getattr(_ops, name))(formula)
    return library


_registrations = _register_all()
