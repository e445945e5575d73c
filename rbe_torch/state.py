"""State of an RBELinear: what makes it invalid, and how entries of a state_dict are made to fit a layer before nn.Module copies them.

A dense `weight` entry is encoded; entries of a finished layer are turned into those of a layer in training form where the layer is in it.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from .codes import amplitude_of
from .encode import encode_layer

if TYPE_CHECKING:
    from .linear import RBELinear

RESIDUALS = ("residual", "residual_scale", "residual_right", "residual_right_scale")
_warned_for: list[str] | None = None  # load_state_dict's own list of missing keys: one list a load, so one warning a load


def find_problem(layer: RBELinear) -> str:
    """RBELinear.problem."""
    checks = [("basis", layer.basis), ("gain", layer._parameters.get("gain")), ("log_gain", layer.log_gain), ("amplitude", layer.amplitude)]
    for name, tensor in checks:
        if tensor is not None and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            return f"{name}: has {int((~torch.isfinite(tensor)).sum())} values that are not finite, must have none"
    gain = layer._parameters.get("gain")
    if gain is not None and not gain.is_meta and not bool((gain > 0).all()):
        return f"gain: has {int((gain <= 0).sum())} values that are not positive, the first in row {int((gain <= 0).nonzero()[0])}"
    for name in ("residual", "residual_scale", "residual_right_scale"):
        tensor = layer._buffers[name]
        if tensor is not None and tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all()):
            return f"{name}: has values that are not finite, must have none"
    if layer.layout.fraction and not layer.residual_right.is_meta:
        columns = layer.residual_right
        if int(columns.min()) < 0 or int(columns.max()) >= layer.in_features or not bool((columns[:, 1:] > columns[:, :-1]).all()):
            return f"residual_right: its columns must rise within each row and lie in 0 .. {layer.in_features - 1}"
    if not layer.packed.is_meta:
        try:
            torch.ops.rbe.unpack(layer.packed, **layer._options)
        except RuntimeError as error:
            return without_operator(error)
    return ""


def fit_entries(layer: RBELinear, own: dict[str, Any], prefix: str, metadata: dict[str, Any], missing_keys: list[str]) -> None:
    """Changes the entries `own` of a state_dict so that they fit the layer's present form. ValueError where they cannot."""
    saved = (metadata.get("layout", str(layer.layout)), metadata.get("in_features", layer.in_features))
    if saved != (str(layer.layout), layer.in_features):
        raise ValueError(f"the state_dict holds layout {saved[0]} with in_features={saved[1]}, "
                         f"the layer is {layer.layout} with in_features={layer.in_features}")
    if prefix + "weight" in own and prefix + "packed" not in own:
        _warn_encoding(missing_keys)
        _encode_entry(layer, own, prefix)
    _match_form(layer, own, prefix)


def _encode_entry(layer: RBELinear, own: dict[str, Any], prefix: str) -> None:
    """Replaces a dense `weight` entry by the tensors that encode it with the layer's current basis."""
    weight = own.pop(prefix + "weight")
    if tuple(weight.shape) != (layer.out_features, layer.in_features):
        raise ValueError(f"weight: has shape {tuple(weight.shape)}, must be {(layer.out_features, layer.in_features)}")
    if layer.basis.is_meta:
        raise ValueError("weight: is dense and cannot be encoded into a layer on the meta device, which has no basis")
    parts = encode_layer(weight.detach().to(layer.basis.device), layer.layout, layer.basis, None, layer._options["seed"], round_basis=False)
    own[prefix + "packed"] = torch.ops.rbe.pack(parts.codes, **layer._options)
    own[prefix + "basis"] = layer.basis
    own[prefix + "gain"] = parts.gain
    own.update({prefix + name: tensor for name, tensor in parts.residual.items()})
    if layer.layout.seeded:
        own[prefix + "seed"] = layer.seed


def _match_form(layer: RBELinear, own: dict[str, Any], prefix: str) -> None:
    """Checks shapes against the layout; turns the entries of a finished layer into those of a layer in training form."""
    packed, basis = own.get(prefix + "packed"), own.get(prefix + "basis")
    for name, tensor in ((key.removeprefix(prefix), value) for key, value in own.items()):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: is a {type(tensor).__name__} in the state_dict, must be a torch.Tensor")
        held = getattr(layer, name, None) if "." not in name else None
        if isinstance(held, torch.Tensor) and held.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: is {tensor.dtype} in the state_dict, must be {held.dtype}")
    shape = (layer.out_features, layer.layout.packed_row_bytes(layer.in_features))
    for name, tensor, wanted in (("packed", packed, shape), ("basis", basis, layer.layout.basis_shape)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{name}: has shape {tuple(tensor.shape)} in the state_dict, must be {wanted} for {layer.layout}; "
                             "was it saved from a layer of another layout?")
    if prefix + "log_gain" in own and not layer.training_form:
        raise ValueError("log_gain: the state_dict is of a layer in training form; call rbe_torch.prepare_training(model) before loading it")
    if layer.log_gain is None or prefix + "gain" not in own:
        return
    gain = own.pop(prefix + "gain")
    if not bool((gain > 0).all()):
        raise ValueError("gain: has values in the state_dict that are not positive")
    own[prefix + "log_gain"] = gain.log()
    if layer.amplitude is not None and packed is not None:
        words = torch.ops.rbe.unpack(packed, **layer._options)
        own[prefix + "amplitude"] = amplitude_of(words)


def _warn_encoding(load: list[str]) -> None:
    global _warned_for
    if _warned_for is not load:
        _warned_for = load
        warnings.warn("the state_dict holds dense weights for RBELinear layers: they are encoded with each layer's current basis, which loses "
                      "accuracy; rbe_torch.compress fits a basis to the weights", UserWarning, stacklevel=3)


def without_operator(error: RuntimeError) -> str:
    """The sentence of an operator's error without the operator's name in front."""
    return str(error).removeprefix("rbe::pack: ").removeprefix("rbe::unpack: ")
