"""Loads the C library, which registers ``torch.ops.rbe.*``, and adds what torch wants in Python: fake kernels, autograd, vmap, autocast.

The operators are described in docs/operators.md. How a call travels:

* ``rbe::linear`` has an autograd kernel (here) in front of the C kernel. It is a new-style ``autograd.Function``, so that ``torch.func``
  transforms work; for those the call is caught at the functorch front key, before the dispatcher takes it apart.
* ``rbe::linear_inference`` is the same C kernel with no autograd kernel in front: 3 us a call instead of 9.
* The backward is ``rbe::linear_backward``; its own derivative (double backward) runs on the dense reference in torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils import flop_counter

from .layout import Layout

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


# ---- fake kernels: shapes and dtypes without data --------------------------------------------------------------------------------
def _same_device(**tensors: torch.Tensor | None) -> None:
    first_name, first = next((name, t) for name, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is not None and t.device != first.device:
            raise RuntimeError(f"{name}: is on {t.device}; must be on {first.device} like {first_name}")


def _fake_linear(x, codes, basis, gain, bias=None, amplitude=None, residual=None, residual_scale=None, residual_right=None,
                 residual_right_scale=None, **_):  # fmt: skip
    _same_device(x=x, codes=codes, basis=basis, gain=gain, bias=bias, amplitude=amplitude, residual=residual)
    return x.new_empty(*x.shape[:-1], gain.shape[0])


def _fake_linear_backward(dy, x, codes, basis, gain, bias=None, amplitude=None, residual=None, residual_scale=None, residual_right=None,
                          residual_right_scale=None, *, wanted=31, **_):  # fmt: skip
    _same_device(x=x, dy=dy, codes=codes, basis=basis, gain=gain, bias=bias, amplitude=amplitude, residual=residual)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    like = (x, basis, gain, bias, amplitude)
    return tuple(
        (x if t is None else t).new_empty(t.shape if t is not None and wanted >> i & 1 else (0,), dtype=real if t is None else t.dtype)
        for i, t in enumerate(like)
    )


def _columns(groups, *, layout, in_features, k0=0):
    """Columns of the shard that starts at group k0: the last one may be ragged."""
    group = Layout.parse(layout).group
    return torch.sym_min(groups * group, in_features - k0 * group)


def _groups(codes, layout, in_features, k0):
    """K of a shard: of words, or of packed bytes, whose padding could hold codes of a few bits that are not meant."""
    parsed = Layout.parse(layout)
    if codes.dtype == torch.int32:
        return codes.shape[1]
    if codes.dim() == 3:  # interleaved
        return codes.shape[1] // parsed.stages
    held = codes.shape[1] * 8 // (parsed.bits * parsed.stages)
    return held if parsed.bits * parsed.stages >= 8 else torch.sym_min(held, parsed.groups(in_features) - k0)


def _fake_decode(codes, basis, gain, amplitude=None, residual=None, residual_scale=None, residual_right=None, residual_right_scale=None, *,
                 layout, in_features, k0=0, **_):  # fmt: skip
    real = torch.float64 if basis.dtype == torch.float64 else torch.float32
    return basis.new_empty(gain.shape[0], _columns(_groups(codes, layout, in_features, k0), layout=layout, in_features=in_features, k0=k0), dtype=real)


def _fake_decode_backward(gradient, codes, basis, gain, **_):
    return basis.new_empty(basis.shape, dtype=torch.float32), gain.new_empty(gain.shape, dtype=torch.float32)


def _fake_encode(weight, basis, gain, *, layout, **_):
    parsed = Layout.parse(layout)
    return weight.new_empty(weight.shape[0], (weight.shape[1] + parsed.group - 1) // parsed.group, parsed.stages, dtype=torch.int32)


def _fake_encode_calibrated(weight, basis, gain, hessian, factor=None, codes=None, *, layout, **_):
    return _fake_encode(weight, basis, gain, layout=layout)


def _fake_pack(codes, *, layout, **_):
    parsed = Layout.parse(layout)
    return codes.new_empty(codes.shape[0], (codes.shape[1] * parsed.stages * parsed.bits + 7) // 8, dtype=torch.uint8)


def _fake_unpack(packed, *, layout, in_features, k0=0, **_):
    return packed.new_empty(packed.shape[0], _groups(packed, layout, in_features, k0), Layout.parse(layout).stages, dtype=torch.int32)


def _fake_interleave(packed):
    return packed.new_empty((packed.shape[0] + 63) // 64, packed.shape[1], 64)


def _fake_deinterleave(codes, rows):
    return codes.new_empty(rows, codes.shape[1])


# ---- FLOPs -----------------------------------------------------------------------------------------------------------------------
def _flops(x_shape, basis_shape, gain_shape, layout, passes: tuple[int, int]) -> int:
    """Multiply-adds count twice. passes: how often the table (256 n T) and the gather (m K M T) are walked; rbe16s decodes: m n T each."""
    tokens, m, n = math.prod(x_shape[:-1]), gain_shape[0], x_shape[-1]
    stages, _, group = basis_shape
    if layout.startswith("rbe16s"):
        return 2 * tokens * m * n * passes[1]
    return 2 * tokens * stages * (passes[0] * 256 * n + passes[1] * m * -(-n // group))


def _linear_flops(x_shape, codes_shape, basis_shape, gain_shape, *args, layout, out_shape=None, **keywords) -> int:
    return _flops(x_shape, basis_shape, gain_shape, layout, passes=(1, 1))


def _linear_backward_flops(dy_shape, x_shape, codes_shape, basis_shape, gain_shape, *args, layout, out_shape=None, **keywords) -> int:
    return _flops(x_shape, basis_shape, gain_shape, layout, passes=(3, 2))


# ---- autograd --------------------------------------------------------------------------------------------------------------------
# Positional tensors of rbe::linear, in order; the gradients of linear_backward come in the order of _GRADIENTS, bit i of `wanted` each.
_TENSORS = 10
_GRADIENTS = (0, 2, 3, 4, 5)  # x, basis, gain, bias, amplitude


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args[:-1], **args[-1])


def _loop_over_batch(apply, batch_size, in_dims, args):
    """vmap's last resort: one call per element of the batch, results stacked at dimension 0."""
    results = [
        apply(*(a if d is None else a.select(d, b) for a, d in zip(args, in_dims, strict=True))) for b in range(batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])
    return torch.stack(results), 0


