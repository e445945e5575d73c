"""Shapes, dtypes and FLOPs of torch.ops.rbe.* without data: fake kernels for torch.compile and export, formulas for torch's FLOP counter."""

from __future__ import annotations

import math

import torch

from .layout import Layout


def _same_device(**tensors: torch.Tensor | None) -> None:
    first_name, first = next((name, t) for name, t in tensors.items() if t is not None)
    for name, t in tensors.items():
        if t is not None and t.device != first.device:
            raise RuntimeError(f"{name}: is on {t.device}; must be on {first.device} like {first_name}")


def linear(x, codes, basis, gain, bias=None, amplitude=None, residual=None, residual_scale=None, residual_right=None,
           residual_right_scale=None, *, layout, in_features, k0=0, **_):  # fmt: skip
    columns = _columns(_groups(codes, layout, in_features, k0), layout=layout, in_features=in_features, k0=k0)
    if x.shape[-1] != columns:
        raise RuntimeError(f"x: has {x.shape[-1]} columns; must have {columns}")
    _same_device(x=x, codes=codes, basis=basis, gain=gain, bias=bias, amplitude=amplitude, residual=residual)
    return x.new_empty(*x.shape[:-1], gain.shape[0])


def linear_backward(dy, x, codes, basis, gain, bias=None, amplitude=None, residual=None, residual_scale=None, residual_right=None,
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


def decode(codes, basis, gain, amplitude=None, residual=None, residual_scale=None, residual_right=None, residual_right_scale=None, *,
           layout, in_features, k0=0, **_):  # fmt: skip
    real = torch.float64 if basis.dtype == torch.float64 else torch.float32
    return basis.new_empty(gain.shape[0], _columns(_groups(codes, layout, in_features, k0), layout=layout, in_features=in_features, k0=k0), dtype=real)


def decode_backward(gradient, codes, basis, gain, **_):
    return basis.new_empty(basis.shape, dtype=torch.float32), gain.new_empty(gain.shape, dtype=torch.float32)


def encode(weight, basis, gain, *, layout, **_):
    parsed = Layout.parse(layout)
    return weight.new_empty(weight.shape[0], (weight.shape[1] + parsed.group - 1) // parsed.group, parsed.stages, dtype=torch.int32)


def encode_calibrated(weight, basis, gain, hessian, factor=None, codes=None, *, layout, **_):
    return encode(weight, basis, gain, layout=layout)


def pack(codes, *, layout, **_):
    parsed = Layout.parse(layout)
    return codes.new_empty(codes.shape[0], (codes.shape[1] * parsed.stages * parsed.bits + 7) // 8, dtype=torch.uint8)


def unpack(packed, *, layout, in_features, k0=0, **_):
    return packed.new_empty(packed.shape[0], _groups(packed, layout, in_features, k0), Layout.parse(layout).stages, dtype=torch.int32)


def interleave(packed):
    return packed.new_empty((packed.shape[0] + 63) // 64, packed.shape[1], 64)


def deinterleave(codes, rows):
    return codes.new_empty(rows, codes.shape[1])


def _flops(x_shape, basis_shape, gain_shape, layout, passes: tuple[int, int]) -> int:
    """Multiply-adds count twice. passes: how often the table (256 n T) and the gather (m K M T) are walked; rbe16s decodes: m n T each."""
    tokens, m, n = math.prod(x_shape[:-1]), gain_shape[0], x_shape[-1]
    stages, _, group = basis_shape
    if layout.startswith("rbe16s"):
        return 2 * tokens * m * n * passes[1]
    return 2 * tokens * stages * (passes[0] * 256 * n + passes[1] * m * -(-n // group))


def linear_flops(x_shape, codes_shape, basis_shape, gain_shape, *args, layout, out_shape=None, **keywords) -> int:
    return _flops(x_shape, basis_shape, gain_shape, layout, passes=(1, 1))


def linear_backward_flops(dy_shape, x_shape, codes_shape, basis_shape, gain_shape, *args, layout, out_shape=None, **keywords) -> int:
    return _flops(x_shape, basis_shape, gain_shape, layout, passes=(3, 2))


KERNELS = {
    "linear": linear, "linear_inference": linear, "linear_backward": linear_backward, "decode": decode, "decode_backward": decode_backward,
    "encode": encode, "encode_calibrated": encode_calibrated, "pack": pack, "unpack": unpack, "interleave": interleave,
    "deinterleave": deinterleave,
}  # fmt: skip
FLOPS = {"linear": linear_flops, "linear_inference": linear_flops, "linear_backward": linear_backward_flops}
