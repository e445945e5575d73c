"""Finding the linear layers of a model and replacing them: which can be converted, and for each of the others the reason why not.

`find_linears` lists every module that holds a weight matrix; `replace` puts another module in all of a module's places; `convert`
(random codes, to train from scratch) and `decompress` (back to nn.Linear) are built on the two.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .layout import Layout
from .report import Report

if TYPE_CHECKING:
    from .linear import RBELinear

# Last component of the name of a module that maps features to classes or to a vocabulary.
HEAD_NAMES = frozenset({"lm_head", "classifier", "score", "head", "heads", "qa_outputs", "embed_out", "output_projection"})
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BASES = ("trained", "frozen", "seeded")

Patterns = str | Iterable[str] | None


@dataclass(frozen=True)
class Found:
    """A module with a weight matrix. `places` are all (parent, child name) that hold it; `reason` is empty if it can be converted."""

    name: str
    module: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    reason: str

    @property
    def convertible(self) -> bool:
        return not self.reason


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' Conv1D (a linear layer with its weight transposed), without importing transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight [out_features, in_features] of an nn.Linear or a Conv1D, detached."""
    weight = module.weight.detach()
    return weight.t() if is_conv1d(module) else weight


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or a Conv1D."""
    return (module.nx, module.nf) if is_conv1d(module) else (module.in_features, module.out_features)


def find_linears(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> list[Found]:
    """Every module of `model` that holds a weight matrix, in the model's order, each with the reason why it is left alone or none.

    include, exclude: a regular expression or several, searched for anywhere in a module's dotted name. Without `include` output heads
    are left alone; a head that `include` names is converted. ValueError: a pattern that is no regular expression or matches nothing, an
    `include` that matches only modules that cannot be converted, or nothing to convert at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: is a {type(model).__name__}, must be a torch.nn.Module")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model: {name!r} is lazy and has no shape yet; call the model once before")
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    names = {id(module): name for name, module in model.named_modules()}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    parents: dict[int, list[nn.Module]] = {}
    owners: dict[int, list[str]] = {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, child_name))
                parents.setdefault(id(child), []).append(parent)
        for key, parameter in parent._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{parent_name}.{key}" if parent_name else key)
    heads = _output_heads(model)

    found, hits, refused = [], {pattern: 0 for pattern in (*included, *excluded)}, {}
    for name, module in model.named_modules():
        if not _holds_matrix(module):
            continue
        wanted = [pattern for pattern in included if pattern.search(name)]
        unwanted = [pattern for pattern in excluded if pattern.search(name)]
        for pattern in (*wanted, *unwanted):
            hits[pattern] += 1
        reason = _cannot(module, name, parents.get(id(module), []), owners)
        if not reason and not places.get(id(module)):
            reason = "is the model itself, which cannot be replaced in place; use RBELinear.from_linear"
        for pattern in wanted:
            refused.setdefault(pattern, []).append(f"{name or type(module).__name__}: {reason}" if reason else "")
        if not reason and unwanted:
            reason = f"excluded by {unwanted[0].pattern!r}"
        if not reason and included and not wanted:
            reason = "not named by include"
        if not reason and not included and (id(module) in heads or name.rsplit(".", 1)[-1] in HEAD_NAMES):
            reason = "output head; name it in include to convert it"
        found.append(Found(names[id(module)], module, tuple(places.get(id(module), ())), reason))

    for pattern, count in hits.items():
        side = "include" if pattern in included else "exclude"
        if not count:
            raise ValueError(f"{side}: {pattern.pattern!r} matches no module of the model that holds a weight matrix")
        if pattern in included and all(refused[pattern]):
            raise ValueError(f"include: {pattern.pattern!r} matches only modules that cannot be converted: {'; '.join(refused[pattern][:3])}")
    if not any(entry.convertible for entry in found):
        seen = "; ".join(f"{entry.name or type(entry.module).__name__}: {entry.reason}" for entry in found[:3])
        raise ValueError(f"model: has no module that can be converted ({seen or 'it holds no weight matrix'})")
    return found


def replace(found: Found, new: nn.Module) -> None:
    """Puts `new` wherever the found module is."""
    new.train(found.module.training)
    if is_conv1d(found.module):
        new.stands_for_conv1d = True
    for parent, child_name in found.places:
        parent._modules[child_name] = new


