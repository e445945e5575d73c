"""What RBELinear is compared with at equal bytes: layers of few bytes, each trained through its own quantiser (straight-through estimator).

    Quantised     dense m x n, int8 or int4 a weight, a scale a row
    LowRank       W = U V, both Quantised
    BlockSparse   8 x 8 blocks kept by a seeded random mask (which costs nothing), Quantised
    LittleBit     W = diag(h) sign(U) diag(l) sign(V)^T diag(g)                                        arXiv 2506.13771
    Simulated     RBE's own W, dense, with any number of bits a code: what a layout would bring that is not built
    CodesAndLowRank    Simulated + U V, U and V Quantised: a residual path

`layer.bytes` counts weights and fp16 scales; biases are the same everywhere and not counted. Latent weights and scales are float32 while they train.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbe_torch.seeded import seeded_basis

BLOCK = 8
START = 2.5  # int4: the largest level starts at so many standard deviations


def straight_through(rounded: Tensor, value: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def factors(n: int, m: int, rank: int) -> tuple[Tensor, Tensor]:
    """U [m, rank], V [n, rank]: U V^T is the best approximation of a random W of variance 1 / n, scaled to the norm of that W; U and V have the same norm."""
    weight = torch.randn(m, n) / math.sqrt(n)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] * weight.norm() / values[:rank].norm()).sqrt()
    return u[:, :rank] * root, v[:rank].t() * root


class Quantised(nn.Module):
    """y = x W^T + bias, W [m, n] of int8 (scale: the row's largest) or int4 (scale learnt, LSQ, arXiv 1902.08153); `mask` holds what may differ from 0,
    `start` [m, n] is what W starts with instead of variance 1 / n."""

    def __init__(self, n: int, m: int, bits: int, bias: bool = True, mask: Tensor | None = None, start: Tensor | None = None) -> None:
        super().__init__()
        kept = 1.0 if mask is None else float(mask.mean())
        deviation = 1 / math.sqrt(n * max(kept, 1e-9)) if start is None else float(start.std())
        self.weight = nn.Parameter(torch.randn(m, n) * deviation * (1 if mask is None else mask) if start is None else start.contiguous())
        self.bias = nn.Parameter(torch.zeros(m)) if bias else None
        self.bits, self.largest = bits, 2 ** (bits - 1) - 1
        self.log_scale = nn.Parameter(torch.full((m,), math.log(START * deviation / self.largest))) if bits < 8 else None
        self.register_buffer("mask", mask, persistent=False)
        self.bytes = m * n * kept * bits / 8 + 2 * m

    def quantised(self) -> Tensor:
        weight = self.weight if self.mask is None else self.weight * self.mask
        if self.log_scale is None:
            scale = weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-8) / self.largest
            return straight_through((weight / scale).round() * scale, weight)
        scale = self.log_scale.exp()[:, None]
        inside = (weight / scale).clamp(-self.largest - 1, self.largest)
        return straight_through(inside.round(), inside) * scale

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Makes the start `factor` times as large, levels and all."""
        self.weight.mul_(factor)
        if self.log_scale is not None:
            self.log_scale.add_(math.log(factor))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised(), self.bias)


class BlockSparse(Quantised):
    """Quantised with a share `kept` of its 8 x 8 blocks."""

    def __init__(self, n: int, m: int, bits: int, kept: float) -> None:
        across, down = n // BLOCK, m // BLOCK
        mask = torch.zeros(down * across)
        mask[torch.randperm(down * across)[: max(1, round(kept * down * across))]] = 1
        mask = mask.view(down, 1, across, 1).expand(down, BLOCK, across, BLOCK).reshape(m, n)
        super().__init__(n, m, bits, mask=mask.contiguous())


