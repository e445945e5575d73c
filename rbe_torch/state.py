"""Loading a state_dict into an RBELinear: its entries are checked, all of them, before the first is copied, and made to fit the layer's present form.

A dense `weight` entry is encoded; entries of a finished layer are turned into those of a layer in training form where the layer is in it.

torch loads a model module after module and complains at the end. So that a model of which one layer is refused stays as it was, `guard_loading`
has the model check its layers before torch starts; compress, convert and load_pretrained do that with the model they are given.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .codes import amplitude_of, is_interleaved
from .encode import encode_layer
from .problems import RESIDUALS, find_problem

if TYPE_CHECKING:
    from .linear import RBELinear


class _Load:
    """One call of load_state_dict, told from the next by torch's own list of missing keys."""

    def __init__(self, missing_keys: list[str]) -> None:
        self.missing_keys = missing_keys
        self.warned = False
        self.bases: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # by id: a basis as it was before, and after

    @staticmethod
    def of(missing_keys: list[str]) -> _Load:
        global _load
        if _load.missing_keys is not missing_keys:
            _load = _Load(missing_keys)
        return _load


_load = _Load([])


def load_entries(layer: RBELinear, own: dict[str, Any], prefix: str, metadata: dict[str, Any], missing_keys: list[str]) -> tuple[str, dict[str, Any]]:
    """(why the entries `own` of a state_dict cannot be loaded, or "", those entries in the layer's present form). The layer is not changed."""
    load, assign = _Load.of(missing_keys), bool(metadata.get("assign_to_params_buffers", False))
    entries = {key.removeprefix(prefix): value for key, value in own.items() if "." not in key.removeprefix(prefix)}
    refused = _refusal(layer, entries, metadata)
    before = load.bases.get(id(layer.basis))
    if not refused and before is not None and not assign and "basis" in entries and _differ(before[1], entries["basis"]):
        refused = _SHARED
    if refused:
        return refused, own
    if "weight" in entries and "packed" not in entries:
        if not load.warned:
            load.warned = True
            warnings.warn("the state_dict holds dense weights for RBELinear layers: they are encoded with each layer's current basis, which loses "
                          "accuracy; rbe_torch.compress fits a basis to the weights", UserWarning, stacklevel=4)
        own.pop(prefix + "weight")
        weight = entries.pop("weight")
        fitted = {**entries, **_encoded(layer, weight)}
    else:
        fitted = {name: _in_kind(layer, name, value) for name, value in entries.items()}
    _match_form(layer, fitted)
    return "", {**{key: value for key, value in own.items() if key != prefix + "gain"}, **{prefix + name: value for name, value in fitted.items()}}


def share_basis(layer: RBELinear, before: nn.Parameter, missing_keys: list[str]) -> None:
    """After a layer was loaded: where load_state_dict(assign=True) gave layers of one basis equal ones, they share one again."""
    bases = _Load.of(missing_keys).bases
    _, after = bases.setdefault(id(before), (before, layer.basis))
    if after is not layer.basis and not _differ(after, layer.basis):
        layer._parameters["basis"] = after


def guard_loading(model: nn.Module) -> None:
    """Has `model` refuse a state_dict that one of its RBELinears cannot take before anything is copied."""
    if not any(hook.hook is _refuse for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_refuse)


def _refuse(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *_: Any) -> None:
    from .linear import RBELinear

    kinds, found, bases = getattr(state_dict, "_metadata", None) or {}, [], {}
    for name, layer in model.named_modules(prefix=prefix.removesuffix(".")):
        if not isinstance(layer, RBELinear):
            continue
        start = f"{name}." if name else ""
        entries = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start) and "." not in key.removeprefix(start)}
        refused = _refusal(layer, entries, kinds.get(name, {}))
        if not refused and "basis" in entries:
            first = bases.setdefault(id(layer.basis), entries["basis"])
            if not metadata.get("assign_to_params_buffers", False) and _differ(first, entries["basis"]):
                refused = _SHARED
        if refused:
            found.append(f"{name or 'the layer'}: {refused}")
    if found:
        more = f"\n\tand {len(found) - 5} more layers" if len(found) > 5 else ""
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}, which is unchanged:\n\t" + "\n\t".join(found[:5]) + more)