def note_for_transformers(model: nn.Module, compressed: bool) -> None:
    """Tells transformers models in `model` that they now hold RBE layers, so that their own save_pretrained works, or that they no longer do."""
    for module in model.modules():
        if any(base.__module__ == "transformers.modeling_utils" for base in type(module).__mro__):
            try:
                from . import hf
            except ImportError:  # a transformers too old for rbe_torch.hf
                return
            hf.attach(model) if compressed else hf.detach(model)
            return


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the distinct parameters and persistent buffers that are no part of an RBE layer's weight."""
    from .linear import RBELinear

    seen, total = set(), 0
    for module in model.modules():
        own = ("bias",) if isinstance(module, RBELinear) else None
        tensors = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}}
        for key, tensor in tensors.items():
            if tensor is not None and (own is None or key in own) and id(tensor) not in seen:
                seen.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
    return total


def convert(model: nn.Module, layout: str | Layout = "rbe22_g64", seed: int = 0, include: Patterns = None, exclude: Patterns = None,
            basis: str = "trained", nonlinearity: str | None = None, init_scale: float = 1.0) -> Report:
    """Replaces the linear layers of `model` in place by RBELinears with random codes, ready to be trained from scratch (method "direct").

    Every layer gets an amplitude parameter where the layout has one; all of them share one basis (one a device). The variance of the
    weights is that of nn.Linear's initialisation, or, with `nonlinearity` ("linear", "relu", "tanh": what follows the layers), the one that keeps the variance
    of activations through depth (rbe_torch/initial.py). Biases are kept. include, exclude: see find_linears. Returns the report.

    init_scale: weights start at so many times that size (standard deviation), 0.01 to 1, amplitudes being made smaller and gains kept. Where layers add to
    a residual stream, as in transformers, 0.4 with nonlinearity="linear" trains better than 1 (docs/training-experiments.md, "A small start").

    basis: "trained", "frozen" (a random table that stays what it is, and is stored) or "seeded" (one of signs that a seed gives: it stays what it is and
    only the seed is stored, rbe_torch/seeded.py). In a small model the table is a large part of the bytes, and training it gains little; see docs/training-experiments.md.
    """
    from .arguments import seed_value
    from .drawing import random_basis
    from .initial import SMALLEST_SCALE, calculated_gain, keep_variance, scale_weights
    from .linear import RBELinear
    from .seeded import seeded_basis
    from .state import guard_loading
    from .train import start_training

    layout = Layout.parse(layout)
    if basis not in BASES:
        raise ValueError(f"basis: is {basis!r}, must be one of {', '.join(map(repr, BASES))}")
    if layout.residual is not None:
        raise ValueError(f"layout: {str(layout)!r} has a residual, which is fitted to a trained weight; use compress, or drop the suffix")
    if nonlinearity is not None:
        calculated_gain(nonlinearity)  # refuses one that is none before anything is replaced
    if isinstance(init_scale, bool) or not isinstance(init_scale, int | float):
        raise TypeError(f"init_scale: is a {type(init_scale).__name__}, must be a number")
    if not SMALLEST_SCALE <= init_scale <= 1:
        raise ValueError(f"init_scale: is {init_scale}, must be {SMALLEST_SCALE} to 1")
    generator = torch.Generator().manual_seed(seed_value(seed))
    found = find_linears(model, include, exclude)
    basis_seed = int(torch.randint(0, 2**32, (), generator=generator)) if basis == "seeded" else None
    values = random_basis(layout, generator) if basis_seed is None else seeded_basis(layout, basis_seed)
    bases: dict[torch.device, nn.Parameter] = {}
    report = Report()
    for entry in found:
        if not entry.convertible:
            report.add_skipped(entry.name, entry.module, entry.reason)
            continue
        n, m = features(entry.module)
        old = entry.module.weight
        if old.device not in bases:
            bases[old.device] = nn.Parameter(values.to(old.device), requires_grad=basis == "trained")
        new = RBELinear(n, m, bias=False, layout=layout, device=old.device, dtype=old.dtype, basis=bases[old.device], generator=generator,
                        basis_seed=basis_seed)
        new.bias = entry.module.bias
        if nonlinearity is not None and not old.is_meta:
            keep_variance(new, nonlinearity)
        start_training(new, "trained" if basis == "trained" else "frozen")
        if init_scale != 1 and not old.is_meta:
            scale_weights(new, init_scale)
        replace(entry, new)
        report.add_converted(entry.name, new, type(entry.module).__name__)
    if basis != "trained" and not layout.has_amplitude:
        report.notes.append(f"basis: is {basis!r}, and codes of {layout} have no amplitude: of the layers gains and biases alone are trained; take basis='trained' or rbe4r, rbe9r, rbe22")
    report.other_bytes = stored_bytes(model)
    guard_loading(model)
    note_for_transformers(model, True)
    return report


