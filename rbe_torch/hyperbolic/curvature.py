"""What the two models of hyperbolic space share: the curvature -c, fixed or learned, and doing arithmetic in float32 at least."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

try:
    from geoopt.manifolds.base import Manifold
except ImportError as error:
    raise ImportError(f"rbe_torch.hyperbolic needs geoopt (pip install 'rbe_torch[hyperbolic]'): {error}") from error

# Largest sqrt(c) * radius of a point of the Poincare ball: geoopt's own limits. The distance from the origin is then 6.2 or 12.2 over
# sqrt(c).
BALL_LIMIT = {torch.float32: 1 - 4e-3, torch.float64: 1 - 1e-5}


class Curvature(Manifold):
    """A manifold of curvature -c in coordinates R^d in which the metric at the origin is `scale`^2 times the Euclidean one.

    c: 0 gives Euclidean space exactly. learnable: c = exp(log_c) with the parameter log_c; needs c > 0.
    ValueError or TypeError: c negative, not finite, not a number, or 0 and learnable.
    """

    ndim = 1
    reversible = False
    scale: float

    def __init__(self, c: float = 1.0, learnable: bool = False) -> None:
        Manifold.__init__(self)
        if isinstance(c, bool) or not isinstance(c, (int, float)):
            raise TypeError(f"c: is {c!r}, must be a number")
        if not 0 <= c < math.inf:
            raise ValueError(f"c: is {c}, must be 0 (Euclidean) or positive and finite; the curvature is -c")
        if learnable and c == 0:
            raise ValueError("c: is 0, must be positive where it is learned: its logarithm is the parameter")
        self._fixed = float(c)
        self.log_c = nn.Parameter(torch.tensor(math.log(c), dtype=torch.float32)) if learnable else None

    @property
    def learnable(self) -> bool:
        return self.log_c is not None

    @property
    def c(self) -> Tensor | float:
        """A float where it is fixed, a tensor [] where it is learned."""
        return self._fixed if self.log_c is None else self.log_c.exp()

    @property
    def k(self) -> Tensor:
        """-c as a tensor, as geoopt's formulas take it."""
        return -torch.as_tensor(self.c, dtype=torch.float64)

    def extra_repr(self) -> str:
        return f"c={float(torch.as_tensor(self.c).detach()):.4g}, learnable={self.learnable}"


def at_least_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Half precision has no digits for 1 - c|x|^2: such arguments are computed in float32 and the result is rounded back."""

    @functools.wraps(method)
    def call(self: Curvature, x: Tensor, *others: Any, **keywords: Any) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return method(self, x, *others, **keywords)
        wide = [other.float() if isinstance(other, Tensor) and other.is_floating_point() else other for other in others]
        return method(self, x.float(), *wide, **keywords).to(x.dtype)

    return call
