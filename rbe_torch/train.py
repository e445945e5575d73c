"""Training in the compressed domain: layers in and out of training form. Optimiser groups: rbe_torch/rates.py.

Training form (method "direct"): no dense weight exists. Trained are the codes' amplitudes (layouts that have them), the basis unless it is
frozen, log(gain) and the bias; idx and the curve of each code stay. Method "latent" keeps a dense weight: rbe_torch/latent.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .codes import amplitude_of
from .encode import GAIN_MAX, fp16_gain, fp16_values
from .linear import RBELinear
from .watch import guard_rates


def start_training(layer: RBELinear, basis: str | None = None) -> None:
    """Puts one layer in training form; its output stays what it was. basis: "trained", "frozen", or None for trained unless a seed gives
    it."""
    if basis is None:
        basis = "trained" if layer._buffers.get("basis_seed") is None else "frozen"
    if layer.log_gain is not None:
        return
    guard_rates(layer)
    gain = layer._parameters["gain"].detach()
    layer.log_gain = nn.Parameter(gain.log())
    layer._parameters["gain"] = None  # the entry keeps its place: optimiser states go by the order of parameters
    layer.basis.requires_grad_(basis == "trained")
    if layer.layout.has_amplitude:
        words = torch.ops.rbe.unpack(layer.packed, **layer._options)
        layer.amplitude = nn.Parameter(amplitude_of(words))


def prepare_training(model: nn.Module, method: str = "direct", basis: str | None = None, **options: Any) -> nn.Module:
    """Puts every RBELinear of `model` in training form, in place, and returns the model. A layer that is in it already stays as it is.

    method: "direct" trains amplitudes, basis, gain and bias of the codes there are; "latent" a dense weight that is encoded again and again
    (rbe_torch/latent.py, which also has its loss terms); options: interval and temperature of its start_latent.
    basis: "trained", "frozen", or None: trained unless a seed gives it (convert with basis="seeded"). A frozen basis costs no gradient and
    no optimiser state; a seeded one that is trained is stored in full from then on.
    ValueError: another method or basis, or a model without an RBELinear.
    """
    if method not in ("direct", "latent"):
        raise ValueError(f"method: is {method!r}, must be 'direct' or 'latent'")
    if basis not in ("trained", "frozen", None):
        raise ValueError(f"basis: is {basis!r}, must be 'trained', 'frozen' or None")
    layers = _layers(model)
    if method == "latent":
        from .latent import start_latent

        start_latent(layers, basis, **options)
        return model
    if options:
        raise TypeError(f"{next(iter(options))}: is an option of method='latent', not of 'direct'")
    for layer in layers:
        start_training(layer, basis)
    return model


def finish_training(model: nn.Module) -> nn.Module:
    """Ends training form in place: amplitudes go into the codes, basis and gain are rounded to what fp16 holds and stop being trained.

    From here on saving and loading is bit-exact. Layers that are not in training form have their basis and gain rounded all the same; a
    gain below what fp16 holds becomes its smallest positive value. ValueError, before anything is changed: an amplitude, basis or gain that
    is not finite, a basis or gain beyond what fp16 holds, or a layer on the meta device.
    """
    layers = _layers(model)
    latent = [layer for layer in layers if "latent" in layer._parameters]
    lowrank = [layer for layer in layers if "lowrank_left" in layer._parameters]
    if latent:
        from .latent import finish_latent

        finish_latent(latent)
    if lowrank:
        from .lowrank import finish_lowrank

        finish_lowrank(lowrank)
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        problem = "model: has a layer on the meta device, which has no values to finish" if layer.packed.is_meta else layer.problem()
        if problem:
            raise ValueError(f"{names[layer]}: {problem}" if names[layer] else problem)
    tables = [fp16_values("basis", layer.basis) for layer in layers]
    gains = [layer.gain.detach() for layer in layers]
    for gain in gains:
        if float(gain.max()) > GAIN_MAX:
            raise ValueError(f"gain: holds {float(gain.max()):.3g}, must be at most {GAIN_MAX:.0f}, which is all that fp16 holds")
    for layer, table, gain in zip(layers, tables, gains, strict=True):
        layer.commit_amplitude()
        layer.amplitude = None
        layer.log_gain = None
        layer._parameters["gain"] = nn.Parameter(fp16_gain(gain), requires_grad=False)
        layer.basis.requires_grad_(False)
        with torch.no_grad():
            layer.basis.copy_(table)
    return model


def _layers(model: nn.Module) -> list[RBELinear]:
    layers = [module for module in model.modules() if isinstance(module, RBELinear)]
    if not layers:
        raise ValueError("model: has no RBELinear; call rbe_torch.convert or rbe_torch.compress first")
    return layers
