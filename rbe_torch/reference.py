"""The format once more, in pure torch: a second implementation that shares no code or data with the C library.

It is the independent check of `docs/format.md`, and the differentiable form that higher derivatives go through: `decode` and `linear`
are ordinary torch operations without data-dependent control flow, so they work in float32 and float64, under `torch.func`, on meta and
fake tensors and with symbolic shapes. Slow and memory-hungry by design: W is formed.

Letters: m rows (out_features), n columns (in_features), g group size, K = ceil(n / g) groups, M stages.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["curve_table", "decode", "encode", "linear", "pack", "scale", "seeded_idx", "unpack"]

_BITS = {"rbe32": 32, "rbe22": 22, "rbe8": 8, "rbe16s": 16, "rbe9r": 9, "rbe4r": 4, "rbe2r": 2}
_CELLS = {"rbe4r": 8, "rbe2r": 2}  # of |a|; the code is in the middle of one
_LAYOUT = re.compile(r"(rbe32|rbe22|rbe8|rbe16s|rbe9r|rbe4r|rbe2r)(?:x([1-9]\d*))?_g([1-9]\d*)(?:\+(int8|fp8|lr|sp)([\d.]*))?")
_EXP_CURVE = 14  # cat 1, sub 3, deriv 0
_LARGEST_U = 1.0 - 2.0**-18


class _Parsed(NamedTuple):
    field: str
    bits: int
    group: int
    stages: int
    residual: str | None


def _parse(layout: str) -> _Parsed:
    match = _LAYOUT.fullmatch(layout)
    if match is None:
        raise ValueError(f"layout: {layout!r} must be <fields>[x<stages>]_g<group>[+residual], for example rbe22_g64")
    field, stages, group, residual, _ = match.groups()
    return _Parsed(field, _BITS[field], int(group), int(stages or 1), residual)


# ---- scale ----------------------------------------------------------------------------------------------------------------------


def _bessel(order: int, r: float) -> float:
    """J_order(r) by its power series; r <= 2, so terms fall fast and barely cancel."""
    half = r / 2.0
    term = half**order / math.factorial(order)
    terms = [term]
    for k in range(1, 24):
        term *= -half * half / (k * (k + order))
        terms.append(term)
    return math.fsum(terms)


def _curve(cat: int, sub: int, deriv: int, r: float) -> float:
    """F(r) or F'(r) of the curve in float64."""
    e = math.exp
    values = {
        (0, 0): (math.tanh(r / 2), 0.5 / math.cosh(r / 2) ** 2),
        (0, 1): (math.tanh(r), 1 / math.cosh(r) ** 2),
        (0, 2): (math.sin(r / 2), math.cos(r / 2) / 2),
        (0, 3): (-math.expm1(-r), e(-r)),
        (1, 0): (math.sinh(r), math.cosh(r)),
        (1, 1): (2 * math.sinh(r / 2), math.cosh(r / 2)),
        (1, 2): (2 * math.sinh(r / 2) ** 2, math.sinh(r)),
        (1, 3): (math.expm1(r), e(r)),
        (2, 0): (r / math.sqrt(1 + r * r), (1 + r * r) ** -1.5),
        (2, 1): (r / (1 + r), (1 + r) ** -2),
        (2, 2): (2 / math.pi * math.atan(r), 2 / math.pi / (1 + r * r)),
        (2, 3): (math.log1p(r), 1 / (1 + r)),
        (3, 0): (r * e(-r * r / 2), (1 - r * r) * e(-r * r / 2)),
        (3, 1): (_bessel(1, r), (_bessel(0, r) - _bessel(2, r)) / 2),
        (3, 2): (math.sin(r) * e(-r * r / 4), (math.cos(r) - r / 2 * math.sin(r)) * e(-r * r / 4)),
        (3, 3): (r * r / (1 + r * r), 2 * r / (1 + r * r) ** 2),
    }
    return values[cat, sub][deriv]


