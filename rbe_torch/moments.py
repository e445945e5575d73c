"""Moments of what reaches a layer: the sums over calibration tokens from which a layer is encoded, and what an encoding loses by them.

x: a layer's input in the dense model; z: in the compressed one. With a weight w a token: sums of w, w x, w z, w z z^T and w x z^T, and for
judging w x x^T. A token's weight is 1 / mean(x^2): outputs are normalised before they are used, so a token with a hundred times the size
counts no more than another; without it a few huge activations (of [CLS], of separators) decide everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-20


@dataclass
class Moments:
    """float32 sums on one device: weight [], x [n], z [n], zz [n, n], xz [n, n] (x along rows), xx [n, n] or None."""

    weight: Tensor
    x: Tensor
    z: Tensor
    zz: Tensor
    xz: Tensor
    xx: Tensor | None = None

    @staticmethod
    def empty(n: int, device: torch.device, judging: bool) -> Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        return Moments(zeros(), zeros(n), zeros(n), zeros(n, n), zeros(n, n), zeros(n, n) if judging else None)

    def add(self, x: Tensor, z: Tensor) -> None:
        """x, z: [tokens, n]. Tokens that are all zero say nothing and are left out."""
        x, z = x.float(), z.float()
        weight = x.square().mean(1)
        weight = torch.where(weight > 0, 1 / weight.clamp(min=_TINY), 0)
        wz = z * weight[:, None]
        self.weight += weight.sum()
        self.x += weight @ x
        self.z += wz.sum(0)
        self.zz.addmm_(wz.t(), z)
        self.xz.addmm_(x.t(), wz)
        if self.xx is not None:
            self.xx.addmm_((x * weight[:, None]).t(), x)

    def plus(self, other: Moments) -> Moments:
        return Moments(self.weight + other.weight, self.x + other.x, self.z + other.z, self.zz + other.zz, self.xz + other.xz)

    def loss(self, weight: Tensor, decoded: Tensor, shift: Tensor | None) -> float:
        """Mean over tokens of |W x - Q z - shift|^2 over that of |W x|^2; weight W and decoded Q [m, n], shift [m]. Needs xx."""
        w, q = weight.double(), decoded.double()
        total = self.weight.double()
        dense = ((w @ self.xx.double()) * w).sum()
        lost = dense - 2 * ((w @ self.xz.double()) * q).sum() + ((q @ self.zz.double()) * q).sum()
        if shift is not None:
            mean = w @ self.x.double() - q @ self.z.double()
            lost = lost - 2 * (shift.double() @ mean) + total * shift.double().square().sum()
        return float(lost / dense) if float(dense) > 0 else 0.0


@dataclass
class Problem:
    """Least squares for one weight: codes Q that make tr((T - Q) H (T - Q)^T) small.

    target T [m, n], hessian H [n, n] and its factor V (H = V V^T, upper triangular) float32; shift [m] for the bias is `shift_of(decoded)`.
    """

    target: Tensor
    hessian: Tensor
    factor: Tensor
    weight: Tensor
    mean_x: Tensor
    mean_z: Tensor
    damping: float

    def shift_of(self, decoded: Tensor) -> Tensor:
        """What the mean output of Q z is short of that of W x: float32 [m]."""
        return (self.weight.double() @ self.mean_x - decoded.double().cpu() @ self.mean_z).float()


def problem_of(weight: Tensor, moments: Moments, damping: float, centred: bool) -> Problem:
    """The problem of weight [m, n] on the CPU.

    H = cov(z) + damping * mean diagonal, T = W (x z^T + the same damping) H^-1: the weight that does to z what W does to x (the compressed
    prefix's error is undone where it can be), drawn to W by the damping. centred: the bias takes up the means. A channel that is always
    zero keeps its weight; where H is not positive definite in float64 the damping grows until it is.
    """
    total = moments.weight.double().cpu().clamp(min=_TINY)
    x, z = moments.x.double().cpu() / total, moments.z.double().cpu() / total
    hessian, cross = moments.zz.double().cpu() / total, moments.xz.double().cpu() / total
    if centred:
        hessian, cross = hessian - torch.outer(z, z), cross - torch.outer(x, z)
    hessian = (hessian + hessian.t()) / 2
    size = float(hessian.diagonal().mean())
    weight = weight.detach().float().cpu()
    if not size > 0:  # nothing reaches the layer
        eye = torch.eye(len(hessian), dtype=torch.float32)
        return Problem(weight, eye, eye.clone(), weight, x, z, damping)
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * size)
        factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed) and float(factor.diagonal().min()) > 1e-6 * size**0.5:
            break
        damping *= 10
    factor = factor.flip(0, 1)
    cross.diagonal().add_(damping * size)
    right = weight.double() @ cross
    # T V V^T = right
    half = torch.linalg.solve_triangular(factor.t(), right, upper=False, left=False)
    target = torch.linalg.solve_triangular(factor, half, upper=True, left=False)
    return Problem(target.float().contiguous(), damped.float().contiguous(), factor.float().contiguous(), weight, x, z, damping)
