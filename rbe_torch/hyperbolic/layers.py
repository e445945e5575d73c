"""Neural layers between points of a hyperbolic space; with c = 0 each is the Euclidean layer it is named after.

    HypLinear(x)      exp0(W log0(x) + b)                W an nn.Linear or an RBELinear
    HypLayerNorm(x)   exp0(LayerNorm(log0(x)))           HypActivation(x)   exp0(f(log0(x)))
    attention         weights  w_ij = softmax_j (|q_i|^2 + |k_j|^2 - d(q_i, k_j)^2) / (2 sqrt(d))    value  log0(weighted mean of the v_j)

|q| and |k| are distances from the origin. Without them the score would be the negative squared distance of Gulcehre et al. 2019
("Hyperbolic attention networks", arXiv 1805.09786), which for c = 0 is no dot product: |k_j|^2 / 2 is missing. |q_i|^2 does not change the
softmax and takes away the cancellation. Distances are those of tangent vectors of the origin: the ball's doubled ones are halved.
Residuals are `manifold.add(x, update)`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..linear import RBELinear
from .lorentz import Lorentz
from .poincare import PoincareBall

MANIFOLDS: dict[str, type[Lorentz] | type[PoincareBall]] = {"lorentz": Lorentz, "poincare": PoincareBall}
Space = Lorentz | PoincareBall


def manifold_of(name: str, c: float, learnable: bool = False) -> Space:
    """ValueError: a name other than "lorentz" and "poincare"; see Curvature for c."""
    if name not in MANIFOLDS:
        raise ValueError(f"manifold: is {name!r}, must be 'lorentz' or 'poincare' (curvature=0 is Euclidean space in either)")
    return MANIFOLDS[name](c, learnable)


def attend(manifold: Space, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Attention by negative distance. query [..., I, d], key [..., J, d], value [..., J, d'] are tangent vectors at the origin, as a
    linear layer makes them, of any float dtype; returns tangent vectors [..., I, d'] of value's dtype. mask: bool, True where j may be
    seen, broadcast to [..., I, J].
    dropout: of the weights; what is left is normalised again where the mean is taken.

    Computed in float32 at least, also under autocast. A row whose mask is all False attends to everything alike.
    """
    dtype = value.dtype
    with torch.autocast(query.device.type, enabled=False):
        if dtype in (torch.float16, torch.bfloat16):
            query, key, value = query.float(), key.float(), value.float()
        q, k = manifold.expmap0(query), manifold.expmap0(key)
        # lengths after expmap0 has shortened what the dtype cannot hold, or the score of a far key would exceed every bound
        square = manifold.square_at_origin(query) + manifold.square_at_origin(key).transpose(-1, -2)
        score = (square - manifold.pairwise_sqdist(q, k)) / (2 * manifold.scale**2 * query.shape[-1] ** 0.5)
        if mask is not None:
            score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
        weights = nn.functional.dropout(score.softmax(-1), dropout, dropout > 0)
        return manifold.logmap0(manifold.midpoint(manifold.expmap0(value), weights)).to(dtype)


class HypLinear(nn.Module):
    """Points [..., in_features] -> points [..., out_features]: a linear map between the tangent spaces of the two origins.

    layout: an RBE layout for an RBELinear with random codes; None for an nn.Linear. `linear` may be replaced by any layer of the same
    sizes.
    """

    def __init__(self, in_features: int, out_features: int, manifold: Space, bias: bool = True, layout: str | None = None) -> None:
        super().__init__()
        self.manifold = manifold
        self.linear = nn.Linear(in_features, out_features, bias) if layout is None else RBELinear(in_features, out_features, bias, layout)

    def forward(self, x: Tensor) -> Tensor:
        return self.manifold.expmap0(self.linear(self.manifold.logmap0(x)))


class HypLayerNorm(nn.LayerNorm):
    """LayerNorm of a point's tangent vector at the origin; its parameters are nn.LayerNorm's."""

    def __init__(self, normalized_shape: int, manifold: Space, eps: float = 1e-12) -> None:
        super().__init__(normalized_shape, eps)
        self.manifold = manifold

    def forward(self, x: Tensor) -> Tensor:
        return self.manifold.expmap0(super().forward(self.manifold.logmap0(x)))


class HypActivation(nn.Module):
    """An elementwise function of a point's tangent vector at the origin."""

    def __init__(self, function: Callable[[Tensor], Tensor], manifold: Space) -> None:
        super().__init__()
        self.function, self.manifold = function, manifold

    def forward(self, x: Tensor) -> Tensor:
        return self.manifold.expmap0(self.function(self.manifold.logmap0(x)))


class HypAttention(nn.Module):
    """Multi-head self-attention between points [..., L, dim]; every head is a hyperbolic space of dim / heads dimensions.

    layout: as for HypLinear. ValueError: dim is no multiple of heads.
    """

    def __init__(self, dim: int, heads: int, manifold: Space, dropout: float = 0.0, layout: str | None = None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim: is {dim}, must be a multiple of heads, {heads}")
        self.heads, self.dropout, self.manifold = heads, dropout, manifold
        make = nn.Linear if layout is None else lambda n, m: RBELinear(n, m, layout=layout)
        self.query, self.key, self.value, self.output = (make(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: bool [..., L], True for points that may be seen."""
        tangent = self.manifold.logmap0(x)
        q, k, v = (split_heads(layer(tangent), self.heads) for layer in (self.query, self.key, self.value))
        seen = None if mask is None else mask[..., None, None, :]
        mixed = attend(self.manifold, q, k, v, seen, self.dropout if self.training else 0.0)
        return self.manifold.expmap0(self.output(merge_heads(mixed)))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., L, dim] -> [..., heads, L, dim / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)