class _Linear(torch.autograd.Function):
    """y = x W^T + bias; arguments: the 10 tensors, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.linear.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:_TENSORS])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, dy):
        wanted = sum(1 << i for i, position in enumerate(_GRADIENTS) if ctx.needs_input_grad[position])
        keywords = {k: v for k, v in ctx.keywords.items() if k != "accuracy"}
        got = _ops.linear_backward(dy, *ctx.saved_tensors, **keywords, wanted=wanted)
        gradients: list[Any] = [None] * (_TENSORS + 1)
        for i, position in enumerate(_GRADIENTS):
            if wanted >> i & 1:
                gradients[position] = got[i]
        return tuple(gradients)

    @staticmethod
    def vmap(info, in_dims, *args):
        if all(d is None for d in in_dims[1:_TENSORS]):
            return _Linear.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return _loop_over_batch(_Linear.apply, info.batch_size, _dims(in_dims), args)


class _LinearBackward(torch.autograd.Function):
    """The gradients of _Linear, themselves differentiable; arguments: dy, the 10 tensors, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.linear_backward.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: _TENSORS + 1])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, *cotangents):
        from . import reference

        keywords = dict(ctx.keywords)
        wanted = keywords.pop("wanted", 31)
        dy, *tensors = ctx.saved_tensors
        chosen = [p for i, p in enumerate(_GRADIENTS) if wanted >> i & 1 and tensors[p] is not None]
        free = [p for p in _GRADIENTS if tensors[p] is not None]

        def product(*values):
            filled = list(tensors)
            for position, value in zip(free, values, strict=True):
                filled[position] = value
            return reference.linear(*filled, **keywords)

        def first_gradients(dy, *values):
            _, vjp = torch.func.vjp(product, *values)
            return tuple(g for p, g in zip(free, vjp(dy), strict=True) if p in chosen)

        _, vjp = torch.func.vjp(first_gradients, dy, *(tensors[p] for p in free))
        second = vjp(tuple(c for i, c in enumerate(cotangents) if wanted >> i & 1 and tensors[_GRADIENTS[i]] is not None))
        gradients: list[Any] = [second[0]] + [None] * (_TENSORS + 1)
        for position, gradient in zip(free, second[1:], strict=True):
            gradients[1 + position] = gradient
        return tuple(gradients)

    @staticmethod
    def vmap(info, in_dims, *args):
        only_tokens = all(d is None for d in in_dims[2 : _TENSORS + 1])
        if only_tokens and args[-1].get("wanted", 31) == 1 and in_dims[0] is not None and in_dims[1] is not None:
            moved = (args[0].movedim(in_dims[0], 0), args[1].movedim(in_dims[1], 0))
            return _LinearBackward.apply(*moved, *args[2:]), (0, None, None, None, None)
        return _loop_over_batch(_LinearBackward.apply, info.batch_size, _dims(in_dims), args)


