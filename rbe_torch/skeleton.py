"""Filling an instance of a model's architecture from a checkpoint: its linear layers are replaced, everything else is assigned.

Everything is read and checked before the model is touched, so a checkpoint that does not fit leaves it as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .linear import RBELinear
from .replace import features, is_conv1d
from .state import guard_loading

if TYPE_CHECKING:
    from .reader import Checkpoint


def find_layer(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that dotted name, looked up among modules alone; None if there is none."""
    module: nn.Module | None = model
    for part in name.split(".") if name else []:
        module = module._modules.get(part) if module is not None else None
    return module


def check_layer(name: str, module: nn.Module | None, in_features: int, out_features: int) -> None:
    """ValueError unless `module` is a linear layer of that size."""
    if module is None:
        raise ValueError(f"layer {name!r}: the model has no such module")
    if not isinstance(module, (nn.Linear, RBELinear)) and not is_conv1d(module):
        raise ValueError(f"layer {name!r}: is a {type(module).__name__} in the model, must be a linear layer")
    if features(module) != (in_features, out_features):
        raise ValueError(f"layer {name!r}: has in_features={features(module)[0]} and out_features={features(module)[1]} in the model, "
                         f"{in_features} and {out_features} in the checkpoint")


def fill_model(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """`model` with the checkpoint's weights, in place. ValueError, before anything is changed, where the two do not fit."""
    if "" in checkpoint.layers:
        return _fill_single(model, checkpoint)
    old = {name: find_layer(model, name) for name in checkpoint.layers}
    for name, entry in checkpoint.layers.items():
        true = checkpoint.layers[entry.same_as] if entry.same_as is not None else entry
        check_layer(name, old[name], true.in_features, true.out_features)
    stray = [name for name, module in model.named_modules() if isinstance(module, RBELinear) and name not in checkpoint.layers]
    if stray:
        raise ValueError(f"layer {stray[0]!r}: is an RBELinear in the model and dense in the checkpoint")
    expected = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] not in checkpoint.layers}
    others = {name: checkpoint.tensor(name) for name in checkpoint.other_names()}
    biases = {name for name in others if name.rpartition(".")[0] in checkpoint.layers}
    missing, surplus = sorted(set(expected) - set(others)), sorted(set(others) - set(expected) - biases)
    if missing or surplus:
        raise ValueError(f"tensors do not fit the model: missing {missing[:3]}, unexpected {surplus[:3]}")
    for name, tensor in expected.items():
        if tuple(others[name].shape) != tuple(tensor.shape):
            raise ValueError(f"tensor {name!r}: has shape {tuple(others[name].shape)}, must be {tuple(tensor.shape)} in the model")
        if others[name].dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"tensor {name!r}: is {others[name].dtype}, must be {tensor.dtype} as in the model, or of its kind")
    tied = _places(model)
    for places in tied:
        if len({checkpoint.manifest.aliases.get(name, name) for _, _, name in places if name in expected}) > 1:
            raise ValueError(f"tensors {[name for _, _, name in places]} are one parameter in the model and several in the checkpoint")
    device = next((t.device for t in expected.values() if not t.is_meta), torch.device("cpu"))
    new: dict[str, RBELinear] = {}
    for name, entry in checkpoint.layers.items():
        if entry.same_as is None:
            weight = next((p for p in old[name]._parameters.values() if p is not None), None)
            new[name] = checkpoint.layer(name).to(device if weight is None or weight.is_meta else weight.device).train(old[name].training)
            new[name].stands_for_conv1d = is_conv1d(old[name]) or getattr(old[name], "stands_for_conv1d", False)
    _share_bases(checkpoint, new)

    for name, entry in checkpoint.layers.items():
        parent = find_layer(model, name.rpartition(".")[0])
        parent._modules[name.rpartition(".")[2]] = new[entry.same_as or name]
    values = {name: others[name].to(device if tensor.is_meta else tensor.device) for name, tensor in expected.items()}
    model.load_state_dict(values, strict=False, assign=True)
    for places in tied:
        places = [place for place in places if place[2] in expected]
        for module, key, _ in places[1:]:
            module._parameters[key] = places[0][0]._parameters[places[0][1]]
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"tensor {empty[0]!r}: is on the meta device and not in the checkpoint; build the model on a real device")
    guard_loading(model)
    return model


def _fill_single(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """A checkpoint of one RBELinear without a model around it: `model` must be one already, or there is no place to put it."""
    entry = checkpoint.layers[""]
    check_layer("", model, entry.in_features, entry.out_features)
    return checkpoint.layer("").train(model.training)


def _places(model: nn.Module) -> list[list[tuple[nn.Module, str, str]]]:
    """The places of every parameter that has more than one: (module, key, full name)."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not isinstance(module, RBELinear):
                places.setdefault(id(parameter), []).append((module, key, f"{name}.{key}" if name else key))
    return [found for found in places.values() if len(found) > 1]


def _share_bases(checkpoint: Checkpoint, layers: dict[str, RBELinear]) -> None:
    """Layers of one basis on one device share one parameter."""
    tables: dict[tuple[int, torch.device], Tensor] = {}
    for name, layer in layers.items():
        key = (checkpoint.layers[name].basis, layer.basis.device)
        layer._parameters["basis"] = tables.setdefault(key, layer.basis)
