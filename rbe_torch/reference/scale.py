"""The scale of a code: 64 curves from their formulas, and its value and slope as a function of the amplitude."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

CELLS = {"rbe4r": 8, "rbe2r": 2}  # of |a|; the code is in the middle of one
LARGEST_U = 1.0 - 2.0**-18


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


def cell(curve: Tensor, amp: Tensor) -> tuple[Tensor, Tensor]:
    """T[curve, amp] and T[curve, amp + 1], float32 of the shape of `amp`."""
    table = curve_table(amp.device).reshape(-1)
    at = curve * 257 + amp
    return table[at], table[at + 1]


def curve_of(words: Tensor) -> Tensor:
    return ((words >> 18) & 15) * 2 + ((words >> 8) & 1)


def idx_of(words: Tensor) -> Tensor:
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
    low, high = cell(curve_of(words), words & 255)
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
    steps = 2**18 if field == "rbe32" else CELLS.get(field, 2**8)
    scaled = amplitude.abs().clamp(max=LARGEST_U) * steps  # exact, as are the next two lines; scaled + 0.5 might round
    whole = scaled.floor()
    k = (whole + (scaled - whole >= 0.5).to(whole.dtype)).clamp(max=steps - 1).to(torch.int32)
    if field in CELLS:
        k = whole.to(torch.int32) * (256 // steps) + 128 // steps
    amp, fine = (k >> 10, k & 1023) if field == "rbe32" else (k, torch.zeros_like(k))
    sign = (amplitude < 0).to(torch.int32)
    return (words & 0x3FFD00) | (fine << 22) | (sign << 9) | amp


def amplitude_scale(words: Tensor, amplitude: Tensor, field: str, rounded: bool, real: torch.dtype) -> Tensor:
    """Scale as a function of the amplitude: its value, slope 256 (T[amp+1] - T[amp]) and no second derivative."""
    a = amplitude.detach()
    finite = torch.nan_to_num(a, nan=0.0, posinf=1.0, neginf=-1.0)
    if rounded:
        quantised = _round_amplitude(words, finite, field)
        amp = quantised & 255
        value = scale(quantised, field).to(real)
    else:
        u = finite.abs().clamp(max=LARGEST_U) * 256
        amp = u.floor().to(torch.int32)
        low, high = (t.to(real) for t in cell(curve_of(words), amp))
        value = (low + (high - low) * (u - amp)) * torch.where(finite < 0, -1.0, 1.0)
    low, high = (t.to(real) for t in cell(curve_of(words), amp))
    slope = 256 * (high - low)
    value = torch.where(a.isnan(), a, value)
    moved = _StayInside.apply(amplitude)
    return value + slope * torch.nan_to_num(moved - a)  # moved - a is zero; nan_to_num keeps inf - inf out
