"""A trainable low-rank term beside the codes, so that a compressed model is fine-tuned as with LoRA; finished, it is the layout's
`+lr<rank>` residual.

    W = W of the codes + left right        left [m, r], right [r, n], float32 while they train, int8 with a scale a column and a row
    afterwards

Codes, basis and gain stay what they are unless the layer is in direct training form too (prepare_training after add_lowrank trains both).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import MAX_RANK, Layout
from .linear import RBELinear

_NAMES = ("residual", "residual_scale", "residual_right", "residual_right_scale")


class LowRankLinear(RBELinear):
    """An RBELinear with a trainable low-rank term; made by add_lowrank, undone by finish_training. lowrank_left, lowrank_right: float32
    parameters."""

    lowrank_left: Tensor
    lowrank_right: Tensor

    @property
    def training_form(self) -> bool:
        return True

    @property
    def weight(self) -> Tensor:
        codes = torch.ops.rbe.decode(self.packed, self.basis, self.gain, self.amplitude, **self._options)
        return (codes + self.lowrank_left @ self.lowrank_right).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.linear(x, self.lowrank_right.to(x.dtype))
        return super().forward(x) + F.linear(inner, self.lowrank_left.to(inner.dtype)).to(x.dtype)


def add_lowrank(model: nn.Module, rank: int = 8) -> nn.Module:
    """Gives every RBELinear of `model` a trainable low-rank term, in place, and returns the model; its output stays what it was.

    A layer in a `+lr` layout trains the residual it has (of that rank); the others start at 0 as LoRA does: right drawn, left zero. The
    parameters of the codes are left as they are (frozen after compress); freeze the rest of the model with requires_grad_(False) before for
    plain LoRA. ValueError: no RBELinear, a rank outside 1 .. 65535, a layer with another residual or in training form already.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank: is {rank!r}, must be an int from 1 to {MAX_RANK}")
    layers = [layer for layer in model.modules() if isinstance(layer, RBELinear)]
    if not layers:
        raise ValueError("model: has no RBELinear; call rbe_torch.compress first")
    for layer in layers:
        if layer.training_form:
            raise ValueError("model: has a layer in training form already; call add_lowrank before prepare_training")
        if layer.layout.residual is not None and not layer.layout.rank:
            raise ValueError(f"model: has a layer of {layer.layout}, whose residual is not low rank and cannot be trained")
    for layer in layers:
        left, right = lowrank_of(layer)
        if not left.shape[1]:
            bound = 1 / math.sqrt(layer.in_features)
            left = left.new_zeros(layer.out_features, rank)
            right = left.new_empty(rank, layer.in_features).uniform_(-bound, bound)
        _set_residual(layer, None)
        layer.__class__ = LowRankLinear
        layer.lowrank_left, layer.lowrank_right = nn.Parameter(left), nn.Parameter(right)
    return model


def finish_lowrank(layers: list[LowRankLinear]) -> None:
    """Makes plain RBELinears in a `+lr` layout of the layers. ValueError, before anything is changed: values that are not finite."""
    for layer in layers:
        for name in ("lowrank_left", "lowrank_right"):
            if not bool(torch.isfinite(getattr(layer, name)).all()):
                raise ValueError(f"{name}: has values that are not finite, must have none")
    for layer in layers:
        left, right = layer.lowrank_left.detach(), layer.lowrank_right.detach()
        del layer._parameters["lowrank_left"], layer._parameters["lowrank_right"]
        layer.__class__ = RBELinear
        _set_residual(layer, quantised_factors(left, right))


def merge_lowrank(layer: RBELinear, left: Tensor, right: Tensor) -> None:
    """Adds left [m, r] right [r, n] to the weight of a layer that is not in training form, as its `+lr` residual: ranks add up, codes stay.

    ValueError: shapes that do not fit, values that are not finite, a residual of another kind, a rank above 65535.
    """
    m, n = layer.out_features, layer.in_features
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != m or right.shape[1] != n or left.shape[1] != right.shape[0]:
        raise ValueError(f"left, right: have shapes {tuple(left.shape)} and {tuple(right.shape)}, must be ({m}, r) and (r, {n})")
    if layer.training_form:
        raise ValueError("layer: is in training form; call rbe_torch.finish_training(model) first")
    if layer.layout.residual is not None and not layer.layout.rank:
        raise ValueError(f"layer: is of {layer.layout}, which cannot hold a low-rank residual beside its own")
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        raise ValueError("left, right: have values that are not finite, must have none")
    own_left, own_right = lowrank_of(layer)
    left, right = torch.cat([own_left, left.detach().float()], 1), torch.cat([own_right, right.detach().float()])
    if left.shape[1] > MAX_RANK:
        raise ValueError(f"left: the ranks add up to {left.shape[1]}, must be at most {MAX_RANK}")
    _set_residual(layer, quantised_factors(left, right))


def lowrank_of(layer: RBELinear) -> tuple[Tensor, Tensor]:
    """(left [m, r], right [r, n]) of a `+lr` residual in float32; r = 0 without one."""
    if not layer.layout.rank:
        like = layer.basis.detach()
        return like.new_zeros(layer.out_features, 0), like.new_zeros(0, layer.in_features)
    return layer.residual.float() * layer.residual_scale, layer.residual_right.float() * layer.residual_right_scale[:, None]


def quantised_factors(left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The residual's tensors of the product left right, first rotated so that its factors are orthogonal: int8 then loses least. No m x n
    tensor is made."""
    (ql, rl), (qr, rr) = torch.linalg.qr(left), torch.linalg.qr(right.t())
    u, s, vh = torch.linalg.svd(rl @ rr.t(), full_matrices=False)
    rank = left.shape[1]
    a, b = left.new_zeros(left.shape), right.new_zeros(right.shape)
    kept = min(rank, s.numel())
    a[:, :kept], b[:kept] = (ql @ u) * s.sqrt(), s.sqrt()[:, None] * (vh @ qr.t())
    a_scale, b_scale = a.abs().amax(0) / 127, b.abs().amax(1) / 127
    return {
        "residual": (a / torch.where(a_scale > 0, a_scale, 1)).round().to(torch.int8), "residual_scale": a_scale,
        "residual_right": (b / torch.where(b_scale > 0, b_scale, 1)[:, None]).round().to(torch.int8), "residual_right_scale": b_scale,
    }


def _set_residual(layer: RBELinear, tensors: dict[str, Tensor] | None) -> None:
    """Gives the layer this low-rank residual and the layout that has it, or takes it away."""
    rank = None if tensors is None else tensors["residual"].shape[1]
    layout: Layout = replace(layer.layout, residual=None if rank is None else f"lr{rank}")
    layer._buffers["packed"] = layer.packed  # which form codes are held in goes by the layout
    layer.layout = layout
    layer._options = {**layer._options, "layout": str(layout)}
    for name in _NAMES:
        layer._buffers[name] = None if tensors is None else tensors[name]
    layer._hold_codes_for_kernels()