class LowRank(nn.Module):
    """Starts as the best approximation of a random W (spectral initialisation, arXiv 2105.01029)."""

    def __init__(self, n: int, m: int, bits: int, rank: int) -> None:
        super().__init__()
        u, v = factors(n, m, rank)
        self.down, self.up = Quantised(n, rank, bits, bias=False, start=v.t()), Quantised(rank, m, bits, start=u)
        self.bytes = self.down.bytes + self.up.bytes

    def shrink(self, factor: float) -> None:
        self.down.shrink(math.sqrt(factor))
        self.up.shrink(math.sqrt(factor))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class LittleBit(nn.Module):
    """Signs of U [m, r] and V [n, r] in the forward pass, their gradients straight through; scales exp of h [m], g [n], l [r], whose signs U and V can have.

    Starts as the paper's Dual-SVID of a random W: U and V are its factors, h, g and l the best rank 1 of |U| and |V|; then h is set to keep the variance. U and V
    have mean square 1, so that a rate says by which part of them a step moves.
    """

    def __init__(self, n: int, m: int, rank: int) -> None:
        super().__init__()
        u, v = factors(n, m, rank)
        (h, left), (g, right) = (self.outer(part.abs()) for part in (u, v))
        self.u, self.v = (nn.Parameter(part / part.square().mean().sqrt()) for part in (u, v))
        weight = h[:, None] * (u.sign() * left * right) @ v.sign().t() * g
        h = h * math.sqrt(m) / weight.norm()  # |W|^2 = m
        self.log_h, self.log_g, self.log_l = (nn.Parameter(scale.log()) for scale in (h, g, left * right))
        self.bias = nn.Parameter(torch.zeros(m))
        self.bytes = rank * (m + n) / 8 + 2 * (m + n + rank)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        self.log_h.add_(math.log(factor))

    @staticmethod
    def outer(matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Positive a, b with a b^T nearest to a positive matrix."""
        a, values, b = torch.linalg.svd(matrix, full_matrices=False)
        root = values[0].sqrt()
        return a[:, 0].abs() * root, b[0].abs() * root

    def forward(self, x: Tensor) -> Tensor:
        u, v = (straight_through(torch.where(w < 0, -1.0, 1.0), w) for w in (self.u, self.v))
        return F.linear(F.linear(x * self.log_g.exp(), v.t()) * self.log_l.exp(), u) * self.log_h.exp() + self.bias


class Simulated(nn.Module):
    """W = gain[i] 2 sinh(a[i, k]) basis[idx[i, k]]: idx and signs of the basis from seeds, a sign and bits - 1 of |a| in equal cells, as rbe4r has them."""

    def __init__(self, n: int, m: int, bits: int, group: int) -> None:
        super().__init__()
        groups = -(-n // group)
        self.cells, self.n = 2 ** (bits - 1), n
        self.amplitude = nn.Parameter((torch.randn(m, groups) / 2).asinh().clamp(-1, 1))
        self.log_gain, self.bias = nn.Parameter(torch.zeros(m)), nn.Parameter(torch.zeros(m))
        basis = seeded_basis(f"rbe4r_g{group}", int(torch.randint(2**31, ())))[0]
        self.register_buffer("vectors", basis[torch.randint(256, (m, groups))], persistent=False)
        self.rate = n / (2.22 * math.sqrt(groups))  # rbe_torch.rates: an amplitude's rate over a dense weight's
        self.bytes = m * -(-groups * bits // 8) + 2 * m
        with torch.no_grad():
            self.log_gain.sub_(self.weight().square().sum(1).log() / 2)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        self.amplitude.copy_((factor * self.amplitude.sinh()).asinh())

    def weight(self) -> Tensor:
        inside = self.amplitude.clamp(-1, 1)
        middle = ((inside.abs() * self.cells).floor().clamp(max=self.cells - 1) + 0.5) / self.cells
        scale = 2 * straight_through(torch.where(inside < 0, -middle, middle), inside).sinh() * self.log_gain.exp()[:, None]
        return (scale[..., None] * self.vectors).flatten(1)[:, : self.n]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.bias)


class CodesAndLowRank(Simulated):
    """W of Simulated + U V with a scale a column of U and a row of V; U starts at 0, as rbe_torch.add_lowrank has it."""

    def __init__(self, n: int, m: int, bits: int, group: int, rank: int, factor_bits: int) -> None:
        super().__init__(n, m, bits, group)
        u, v = factors(n, m, rank)
        self.left, self.right = (Quantised(part.shape[0], rank, factor_bits, bias=False, start=part.t()) for part in (u, v))
        self.left.weight.data.zero_()
        self.bytes += self.left.bytes + self.right.bytes

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        super().shrink(factor)
        self.left.shrink(math.sqrt(factor))
        self.right.shrink(math.sqrt(factor))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.right.quantised()), self.left.quantised().t())
