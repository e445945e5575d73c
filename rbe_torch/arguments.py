"""Checks of what the layer is given: each returns the checked value, or raises a ValueError or TypeError that names the argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def size(name: str, value: int) -> int:
    """A number of rows or columns: 1 .. 2^31 - 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: is {value!r}, must be an int")
    value = value.__index__()
    if not 1 <= value < 2**31:
        raise ValueError(f"{name}: is {value}, must be 1 .. 2^31 - 1")
    return value


def seed_value(value: int) -> int:
    """An int of 32 bits."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"seed: is {value!r}, must be an int")
    if not 0 <= value.__index__() < 2**32:
        raise ValueError(f"seed: is {value}, must be 0 .. 2^32 - 1")
    return value.__index__()


def describe(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"


def exact_float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor as contiguous float32 (itself if it is a parameter of that kind); no value may change."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: is {tensor.dtype}, must be a floating-point tensor")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, must be {shape}")
    if tensor.dtype == torch.float32:
        return tensor if isinstance(tensor, nn.Parameter) and tensor.is_contiguous() else tensor.detach().contiguous()
    converted = tensor.detach().to(torch.float32).contiguous()
    if tensor.dtype == torch.float64 and not bool(((converted.double() == tensor) | ~torch.isfinite(tensor)).all()):
        raise ValueError(f"{name}: is torch.float64 and holds values that float32 cannot; round it first")
    return converted


def codes_rows(codes: Tensor, layout: Layout, in_features: int) -> int:
    """m of the codes: int32 words [m, K, M] or uint8 packed bytes [m, row bytes]."""
    if codes.dtype not in (torch.int32, torch.uint8):
        raise TypeError(f"codes: are {codes.dtype}, must be torch.int32 words or torch.uint8 packed bytes")
    m = codes.shape[0] if codes.dim() else 0
    wanted = (m, layout.packed_row_bytes(in_features)) if codes.dtype == torch.uint8 else layout.codes_shape(m, in_features)
    if m < 1 or tuple(codes.shape) != wanted:
        shape = wanted if m else ("m",) + wanted[1:]
        raise ValueError(f"codes: have shape {tuple(codes.shape)}, must be {shape} for {layout} and in_features={in_features}, with m at least 1")
    return m


def bias_of(bias: Tensor | None, m: int, device: torch.device) -> Tensor | None:
    if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in FLOATS or tuple(bias.shape) != (m,)):
        raise ValueError(f"bias: is {describe(bias)}, must be a floating-point tensor [{m}] or None")
    if bias is not None and bias.device != device:
        raise ValueError(f"bias: is on {bias.device}, must be on {device} as codes are")
    return bias


def residual_of(residual: dict[str, Tensor] | None, layout: Layout, m: int, n: int, device: torch.device) -> dict[str, Tensor]:
    """The tensors of Layout.residual_shapes, no more and no less."""
    residual, shapes = residual or {}, layout.residual_shapes(m, n)
    if set(residual) != set(shapes):
        raise ValueError(f"residual: has {sorted(residual) or 'nothing'}, must have {sorted(shapes) or 'nothing'} for {layout}")
    for name, (shape, kind) in shapes.items():
        if tuple(residual[name].shape) != shape or residual[name].dtype != getattr(torch, kind) or residual[name].device != device:
            raise ValueError(f"{name}: is {describe(residual[name])}, must be torch.{kind} {shape} on {device} for {layout}")
    return residual


def seed_of(seed: int | None, layout: Layout) -> int | None:
    """The seed of a layout that has one, None for the others."""
    if layout.seeded and seed is None:
        raise ValueError(f"seed: is None, must be given for {layout}, whose idx is drawn from it")
    if not layout.seeded and seed is not None:
        raise ValueError(f"seed: is {seed}, must be None for {layout}, whose idx is stored")
    return None if seed is None else seed_value(seed)
