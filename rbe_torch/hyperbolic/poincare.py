"""The Poincare ball of curvature -c: |x| < 1/sqrt(c), metric (2 / (1 - c|x|^2))^2 times the Euclidean one.

    exp0(v) = tanhc(c|v|^2) v                     log0(x) = atanhc(c|x|^2) x                     d(0, x) = 2 |log0(x)|
    q(x, y) = |x - y|^2 / ((1 - c|x|^2)(1 - c|y|^2))                                             d(x, y) = 2 sqrt(q) asinhc(c q)
    x + y   = Mobius addition
    mean    = S / (T + sqrt(T^2 - c|S|^2)),  S = sum w l x,  T = sum w (l - 1),  l = 2 / (1 - c|x|^2)
              the Lorentz centroid in these coordinates

geoopt's PoincareBall with what it lacks: a distance by asinh, which keeps its digits at both ends (geoopt's artanh of a Mobius difference
saturates), series in c|x|^2, so that c = 0 is the Euclidean space (distances doubled, as the metric has it), and the pairwise forms.
Everything else, Riemannian gradients, retractions and transport, is geoopt's. Methods work along the last axis.
"""

from __future__ import annotations

import math

import geoopt
import torch
from torch import Tensor

from .curvature import BALL_LIMIT, Curvature, at_least_float32
from .lorentz import _dot, _norm
from .radial import ONE, radial, shortened_square
from .safe import asinhc, atanhc, root


class PoincareBall(Curvature, geoopt.PoincareBall):
    """geoopt manifold. Points float32 or float64 [..., d]; half precision is computed in float32."""

    name = "Poincare ball"
    scale = 2.0

    @at_least_float32
    def expmap0(self, u: Tensor, *, dim: int = -1, project: bool = True) -> Tensor:
        """The point that the tangent vector u at the origin leads to, kept inside the ball by what the dtype can hold."""
        _last(dim)
        return radial(u, self.c, "tanh", math.atanh(BALL_LIMIT[u.dtype]) ** 2)

    def square_at_origin(self, u: Tensor) -> Tensor:
        """d(0, exp0(u))^2 [..., 1] of tangent vectors u, without the point."""
        return 4 * shortened_square(u, self.c, math.atanh(BALL_LIMIT[u.dtype]) ** 2)

    @at_least_float32
    def logmap0(self, x: Tensor, *, dim: int = -1) -> Tensor:
        _last(dim)
        return radial(x, self.c, "atanh", BALL_LIMIT[x.dtype] ** 2)

    @at_least_float32
    def projx(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """x, shortened to geoopt's limit where it is beyond."""
        _last(dim)
        return radial(x, self.c, ONE, BALL_LIMIT[x.dtype] ** 2)

    @at_least_float32
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False, dim: int = -1) -> Tensor:
        """d(x, y) [...]."""
        _last(dim)
        x, y = self.projx(x), self.projx(y)
        q = _dot(x - y, x - y) / (self._inside(x) * self._inside(y))
        d = 2 * root(q) * asinhc(self.c * q)
        return d if keepdim else d.squeeze(-1)

    @at_least_float32
    def dist0(self, x: Tensor, *, keepdim: bool = False, dim: int = -1) -> Tensor:
        _last(dim)
        x = self.projx(x)
        square = _dot(x, x)
        d = 2 * root(square) * atanhc(self.c * square)
        return d if keepdim else d.squeeze(-1)

    @at_least_float32
    def pairwise_sqdist(self, x: Tensor, y: Tensor) -> Tensor:
        """d(x_i, y_j)^2 [..., I, J] of x [..., I, d] and y [..., J, d] by one matrix product; differentiable at equal points."""
        a, b = _dot(x, x), _dot(y, y).transpose(-1, -2)
        chord = (a + b - 2 * (x @ y.transpose(-1, -2))).clamp(min=0)
        q = chord / ((1 - self.c * a) * (1 - self.c * b))
        return 4 * q * asinhc(self.c * q).square()

    @at_least_float32
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Mobius addition, in general not y + x; (-x) + x = 0."""
        c = self.c
        xx, yy, xy = _dot(x, x), _dot(y, y), _dot(x, y)
        return self.projx(((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c * c * xx * yy))

    @at_least_float32
    def midpoint(self, x: Tensor, weights: Tensor) -> Tensor:
        """Weighted means [..., I, d] of points x [..., J, d]; weights [..., I, J] >= 0, whose sum need not be 1."""
        factor = 2 / self._inside(x)
        space, time, total = weights @ (factor * x), weights @ (factor - 1), weights.sum(-1, keepdim=True)
        return space / (_norm(space, time, total, self.c) + time).clamp(min=torch.finfo(x.dtype).tiny)

    def _inside(self, x: Tensor) -> Tensor:
        """1 - c|x|^2 [..., 1]."""
        return 1 - self.c * _dot(x, x)


def _last(dim: int) -> None:
    if dim != -1:
        raise ValueError(f"dim: is {dim}, must be -1: coordinates lie along the last axis")
