"""Functions of s = c|v|^2 that hyperbolic maps are made of, analytic at s = 0, so that curvature c -> 0 gives the Euclidean map exactly.

    sinhc(s) = sinh(r)/r    asinhc(s) = asinh(r)/r    tanhc(s) = tanh(r)/r    atanhc(s) = atanh(r)/r    coshr(s) = cosh(r)
    with r = sqrt(s)

Below a threshold a power series in s, above it the closed form; both branches and their gradients are finite for every s they are given.
Arguments are float32 or float64, s >= 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Seven terms: the first left out is below the rounding of the dtype at these thresholds, and above them the derivative of the closed form
# loses less than two digits to cancellation.
_THRESHOLD = {torch.float32: 0.1, torch.float64: 5e-3}
_SINH = (1.0, 1 / 6, 1 / 120, 1 / 5040, 1 / 362880, 1 / 39916800, 1 / 6227020800)
_COSH = (1.0, 1 / 2, 1 / 24, 1 / 720, 1 / 40320, 1 / 3628800, 1 / 479001600)
_ASINH = (1.0, -1 / 6, 3 / 40, -15 / 336, 105 / 3456, -945 / 42240, 10395 / 599040)
_TANH = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075)
_ATANH = (1.0, 1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13)

# Added under a square root whose argument may be 0: its square is a normal number of the dtype, and it changes nothing above it.
TINY = {torch.float32: 1e-18, torch.float64: 1e-150}


def _analytic(s: Tensor, series: Sequence[float], closed: Callable[[Tensor], Tensor]) -> Tensor:
    threshold = _THRESHOLD[s.dtype]
    small = s < threshold
    near = torch.where(small, s, torch.zeros_like(s))  # each branch sees only arguments it is finite for, and so does its gradient
    value = torch.full_like(near, series[-1])
    for coefficient in reversed(series[:-1]):
        value = value * near + coefficient
    root = torch.where(small, torch.full_like(s, threshold), s).sqrt()
    return torch.where(small, value, closed(root))


def sinhc(s: Tensor) -> Tensor:
    """sinh(sqrt(s)) / sqrt(s)."""
    return _analytic(s, _SINH, lambda r: r.sinh() / r)


def coshr(s: Tensor) -> Tensor:
    """cosh(sqrt(s))."""
    return _analytic(s, _COSH, torch.cosh)


def asinhc(s: Tensor) -> Tensor:
    """asinh(sqrt(s)) / sqrt(s)."""
    return _analytic(s, _ASINH, lambda r: r.asinh() / r)


def atanhc(s: Tensor) -> Tensor:
    """atanh(sqrt(s)) / sqrt(s) for s < 1."""
    return _analytic(s, _ATANH, lambda r: r.atanh() / r)


# f'(s) of the four functions by the value and s = r^2, for s above the threshold
_SLOPE: dict[str, tuple[Sequence[float], Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "sinh": (_SINH, torch.sinh, lambda r, value: r.cosh() - value),
    "asinh": (_ASINH, torch.asinh, lambda r, value: (1 + r * r).rsqrt() - value),
    "tanh": (_TANH, torch.tanh, lambda r, value: 1 - (value * r).square() - value),
    "atanh": (_ATANH, torch.atanh, lambda r, value: 1 / (1 - r * r) - value),
}


def function_and_slope(s: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(f, f') of sinhc, asinhc, tanhc or atanhc at s, for kind "sinh", "asinh", "tanh" or "atanh"."""
    series, closed, slope = _SLOPE[kind]
    threshold = _THRESHOLD[s.dtype]
    small = s < threshold
    near = torch.where(small, s, torch.zeros_like(s))
    value, rate = torch.full_like(near, series[-1]), torch.full_like(near, series[-1] * (len(series) - 1))
    for power in range(len(series) - 2, -1, -1):
        value = value * near + series[power]
        if power:
            rate = rate * near + series[power] * power
    far = torch.where(small, torch.full_like(s, threshold), s)
    r = far.sqrt()
    above = closed(r) / r
    return torch.where(small, value, above), torch.where(small, rate, slope(r, above) / (2 * far))


def root(square: Tensor) -> Tensor:
    """sqrt of a square that may be 0, with a finite gradient there."""
    return (square + TINY[square.dtype] ** 2).sqrt()
