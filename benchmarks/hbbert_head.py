"""A learned way from an encoder's output to points: point = exp0(W mean + b), in as many dimensions as W has rows, or exp0(scale mean).

`mean` is the mean of the last hidden states over the attention mask. W and b begin as the first principal axes of the names' means, which
use nothing of the hierarchy, at a factor that makes vectors as long on average as a row asks for; scale begins at 1. exp0 reads a vector as
a tangent of the origin, so that its length is a distance, half of one in the ball, whatever the curvature, and with c = 0 it is the vector.
(Read as coordinates, as HiT does, vectors beyond 1 / sqrt(c) would be shortened to the ball's edge.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rbe_torch.hyperbolic.layers import manifold_of
from rbe_torch.hyperbolic.model import HbBertOutput
from rbe_torch.hyperbolic.training import Options, optimiser_of

LENGTH = 7.2  # that of the pretrained means in their 384 dimensions
HEAD_RATE = 1e-3  # of W and b where vectors begin LENGTH long; in proportion where they begin shorter, as their entries do
SCALE_RATE = 1e-2  # of log(scale), as of log(c)


class Projected(nn.Module):
    """encoder: a HbBertModel of mode "output" and curvature 0. start: (W [n, d], b [n]) that make vectors `length`
    long, or None for a scale alone. All are parameters of this module and in no nn.Linear: compression leaves them alone."""

    def __init__(
        self, encoder: nn.Module, manifold: str, curvature: float, learnable: bool,
        start: tuple[Tensor, Tensor] | None, length: float = LENGTH,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.rate = encoder, HEAD_RATE * length / LENGTH
        self.manifold = manifold_of(manifold, curvature, learnable)
        if start is None:
            self.log_scale = nn.Parameter(torch.zeros(()))
        else:
            self.weight, self.bias = (nn.Parameter(value.clone()) for value in start)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **packed: Tensor) -> HbBertOutput:
        mean = self.encoder(input_ids, attention_mask, **packed).embedding
        with torch.autocast(mean.device.type, enabled=False):
            mean = mean.float()
            vector = nn.functional.linear(mean, self.weight, self.bias) if hasattr(self, "weight") else self.log_scale.exp() * mean
            return HbBertOutput(embedding=self.manifold.expmap0(vector))


def principal_axes(means: Tensor, dims: int, length: float = LENGTH) -> tuple[Tensor, Tensor]:
    """W [dims, d] and b [dims] for means float32 [N, d]: vectors `length` long on average."""
    middle = means.mean(0)
    axes = torch.linalg.svd(means - middle, full_matrices=False)[2][:dims]
    axes = axes * (length / ((means - middle) @ axes.T).norm(dim=1).mean())
    return axes, -axes @ middle


def optimiser_with_head(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """optimiser_of, and the head's parameters at rates of their own."""
    optimiser = optimiser_of(model, options)
    if not isinstance(model, Projected):
        return optimiser
    rates = {"log_scale": SCALE_RATE, "weight": model.rate, "bias": model.rate}
    head = [(rate, getattr(model, name)) for name, rate in rates.items() if hasattr(model, name)]
    ids = {id(parameter) for _, parameter in head}
    for group in optimiser.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    for rate, parameter in head:
        optimiser.add_param_group({"name": "head", "params": [parameter], "lr": rate})
    return optimiser
