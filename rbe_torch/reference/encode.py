"""The nearest code by trying every word."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codes import parse, seeded_idx
from .scale import CELLS, scale


def _scale_words(field: str) -> Tensor:
    """Every word that differs in scale, idx 0, rising as unsigned numbers: int64."""
    low = torch.arange(1024)  # sign, deriv, amp
    if field.endswith("r"):
        cell = 256 // CELLS.get(field, 256)
        return low[((low & 256) == 0) & (low % cell == cell // 2)] + (1 << 20) + ((3 if cell == 1 else 1) << 18)
    curves = torch.arange(16)[:, None] * (1 << 18)
    words = (curves + low).reshape(-1)
    return words if field == "rbe22" else (torch.arange(1024)[:, None] * (1 << 22) + words).reshape(-1)


def _encode_group(target: Tensor, basis: Tensor, gain: float, field: str, allowed: Tensor, scales: Tensor, words: Tensor) -> int:
    """The word that minimises |target - gain * vector|^2, ties to the lowest; target [e], basis [256, e], float64."""
    if field == "rbe8":
        error = ((target - gain * basis) ** 2).sum(1)
        return int(torch.argmin(error)) << 10
    if field == "rbe16s":
        flips = (gain * target * basis < 0).to(torch.int64)
        error = ((target - gain * basis * (1 - 2 * flips)) ** 2).sum(1)
        idx = int(torch.argmin(error))
        return idx << 10 | int((flips[idx] << torch.arange(flips.shape[1])).sum())
    best = (math.inf, 0)
    for idx in allowed.tolist():
        vector = gain * basis[idx]
        square = float(vector @ vector)
        wanted = float(target @ vector) / square if square > 0 else 0.0
        # |target - s vector|^2 = |target - wanted vector|^2 + square (s - wanted)^2, so for one idx the nearest scale is best
        distance = (scales.to(torch.float64) - wanted).abs() if square > 0 else torch.zeros(1)
        nearest = int(torch.argmin(distance))  # the first, so the lowest word
        left = target - float(scales[nearest]) * vector
        best = min(best, (float(left @ left), int(words[nearest]) | idx << 10))
    return best[1]


def encode(
    weight: Tensor, basis: Tensor, gain: Tensor, *, layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0
) -> Tensor:
    """The best words int32 [m, K, 1] for weight [m, n], by looking at every vector and scale in float64. One stage only.

    Raises: ValueError for non-finite weights or more than one stage.
    """
    parsed = parse(layout)
    if parsed.stages != 1:
        raise ValueError(f"layout: {layout} has {parsed.stages} stages; the reference encodes one")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: must be finite")
    rows, columns = weight.shape
    groups = -(-columns // parsed.group)
    words = _scale_words(parsed.field)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    scales = scale(signed, parsed.field)
    total = -(-in_features // parsed.group)
    drawn = seeded_idx(rows, groups, 1, seed, row0=row0, k0=k0, groups_total=total)
    out = torch.empty(rows, groups, 1, dtype=torch.int64)
    for i in range(rows):
        for k in range(groups):
            target = weight[i, k * parsed.group : (k + 1) * parsed.group].to(torch.float64)
            vectors = basis[0, :, : target.shape[0]].to(torch.float64)
            allowed = drawn[i, k] if parsed.field.endswith("r") else torch.arange(256)
            out[i, k, 0] = _encode_group(target, vectors, float(gain[i]), parsed.field, allowed, scales, words)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