@functools.lru_cache(maxsize=1)
def _curve_values() -> tuple[tuple[float, ...], ...]:
    # numbers, not a tensor: one made while a fake or functional mode is active must not outlive it
    return tuple(
        tuple(_curve(cat, sub, deriv, 2 * a / 256) for a in range(257)) for cat in range(4) for sub in range(4) for deriv in range(2)
    )


def curve_table(device: torch.device | str | None = None) -> Tensor:
    """The curves as float32 [32, 257], row (cat*4 + sub)*2 + deriv; float64 values rounded once."""
    return torch.tensor(_curve_values(), dtype=torch.float64, device=device).to(torch.float32)


def _cell(curve: Tensor, amp: Tensor) -> tuple[Tensor, Tensor]:
    """T[curve, amp] and T[curve, amp + 1], float32 of the shape of `amp`."""
    table = curve_table(amp.device).reshape(-1)
    at = curve * 257 + amp
    return table[at], table[at + 1]


def _curve_of(words: Tensor) -> Tensor:
    return ((words >> 18) & 15) * 2 + ((words >> 8) & 1)


def _idx_of(words: Tensor) -> Tensor:
    return (words >> 10) & 255


def scale(words: Tensor, field: str) -> Tensor:
    """The float32 scale of each code.

    Args:
        words: int32 interchange words, any shape.
        field: field layout, such as "rbe22".
    Returns: float32 of the same shape, bit-exact.
    """
    if field in ("rbe8", "rbe16s"):
        return torch.ones_like(words, dtype=torch.float32)
    low, high = _cell(_curve_of(words), words & 255)
    fine = ((words >> 22) & 1023).to(torch.float32) / 1024.0
    value = low + (high - low) * fine
    return torch.where(((words >> 9) & 1) == 1, -value, value)