class _Decode(torch.autograd.Function):
    """W from codes; arguments: the 8 tensors of rbe::decode, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.decode.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, dw):
        from . import reference

        codes, basis, gain, amplitude, *residuals = ctx.saved_tensors

        def dense(basis, gain, amplitude):
            return reference.decode(codes, basis, gain, amplitude, *residuals, **ctx.keywords)

        if amplitude is None:
            _, vjp = torch.func.vjp(lambda basis, gain: dense(basis, gain, None), basis, gain)
            return (None, *vjp(dw), None, *(None,) * 5)
        _, vjp = torch.func.vjp(dense, basis, gain, amplitude)
        return (None, *vjp(dw), *(None,) * 5)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(_Decode.apply, info.batch_size, _dims(in_dims), args)


def _dims(in_dims):
    """in_dims with the dict of keyword arguments (a pytree to vmap) as one unbatched argument."""
    return (*in_dims[:-1], None)


def _dual(args) -> bool:
    """Whether forward-mode AD is on and an argument carries a tangent: the Function then says that jvp is not implemented."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


def _eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function in the old style, with ctx in forward: half the overhead, but torch.func refuses it, so it is for eager calls alone."""

    def forward(ctx, *args):
        function.setup_context(ctx, args, None)
        return function.forward(*args)

    base = torch.autograd.Function
    return type(function.__name__, (function,), {"forward": staticmethod(forward), "setup_context": staticmethod(base.setup_context)})


def _register(library: torch.library.Library, name: str, function: type[torch.autograd.Function], tensors: int, autograd: bool) -> None:
    op, eager = getattr(_ops, name).default, _eager(function)

    def apply(*args, **keywords):
        return function.apply(*args, *(None,) * (tensors - len(args)), keywords)

    def autograd_kernel(keyset, *args, **keywords):
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or _dual(args):
            return eager.apply(*args, *(None,) * (tensors - len(args)), keywords)
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


def _on_host(op, *args, **keywords):
    """Encoding searches on the CPU: CUDA tensors go there and the words come back."""
    device = args[0].device
    return op(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in args), **keywords).to(device)


def _register_all() -> torch.library.Library:
    library = torch.library.Library("rbe", "IMPL")
    _register(library, "linear", _Linear, _TENSORS, autograd=True)
    _register(library, "linear_inference", _Linear, _TENSORS, autograd=False)
    _register(library, "linear_backward", _LinearBackward, _TENSORS + 1, autograd=True)
    _register(library, "decode", _Decode, 8, autograd=True)
    for device in ("cpu", "cuda"):
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
        for name in ("linear", "linear_inference"):
            kernel = functools.partial(_autocast_kernel, getattr(_ops, name).default, device, key)
            library.impl(name, kernel, f"Autocast{device.upper()}")
    for name in ("encode", "encode_calibrated"):
        library.impl(name, functools.partial(_on_host, getattr(_ops, name).default), "CUDA")
    for name, fake in {
        "linear": _fake_linear, "linear_inference": _fake_linear, "linear_backward": _fake_linear_backward, "decode": _fake_decode,
        "decode_backward": _fake_decode_backward, "encode": _fake_encode, "encode_calibrated": _fake_encode_calibrated, "pack": _fake_pack,
        "unpack": _fake_unpack, "interleave": _fake_interleave, "deinterleave": _fake_deinterleave,
    }.items():  # fmt: skip
        torch.library.register_fake(f"rbe::{name}", fake, lib=library)
    flop_counter.register_flop_formula([_ops.linear, _ops.linear_inference])(_linear_flops)
    flop_counter.register_flop_formula(_ops.linear_backward)(_linear_backward_flops)
    return library


_registrations = _register_all()
