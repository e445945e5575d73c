"""Random values of an RBELinear: a basis, and codes, gain and bias whose weight has the variance of nn.Linear's initialisation, 1 / (3 in_features)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codes import amplitude_of, random_words, second_moment
from .layout import Layout
from .problems import RESIDUALS
from .seeded import seeded_basis

if TYPE_CHECKING:
    from .linear import RBELinear


def random_basis(layout: Layout, generator: torch.Generator | None = None) -> Tensor:
    """Normal vectors [M, 256, g] of mean square 1 in every stage, fp16-representable float32."""
    values = torch.randn(layout.basis_shape, generator=generator, dtype=torch.float32, device="cpu")
    return (values / values.square().mean((1, 2), keepdim=True).sqrt()).half().float()


@torch.no_grad()
def draw_layer(layer: RBELinear, generator: torch.Generator | None, basis: bool) -> None:
    """RBELinear.reset_parameters."""
    m, n, layout = layer.out_features, layer.in_features, layer.layout
    if basis and not layer.basis.is_meta:
        drawn = layer._basis_seed
        layer.basis.copy_(random_basis(layout, generator) if drawn is None else seeded_basis(layout, drawn))
        if drawn is not None:
            layer.basis_seed.fill_(drawn)  # after to_empty the buffer holds anything
    coded = not layer.packed.is_meta
    if coded:
        if layout.seeded:
            layer._set_seed(layer._options["seed"])  # after to_empty the buffer holds anything
        words = random_words(layout, m, n, layer._options["seed"], generator)
        layer.packed = torch.ops.rbe.pack(words, **layer._options).to(layer.packed.device)
        layer._hold_codes_for_kernels()
        if layer.amplitude is not None:
            layer.amplitude.copy_(amplitude_of(words))
    size = layer._parameters["gain"] if layer.log_gain is None else layer.log_gain
    if not size.is_meta:
        # random_words draws scales of second moment 1 (few bits of amplitude miss it) and random_basis vectors of mean square 1, so an
        # element of W has the variance M gain^2; nn.Linear draws it uniformly from +-1/sqrt(n)
        moment = second_moment(words, layout) if layout.amp_unstored and coded else 1.0
        gain = torch.tensor(1 / math.sqrt(3 * n * layout.stages * moment), dtype=torch.float16).float()
        size.fill_(gain if layer.log_gain is None else gain.log())
    _clear_residual(layer)
    if layer.bias is not None and not layer.bias.is_meta:
        bound = 1 / math.sqrt(n)
        layer.bias.copy_(torch.empty(m, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator))


def _clear_residual(layer: RBELinear) -> None:
    for name in RESIDUALS:
        tensor = layer._buffers[name]
        if tensor is not None and not tensor.is_meta:
            tensor.zero_()
            if tensor.dtype == torch.int32:
                tensor += torch.arange(tensor.shape[1], dtype=torch.int32, device=tensor.device)  # columns rise in a row