class _StayInside(torch.autograd.Function):
    """Identity on an amplitude whose gradient is zero where it would push |a| beyond 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return torch.where((a.abs() >= 1) & (a * grad < 0), torch.zeros_like(grad), grad)


def _round_amplitude(words: Tensor, amplitude: Tensor, field: str) -> Tensor:
    """Words with the sign, amp and amp_fine of the amplitude (detached, finite)."""
    steps = 2**18 if field == "rbe32" else _CELLS.get(field, 2**8)
    scaled = amplitude.abs().clamp(max=_LARGEST_U) * steps  # exact, as are the next two lines; scaled + 0.5 might round
    whole = scaled.floor()
    k = (whole + (scaled - whole >= 0.5).to(whole.dtype)).clamp(max=steps - 1).to(torch.int32)
    if field in _CELLS:
        k = whole.to(torch.int32) * (256 // steps) + 128 // steps
    amp, fine = (k >> 10, k & 1023) if field == "rbe32" else (k, torch.zeros_like(k))
    sign = (amplitude < 0).to(torch.int32)
    return (words & 0x3FFD00) | (fine << 22) | (sign << 9) | amp


def _amplitude_scale(words: Tensor, amplitude: Tensor, field: str, rounded: bool, real: torch.dtype) -> Tensor:
    """Scale as a function of the amplitude: its value, slope 256 (T[amp+1] - T[amp]) and no second derivative."""
    a = amplitude.detach()
    finite = torch.nan_to_num(a, nan=0.0, posinf=1.0, neginf=-1.0)
    if rounded:
        quantised = _round_amplitude(words, finite, field)
        amp = quantised & 255
        value = scale(quantised, field).to(real)
    else:
        u = finite.abs().clamp(max=_LARGEST_U) * 256
        amp = u.floor().to(torch.int32)
        low, high = (t.to(real) for t in _cell(_curve_of(words), amp))
        value = (low + (high - low) * (u - amp)) * torch.where(finite < 0, -1.0, 1.0)
    low, high = (t.to(real) for t in _cell(_curve_of(words), amp))
    slope = 256 * (high - low)
    value = torch.where(a.isnan(), a, value)
    moved = _StayInside.apply(amplitude)
    return value + slope * torch.nan_to_num(moved - a)  # moved - a is zero; nan_to_num keeps inf - inf out


# ---- codes ----------------------------------------------------------------------------------------------------------------------


def _multiply32(h: Tensor, factor: int) -> Tensor:
    """h * factor modulo 2^32 in int64 without overflow."""
    return ((h & 0xFFFF) * factor + (((h >> 16) * (factor & 0xFFFF)) << 16)) & 0xFFFFFFFF


def seeded_idx(
    rows: int, groups: int, stages: int, seed: int, *, row0: int = 0, k0: int = 0, groups_total: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """The idx that the seed gives, int32 [rows, groups, stages], for a shard whose first row and group in the layer are row0 and k0."""
    total = groups if groups_total is None else groups_total
    i = torch.arange(rows, dtype=torch.int64, device=device)[:, None, None] + row0
    k = torch.arange(groups, dtype=torch.int64, device=device)[None, :, None] + k0
    s = torch.arange(stages, dtype=torch.int64, device=device)
    c = ((i * total + k) * stages + s) & 0xFFFFFFFF
    h = (_multiply32((c + 1) & 0xFFFFFFFF, 0x9E3779B9) + seed) & 0xFFFFFFFF
    h = _multiply32(h ^ (h >> 16), 0x85EBCA6B)
    h = _multiply32(h ^ (h >> 13), 0xC2B2AE35)
    return ((h ^ (h >> 16)) >> 24).to(torch.int32)


# What a code stores, least significant bit first: (shift in the word, width) of each piece.
_PIECES = {"rbe32": [(0, 32)], "rbe22": [(0, 22)], "rbe8": [(10, 8)], "rbe16s": [(0, 8), (10, 8)], "rbe9r": [(0, 8), (9, 1)],
           "rbe4r": [(5, 3), (9, 1)], "rbe2r": [(7, 1), (9, 1)]}


def _bit_places(field: str, device: torch.device) -> Tensor:
    """Bit of the word that each stored bit comes from, int64 [bits]."""
    return torch.tensor([shift + b for shift, width in _PIECES[field] for b in range(width)], device=device)


def _seeded_words(words: Tensor, parsed: _Parsed, in_features: int, seed: int, row0: int, k0: int) -> Tensor:
    """The bits that layouts ending in r fix rather than store: idx from the seed, cat and sub, the end of amp."""
    rows, groups, stages = words.shape
    total = -(-in_features // parsed.group)
    idx = seeded_idx(rows, groups, stages, seed, row0=row0, k0=k0, groups_total=total, device=words.device)
    curve = 1 << 20 | (1 if parsed.field in _CELLS else 3) << 18
    return (idx << 10) | curve | (128 // _CELLS[parsed.field] if parsed.field in _CELLS else 0)


def _unpack(packed: Tensor, parsed: _Parsed, in_features: int, seed: int, row0: int, k0: int) -> Tensor:
    """`unpack` without its check."""
    rows, width = packed.shape
    groups = min(width * 8 // (parsed.bits * parsed.stages), -(-in_features // parsed.group) - k0)  # small codes would fit into the padding
    bits = (packed[..., None].to(torch.int64) >> torch.arange(8, device=packed.device)) & 1
    bits = bits.reshape(rows, width * 8)[:, : groups * parsed.stages * parsed.bits].reshape(rows, groups, parsed.stages, parsed.bits)
    words = (bits << _bit_places(parsed.field, packed.device)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words | _seeded_words(words, parsed, in_features, seed, row0, k0) if parsed.field.endswith("r") else words


def _pack(words: Tensor, parsed: _Parsed) -> Tensor:
    rows = words.shape[0]
    bits = ((words.to(torch.int64)[..., None] >> _bit_places(parsed.field, words.device)) & 1).reshape(rows, -1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).reshape(rows, -1, 8)
    return (bits << torch.arange(8, device=words.device)).sum(-1).to(torch.uint8)


def pack(words: Tensor, *, layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0) -> Tensor:
    """int32 words [m, K, M] as uint8 [m, ceil(K*M*bits/8)].

    Raises: ValueError where a word has bits that the layout does not store, or an idx that the seed does not give.
    """
    parsed = _parse(layout)
    packed = _pack(words, parsed)
    if not torch.equal(_unpack(packed, parsed, in_features, seed, row0, k0), words):
        raise ValueError(f"codes: words hold bits (or a seeded idx) that {layout} with seed {seed} does not store")
    return packed


def unpack(packed: Tensor, *, layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0) -> Tensor:
    """uint8 [m, ceil(K*M*bits/8)] as int32 words [m, K, M].

    Raises: ValueError where padding bits are not zero.
    """
    parsed = _parse(layout)
    words = _unpack(packed, parsed, in_features, seed, row0, k0)
    if not torch.equal(_pack(words, parsed), packed):
        raise ValueError("codes: padding bits of packed codes must be zero")
    return words


# ---- weight and product ---------------------------------------------------------------------------------------------------------


def _residual(parsed: _Parsed, values: Tensor, scales: Tensor | None, right: Tensor | None, right_scale: Tensor | None, width: int,
              real: torch.dtype) -> Tensor:  # fmt: skip
    """The residual as a dense [m, n] matrix."""
    if parsed.residual == "sp":
        dense = torch.zeros(values.shape[0], width, dtype=real, device=values.device)
        return dense.scatter(1, right.to(torch.int64), values.to(real))
    if parsed.residual == "lr":
        return (values.to(real) * scales.to(real)) @ (right.to(real) * right_scale.to(real)[:, None])
    return values.to(real) * scales.to(real)[:, None]


def _dense(words: Tensor, basis: Tensor, gain: Tensor, amplitude: Tensor | None, parsed: _Parsed, in_features: int, seed: int, row0: int,
           k0: int, rounded: bool, real: torch.dtype) -> Tensor:  # fmt: skip
    """What the codes alone decode to, padding included: [m, K*g] of dtype `real`."""
    if words.dtype == torch.uint8 and words.dim() == 3:
        words = words.movedim(1, 2).reshape(-1, words.shape[1])[: gain.shape[0]]  # interleaved -> packed
    if words.dtype == torch.uint8:
        words = _unpack(words, parsed, in_features, seed, row0, k0)
    rows, groups, stages = words.shape
    index = _idx_of(words).to(torch.int64) + 256 * torch.arange(stages, device=words.device)
    vectors = basis.to(real).reshape(stages * 256, parsed.group).index_select(0, index.reshape(-1))
    vectors = vectors.reshape(rows, groups, stages, parsed.group)
    if parsed.field == "rbe16s":
        negated = (words[..., None] >> torch.arange(8, dtype=torch.int32, device=words.device)) & 1
        vectors = vectors * (1 - 2 * negated).to(real)
    elif amplitude is not None:
        vectors = vectors * _amplitude_scale(words, amplitude.to(real), parsed.field, rounded, real)[..., None]
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
    parsed = _parse(layout)
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
    parsed = _parse(layout)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = x.shape[-1]
    weight = _dense(words, basis, gain, amplitude, parsed, in_features, seed, row0, k0, rounded, real)[:, :columns]
    if residual is not None:
        weight = weight + _residual(parsed, residual, residual_scale, residual_right, residual_right_scale, columns, real)
    y = x.to(real) @ weight.T
    if bias is not None:
        y = y + bias.to(real)
    return y.to(x.dtype)


# ---- encoding -------------------------------------------------------------------------------------------------------------------


def _scale_words(field: str) -> Tensor:
    """Every word that differs in scale, idx 0, rising as unsigned numbers: int64."""
    low = torch.arange(1024)  # sign, deriv, amp
    if field.endswith("r"):
        cell = 256 // _CELLS.get(field, 256)
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
    parsed = _parse(layout)
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
