"""A model with RBELinears as named tensors and the manifest that describes them: what a checkpoint holds.

For a layer L: `L.packed` (the codes), `L.gain`, `L.bias`, the residual's tensors; `rbe.basis.<i>`, each distinct basis once (a basis
that a seed gives is no tensor but `basis_seed` in the manifest); and every other tensor of the
model under its own name, once. Basis and gain are fp16, or float32 where fp16 would lose something.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .linear import RBELinear
from .manifest import BASIS_PREFIX, LayerEntry, Manifest
from .problems import RESIDUALS
from .seeded import basis_seed_of


def pack_model(model: nn.Module) -> tuple[dict[str, Tensor], Manifest]:
    """What save_pretrained writes: tensors on the CPU by name, and the manifest that describes them."""
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    bases: dict[str, int] = {}  # hash of the stored table -> number
    first: dict[int, str] = {}
    wide: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, RBELinear):
            continue
        if id(module) in first:
            layers[name] = LayerEntry(same_as=first[id(module)])
            continue
        first[id(module)] = name
        if module.training_form:
            raise ValueError(f"model: layer {name!r} is in training form; call rbe_torch.finish_training(model) before saving, or keep training "
                             "states with torch.save(model.state_dict())")
        if module._modules:
            raise ValueError(f"model: layer {name!r} has modules in it ({', '.join(module._modules)}); a checkpoint holds its tensors alone: call "
                             "torch.nn.utils.parametrize.remove_parametrizations first")
        problem = "its tensors are on the meta device" if module.packed.is_meta else module.problem()
        if problem:
            raise ValueError(f"model: layer {name!r} cannot be saved: {problem}")
        prefix = f"{name}." if name else ""
        basis_seed = basis_seed_of(module.basis, module.layout, module._buffers.get("basis_seed"))
        if basis_seed is None:
            basis = _compact(module.basis, f"{prefix}basis", wide)
            number = bases.setdefault(f"{tuple(basis.shape)}{digest(basis)}", len(bases))
            tensors[f"{BASIS_PREFIX}{number}"] = basis
        else:
            number = bases.setdefault(f"{module.layout.basis_shape} of seed {basis_seed}", len(bases))
        tensors[prefix + "packed"] = module.packed.detach().cpu().contiguous()
        tensors[prefix + "gain"] = _compact(module.gain, f"{prefix}gain", wide)
        for key in RESIDUALS:
            if module._buffers[key] is not None:
                tensors[prefix + key] = module._buffers[key].detach().cpu().contiguous()
        layers[name] = LayerEntry(str(module.layout), module.in_features, module.out_features, number,
                                  int(module.seed) if module.layout.seeded else None, str(module.dtype).removeprefix("torch."),
                                  module.bias is not None, basis_seed=basis_seed)
    if not layers:
        raise ValueError("model: has no RBELinear; call rbe_torch.compress first")
    if wide:
        warnings.warn(f"{', '.join(wide[:3])}{' and more' if len(wide) > 3 else ''}: values that fp16 does not hold are stored as float32, at twice the "
                      "size; rbe_torch.finish_training(model) rounds them", UserWarning, stacklevel=3)
    aliases = _add_others(model, layers, tensors)
    hashes = {name: digest(tensor) for name, tensor in tensors.items()}
    return tensors, Manifest(layers, hashes, aliases, f"{type(model).__module__}.{type(model).__qualname__}", model_config(model))


def _add_others(model: nn.Module, layers: dict[str, LayerEntry], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Adds every tensor that is no part of an RBE weight; returns the names that share another name's tensor."""
    own = {f"{name}." if name else "" for name in layers}
    aliases: dict[str, str] = {}
    stored: dict[tuple, str] = {}
    for name, value in model.state_dict().items():
        prefix, _, key = name.rpartition(".")
        if (f"{prefix}." if prefix else "") in own and key != "bias":
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"model: {name!r} of its state_dict is a {type(value).__name__}; only tensors can be saved")
        if value.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device and has no values")
        if name in tensors or name.startswith(BASIS_PREFIX):
            raise ValueError(f"model: the name {name!r} is taken by rbe_torch's own tensors")
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in stored:
            aliases[name] = stored[place]
            continue
        stored[place] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return aliases


def _compact(tensor: Tensor, name: str, wide: list[str]) -> Tensor:
    """fp16 where that loses nothing, else float32 and the name noted."""
    full = tensor.detach().cpu().contiguous().clone()
    half = full.half()
    if torch.equal(half.float(), full):
        return half
    wide.append(name)
    return full


def model_config(model: nn.Module) -> dict[str, Any] | None:
    """A transformers model's configuration as from_pretrained wants it; None for another model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return None
    plain = json.loads(config.to_json_string())
    plain.pop("quantization_config", None)
    plain["architectures"] = [type(model).__name__]
    dtypes = [p.dtype for m in model.modules() if not isinstance(m, RBELinear) for p in m._parameters.values() if p is not None and p.is_floating_point()]
    dtypes += [m.dtype for m in model.modules() if isinstance(m, RBELinear)]
    plain["dtype"] = str(dtypes[0]).removeprefix("torch.")
    return plain


def digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"").hexdigest()
