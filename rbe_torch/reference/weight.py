"""W from codes, and the product with it."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import Parsed, parse, unpack_words
from .scale import amplitude_scale, idx_of, scale


def _residual(parsed: Parsed, values: Tensor, scales: Tensor | None, right: Tensor | None, right_scale: Tensor | None, width: int,
              real: torch.dtype) -> Tensor:  # fmt: skip
    """The residual as a dense [m, n] matrix."""
    if parsed.residual == "sp":
        dense = torch.zeros(values.shape[0], width, dtype=real, device=values.device)
        return dense.scatter(1, right.to(torch.int64), values.to(real))
    if parsed.residual == "lr":
        return (values.to(real) * scales.to(real)) @ (right.to(real) * right_scale.to(real)[:, None])
    return values.to(real) * scales.to(real)[:, None]


def _dense(words: Tensor, basis: Tensor, gain: Tensor, amplitude: Tensor | None, parsed: Parsed, in_features: int, seed: int, row0: int,
           k0: int, rounded: bool, real: torch.dtype) -> Tensor:  # fmt: skip
    """What the codes alone decode to, padding included: [m, K*g] of dtype `real`."""
    if words.dtype == torch.uint8 and words.dim() == 3:
        words = words.movedim(1, 2).reshape(-1, words.shape[1])[: gain.shape[0]]  # interleaved -> packed
    if words.dtype == torch.uint8:
        words = unpack_words(words, parsed, in_features, seed, row0, k0)
    rows, groups, stages = words.shape
    index = idx_of(words).to(torch.int64) + 256 * torch.arange(stages, device=words.device)
    vectors = basis.to(real).reshape(stages * 256, parsed.group).index_select(0, index.reshape(-1))
    vectors = vectors.reshape(rows, groups, stages, parsed.group)
    if parsed.field == "rbe16s":
        negated = (words[..., None] >> torch.arange(8, dtype=torch.int32, device=words.device)) & 1
        vectors = vectors * (1 - 2 * negated).to(real)
    elif amplitude is not None:
        vectors = vectors * amplitude_scale(words, amplitude.to(real), parsed.field, rounded, real)[..., None]
    elif parsed.field != "rbe8":
        vectors = vectors * scale(words, parsed.field).to(real)[..., None]
    return gain.to(real)[:, None] * vectors.sum(2).reshape(rows, groups * parsed.group)


def decode(
    words: Tensor, basis: Tensor, gain: Tensor, amplitude: Tensor | None = None, residual: Tensor | None = None,
    residual_scale: Tensor | None = None, residual_right: Tensor | None = None, residual_right_scale: Tensor | None = None, *,
    layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0, rounded: bool = True,
) -> Tensor:  # fmt: skip
    """W [m, n] in float32 (float64 if `basis` is), differentiable in basis, gain and amplitude.

    Args:
        words: int32 [m, K, M], packed uint8, or interleaved uint8.
        basis: [M, 256, g]. gain: [m]. amplitude: [m, K, M] or None.
        in_features: n of the whole layer; a shard (row0, k0) decodes the columns of its own groups.
        rounded: False interpolates the curve at the raw amplitude.
    The other arguments are as in `docs/operators.md`. Raises: ValueError for an unknown layout.
    """
    parsed = parse(layout)
    real = torch.float64 if basis.dtype == torch.float64 else torch.float32
    weight = _dense(words, basis, gain, amplitude, parsed, in_features, seed, row0, k0, rounded, real)
    columns = torch.sym_min(weight.shape[1], in_features - k0 * parsed.group)
    weight = weight[:, :columns]
    if residual is not None:
        weight = weight + _residual(parsed, residual, residual_scale, residual_right, residual_right_scale, weight.shape[1], real)
    return weight


def linear(
    x: Tensor, words: Tensor, basis: Tensor, gain: Tensor, bias: Tensor | None = None, amplitude: Tensor | None = None,
    residual: Tensor | None = None, residual_scale: Tensor | None = None, residual_right: Tensor | None = None,
    residual_right_scale: Tensor | None = None, *,
    layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0, rounded: bool = True,
) -> Tensor:  # fmt: skip
    """x W^T + bias, differentiable in x, basis, gain, bias and amplitude to any order (second derivatives in the amplitude are zero).

    Args: x [..., n], of any float dtype; the rest as in `decode`. Computed in float32, or float64 if `x` is.
    Returns: [..., m] of the dtype of `x`.
    """
    parsed = parse(layout)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = x.shape[-1]
    weight = _dense(words, basis, gain, amplitude, parsed, in_features, seed, row0, k0, rounded, real)[:, :columns]
    if residual is not None:
        weight = weight + _residual(parsed, residual, residual_scale, residual_right, residual_right_scale, columns, real)
    y = x.to(real) @ weight.T
    if bias is not None:
        y = y + bias.to(real)
    return y.to(x.dtype)
