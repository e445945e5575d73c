"""Maps x -> f(c|x|^2) x along rays, which exp0 and log0 of both models are, in three passes over x with a gradient written out.

    y = f(s) x, s = c|x|^2        dy = f dx + 2c f'(s) (x.dx) x + f'(s) |x|^2 x dc

f is one of the functions of safe.py. Beyond s = most the point is shortened: f(s) = f(most) sqrt(most / s).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .safe import function_and_slope

ONE = "one"  # f = 1: shortening alone


def radial(x: Tensor, c: Tensor | float, kind: str, most: float) -> Tensor:
    """x float32 or float64 [..., d] -> [..., d]. kind: "sinh", "asinh", "tanh", "atanh" or ONE. c: float or a tensor []."""
    return _Radial.apply(x, c, kind, most)


def shortened_square(u: Tensor, c: Tensor | float, most: float) -> Tensor:
    """|u|^2 [..., 1], or most / c where that is less."""
    square = (u * u).sum(-1, keepdim=True)
    s = c * square
    far = s > most
    return torch.where(far, square * (most / torch.where(far, s, torch.full_like(s, most))), square)


def _factors(s: Tensor, kind: str, most: float) -> tuple[Tensor, Tensor]:
    """f(s), f'(s)."""
    far = s > most
    inside = s.clamp(max=most)
    value, slope = (torch.ones_like(s), torch.zeros_like(s)) if kind == ONE else function_and_slope(inside, kind)
    outside = torch.where(far, s, torch.full_like(s, most))
    value = torch.where(far, value * (most / outside).sqrt(), value)
    return value, torch.where(far, -value / (2 * outside), slope)


class _Radial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor | float, kind: str, most: float) -> Tensor:
        ctx.kind, ctx.most, ctx.fixed = kind, most, None if isinstance(c, Tensor) else c
        ctx.save_for_backward(x, c if isinstance(c, Tensor) else None)
        return _factors(c * (x * x).sum(-1, keepdim=True), kind, most)[0] * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, c = ctx.saved_tensors
        c = ctx.fixed if c is None else c
        square = (x * x).sum(-1, keepdim=True)
        value, slope = _factors(c * square, ctx.kind, ctx.most)
        along = slope * (gradient * x).sum(-1, keepdim=True)
        of_x = value * gradient + 2 * c * along * x if ctx.needs_input_grad[0] else None
        of_c = (along * square).sum().to(c.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_c, None, None