def decompress(model: nn.Module) -> nn.Module:
    """Replaces every RBELinear of `model` in place by an nn.Linear holding its decoded weight, and returns the model. Where the model had a transformers
    Conv1D it gets one back, so that its class can save and load it.

    A model that is itself an RBELinear is returned as a new nn.Linear. Each layer's weight is decoded in float32 and stored in the layer's dtype.
    """
    from .linear import RBELinear

    if isinstance(model, RBELinear):
        return model.to_linear()
    dense: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, RBELinear):
                if id(child) not in dense:
                    dense[id(child)] = _conv1d(child) if child.stands_for_conv1d else child.to_linear()
                parent._modules[name] = dense[id(child)]
    note_for_transformers(model, False)
    return model


def _conv1d(layer: RBELinear) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    linear = layer.to_linear()
    with torch.device("meta"):
        module = Conv1D(layer.out_features, layer.in_features)
    module.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    module.bias = nn.Parameter(linear.weight.new_zeros(layer.out_features)) if linear.bias is None else linear.bias
    return module.train(layer.training)


def _patterns(argument: str, patterns: Patterns) -> list[re.Pattern]:
    if patterns is None:
        return []
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{argument}: is a {type(patterns).__name__}, must be a regular expression or an iterable of them")
    compiled = []
    for text in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(text, str):
            raise TypeError(f"{argument}: holds a {type(text).__name__}, must be a regular expression or an iterable of them")
        try:
            compiled.append(re.compile(text))
        except re.error as error:
            raise ValueError(f"{argument}: {text!r} is not a regular expression: {error}") from error
    return compiled


def _holds_matrix(module: nn.Module) -> bool:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return True
    return any(parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values())


def _output_heads(model: nn.Module) -> set[int]:
    heads = set()
    for name, child in model.named_children():
        inner = [module for module in child.modules() if _holds_matrix(module) and module is not child]
        if name in HEAD_NAMES and inner:  # RoBERTa's classifier, torchvision's, timm's head: the last layer in it
            heads.add(id(inner[-1]))
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None:
        with contextlib.suppress(NotImplementedError, AttributeError):  # transformers' base class, where a model has no head
            heads.add(id(getter()))
    return heads


def _cannot(module: nn.Module, name: str, parents: list[nn.Module], owners: dict[int, list[str]]) -> str:
    """Why the module cannot be converted whatever the user asks for; empty if it can."""
    from .linear import RBELinear

    if isinstance(module, RBELinear):
        return "is an RBELinear already"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights directly and never calls a replaced layer"
    if isinstance(module, nn.Embedding):
        return "embedding"
    for parent in parents:
        if isinstance(parent, nn.MultiheadAttention):
            return "part of nn.MultiheadAttention, which reads its weight directly"
        if isinstance(parent, nn.TransformerEncoderLayer):
            return "part of nn.TransformerEncoderLayer, whose fast path reads its weight directly"
    if type(module) is not nn.Linear and not is_conv1d(module):
        if isinstance(module, nn.Linear):
            return f"is a {type(module).__name__}, a subclass of nn.Linear that may do more than it"
        return f"is a {type(module).__name__}; only nn.Linear and transformers' Conv1D can be converted"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (is it parametrised or normalised by hooks?)"
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        return f"its weight is a {type(weight.data).__name__} of {weight.dtype}, not a floating-point parameter"
    if weight.numel() == 0:
        return f"its weight is empty ({tuple(weight.shape)})"
    others = [owner for owner in owners[id(weight)] if owner != (f"{name}.weight" if name else "weight")]
    if others:
        return f"its weight is tied to {', '.join(others)}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which a replacement would lose"
    return ""