_SHARED = "basis: is another one in the state_dict than for a layer that shares it; give the layers bases of their own, or load with assign=True"


def _refusal(layer: RBELinear, entries: dict[str, Any], metadata: dict[str, Any]) -> str:
    """Why these entries (by name, without prefix) cannot be loaded, or ""."""
    saved = (metadata.get("layout", str(layer.layout)), metadata.get("in_features", layer.in_features))
    if saved != (str(layer.layout), layer.in_features):
        return (f"the state_dict holds layout {saved[0]} with in_features={saved[1]}, "
                f"the layer is {layer.layout} with in_features={layer.in_features}")
    m, n = layer.out_features, layer.in_features
    held = {name: tensor for name, tensor in (*layer._parameters.items(), *layer._buffers.items()) if tensor is not None}
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    wanted |= {"packed": ((m, layer.layout.packed_row_bytes(n)), torch.uint8), "gain": ((m,), torch.float32), "weight": ((m, n), torch.float32)}
    if "log_gain" in entries and not layer.training_form:
        return "log_gain: the state_dict is of a layer in training form; call rbe_torch.prepare_training(model) before loading it"
    for name, value in entries.items():
        if name not in wanted:  # torch names it as unexpected
            continue
        shape, dtype = wanted[name]
        if not isinstance(value, Tensor):
            return f"{name}: is a {type(value).__name__} in the state_dict, must be a torch.Tensor"
        exact = name in ("packed", *RESIDUALS) and not (dtype.is_floating_point and dtype.itemsize > 1)
        if value.dtype != dtype if exact else value.dtype.is_floating_point != dtype.is_floating_point or value.dtype.is_complex:
            return f"{name}: is {value.dtype} in the state_dict, must be {dtype}"
        if tuple(value.shape) != shape:
            hint = "; was it saved from a layer of another layout?" if name in ("packed", "basis", *RESIDUALS) else ""
            return f"{name}: has shape {tuple(value.shape)} in the state_dict, must be {shape} for {layer.layout}{hint}"
    weight = entries.get("weight")
    if weight is not None and "packed" not in entries:
        if layer.basis.is_meta:
            return "weight: is dense and cannot be encoded into a layer on the meta device, which has no basis"
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            return f"weight: has {int((~torch.isfinite(weight)).sum())} values that are not finite, must have none"
        return ""
    return find_problem(layer, {name: _in_kind(layer, name, value) for name, value in entries.items() if name in wanted and name != "weight"})


def _in_kind(layer: RBELinear, name: str, value: Any) -> Any:
    """The format's numbers in the dtype that the layer holds them in."""
    held = layer._parameters.get(name)
    if name in ("basis", "gain", "log_gain", "amplitude") and isinstance(value, Tensor):
        return value if held is None or value.dtype == held.dtype else value.to(held.dtype)
    return value


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta or a is b:
        return False
    return a.shape != b.shape or not torch.equal(a.detach().float(), b.detach().float().to(a.device))


def _encoded(layer: RBELinear, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that encode a dense weight with the layer's current basis."""
    parts = encode_layer(weight.detach().to(layer.basis.device), layer.layout, layer.basis, None, layer._options["seed"], round_basis=False)
    made = {"packed": torch.ops.rbe.pack(parts.codes, **layer._options), "basis": layer.basis, "gain": parts.gain, **parts.residual}
    return made | ({"seed": layer.seed} if layer.layout.seeded else {})


def _match_form(layer: RBELinear, entries: dict[str, Any]) -> None:
    """Turns the entries of a finished layer into those of a layer in training form, and packed codes into interleaved ones, where the layer is so."""
    packed = entries.get("packed")
    if layer.log_gain is not None and "gain" in entries:
        entries["log_gain"] = entries.pop("gain").log()
        if layer.amplitude is not None and packed is not None:
            entries["amplitude"] = amplitude_of(torch.ops.rbe.unpack(packed, **layer._options))
    if packed is not None and is_interleaved(layer._buffers["packed"]):
        entries["packed"] = torch.ops.rbe.interleave(packed.contiguous())
