"""The Lorentz model in space coordinates: x in R^d stands for the point (sqrt(1/c + |x|^2), x) of the hyperboloid of curvature -c.

With t(x) = sqrt(1 + c|x|^2) (the time coordinate times sqrt(c)):

    exp0(v) = sinhc(c|v|^2) v                     log0(x) = asinhc(c|x|^2) x                     d(0, x) = |log0(x)|
    Q(x, y) = squared chord |x - y|^2 - (t(x) - t(y))^2 / c                                      d(x, y) = sqrt(Q) asinhc(c Q / 4)
    x + y   = y + (t(y) + c x.y / (1 + t(x))) x   (the boost that takes 0 to x, applied to y)
    mean    = S / sqrt(T^2 - c|S|^2),  S = sum w x,  T = sum w t(x)                              (Law et al. 2019, the centroid)

Every formula is analytic in c at c = 0, where it is the Euclidean one; sqrt(c) and 1/c appear nowhere. geoopt has this model in d + 1
coordinates with 1/c in every formula; `to_ambient` converts. Methods follow geoopt's names, work along the last axis and broadcast over
the others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .curvature import BALL_LIMIT, Curvature, at_least_float32
from .radial import ONE, radial, shortened_square
from .safe import asinhc, coshr, root, sinhc


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _limit(dtype: torch.dtype) -> float:
    """Largest sqrt(c) d(0, x): that of the Poincare ball's limit, so that the two models hold the same points."""
    return 2 * math.atanh(BALL_LIMIT[dtype])


class Lorentz(Curvature):
    """geoopt manifold: space coordinates of the hyperboloid. Points float32 or float64 [..., d]; half precision is computed in float32."""

    name = "Lorentz"
    scale = 1.0

    def gamma(self, x: Tensor) -> Tensor:
        """t(x) = sqrt(1 + c|x|^2) [..., 1]."""
        return (1 + self.c * _dot(x, x)).sqrt()

    # ---- from and to the tangent space of the origin ------------------------------------------------------------------------------
    @at_least_float32
    def expmap0(self, u: Tensor) -> Tensor:
        """The point that the tangent vector u at the origin leads to; u is shortened to what the dtype can hold."""
        return radial(u, self.c, "sinh", _limit(u.dtype) ** 2)

    def square_at_origin(self, u: Tensor) -> Tensor:
        """d(0, exp0(u))^2 [..., 1] of tangent vectors u, without the point."""
        return shortened_square(u, self.c, _limit(u.dtype) ** 2)

    @at_least_float32
    def logmap0(self, x: Tensor) -> Tensor:
        return radial(x, self.c, "asinh", math.sinh(_limit(x.dtype)) ** 2)

    @at_least_float32
    def projx(self, x: Tensor) -> Tensor:
        """x, shortened to what the dtype can hold."""
        return radial(x, self.c, ONE, math.sinh(_limit(x.dtype)) ** 2)

    # ---- distances ----------------------------------------------------------------------------------------------------------------
    @at_least_float32
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """d(x, y) [...]. The chord is a sum of a radial and an angular part, neither of which can be negative: far from the origin the
        difference in the definition leaves no digit of float32."""
        c, x, y = self.c, self.projx(x), self.projx(y)
        a, b = root(_dot(x, x)), root(_dot(y, y))
        across = x / a - y / b
        chord = self._radial(a, b) + a * b * _dot(across, across)
        d = root(chord) * asinhc(c * chord / 4)
        return d if keepdim else d.squeeze(-1)

    @at_least_float32
    def dist0(self, x: Tensor, *, keepdim: bool = False) -> Tensor:
        x = self.projx(x)
        square = _dot(x, x)
        d = root(square) * asinhc(self.c * square)
        return d if keepdim else d.squeeze(-1)

    @at_least_float32
    def pairwise_sqdist(self, x: Tensor, y: Tensor) -> Tensor:
        """d(x_i, y_j)^2 [..., I, J] of x [..., I, d] and y [..., J, d] by one matrix product; differentiable at equal points."""
        a, b = root(_dot(x, x)), root(_dot(y, y)).transpose(-1, -2)
        chord = (self._radial(a, b) + 2 * (a * b - x @ y.transpose(-1, -2))).clamp(min=0)
        return chord * asinhc(self.c * chord / 4).square()

    def _radial(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared chord of two points at norms a and b in one direction; broadcasts. (a - b)^2 where c = 0."""
        c = self.c
        ta, tb = (1 + c * a.square()).sqrt(), (1 + c * b.square()).sqrt()
        cosh = (1 + c * a.square() + c * b.square()) / (ta * tb + c * a * b)
        return (a - b).square() * 2 * (1 + cosh) / (ta + tb).square()

    # ---- sums and means -----------------------------------------------------------------------------------------------------------
    @at_least_float32
    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, in general not y + x (Ungar's addition of proper velocities); (-x) + x = 0."""
        return self.projx(y + (self.gamma(y) + self.c * _dot(x, y) / (1 + self.gamma(x))) * x)

    @at_least_float32
    def midpoint(self, x: Tensor, weights: Tensor) -> Tensor:
        """Weighted means [..., I, d] of points x [..., J, d]; weights [..., I, J] >= 0, whose sum need not be 1."""
        space, time, total = weights @ x, weights @ self.gamma(x), weights.sum(-1, keepdim=True)
        return space / _norm(space, time, total, self.c)

    # ---- what geoopt's optimisers need --------------------------------------------------------------------------------------------
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        v = u if v is None else v
        value = _dot(u, v) - self.c * _dot(x, u) * _dot(x, v) / (1 + self.c * _dot(x, x))
        return value if keepdim else value.squeeze(-1)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        return u + self.c * _dot(x, u) * x

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        s = (self.c * self.inner(x, u, keepdim=True)).clamp(min=0, max=(2 * _limit(x.dtype)) ** 2)
        return self.projx(coshr(s) * x + sinhc(s) * u)

    retr = expmap

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        square = self.dist(x, y, keepdim=True).square()
        return (y - coshr(self.c * square) * x) / sinhc(self.c * square)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """v at x, carried along the geodesic to y."""
        tx, ty = self.gamma(x), self.gamma(y)
        across = _dot(y, v) - ty * _dot(x, v) / tx
        return v + self.c * across / (1 + tx * ty - self.c * _dot(x, y)) * (x + y)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        ok = bool(torch.isfinite(x).all())
        return ok, None if ok else "a coordinate is not finite"

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        return True, None

    # ---- other coordinates of the same space --------------------------------------------------------------------------------------
    def to_poincare(self, x: Tensor) -> Tensor:
        """Coordinates of the point in the Poincare ball of the same c."""
        return x / (1 + self.gamma(x))

    def from_poincare(self, p: Tensor) -> Tensor:
        return 2 * p / (1 - self.c * _dot(p, p))

    def to_ambient(self, x: Tensor) -> Tensor:
        """[..., d + 1], time first: the point as geoopt.Lorentz(k=1/c) has it. c must not be 0."""
        return torch.cat([self.gamma(x) / torch.as_tensor(self.c, dtype=x.dtype).sqrt(), x], -1)


def _norm(space: Tensor, time: Tensor, total: Tensor, c: Tensor | float) -> Tensor:
    """sqrt(time^2 - c|space|^2), which is at least the sum of the weights; with all weights 0 the mean is the origin."""
    square = time.square() - c * _dot(space, space)
    return torch.maximum(square, total.square()).clamp(min=torch.finfo(space.dtype).tiny).sqrt()
