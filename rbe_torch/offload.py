"""A model whose blocks are read from shards when they run and forgotten afterwards: to calibrate a model that does not fit into memory.

Parameters are on the meta device until they are read. What lies outside the chain of blocks (embeddings, the last norm) is read once and stays; a block
is read when it is called, or for as long as `pinned(block)` lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .models import model_class
from .shards import Shards


def skeleton(config: Any) -> nn.Module:
    """The model with parameters on the meta device and buffers (rotary frequencies and the like) that are real."""
    kind, register = model_class(config), nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # as accelerate does: there is no other way to keep buffers real
    try:
        model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    finally:
        nn.Module.register_parameter = register
    model.tie_weights()
    return model.eval()


def block_names(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """The children of the longest list of blocks that hold all of the layers. ValueError: a layer outside."""
    best: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(best):
            names = [f"{name}.{child}" if name else child for child in module._modules]
            if any(layer.startswith(f"{name}.") for layer in layers):
                best = names
    outside = [layer for layer in layers if not any(layer.startswith(f"{block}.") for block in best)]
    if outside:
        raise ValueError(
            f"{outside[0]}: lies outside the chain of blocks, where a model in shards cannot be calibrated; exclude it, or load the model"
        )
    return best


class Offloaded:
    """`model` (a skeleton) with hooks that read blocks when they run. stored: name of a parameter -> its name in the shards."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], stored: dict[str, str], shards: Shards) -> None:
        self.model, self.stored, self.shards = model, stored, shards
        self._held: set[int] = set()
        inside = [f"{block}." for block in blocks]
        read: dict[str, nn.Parameter] = {}
        for name, module in model.named_modules():
            for key in module._parameters:
                full = f"{name}.{key}" if name else key
                if module._parameters[key] is not None and not full.startswith(tuple(inside)):
                    if stored[full] not in read:  # tied ones are read once
                        read[stored[full]] = nn.Parameter(shards.tensor(stored[full]), requires_grad=False)
                    module._parameters[key] = read[stored[full]]
        self._handles = []
        for block in blocks:
            module = model.get_submodule(block)
            # a copy of the block takes the hooks along and keeps its own parameters
            self._handles.append(
                module.register_forward_pre_hook(lambda who, _, own=module, block=block: self._before(block, own) if who is own else None)
            )
            self._handles.append(module.register_forward_hook(lambda who, _, output, own=module: self._after(own) if who is own else None))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def pinned(self, name: str, block: nn.Module) -> Iterator[None]:
        """While it lasts the block's parameters are there."""
        self._read(block, name)
        self._held.add(id(block))
        try:
            yield
        finally:
            self._held.discard(id(block))
            forget(block)

    def _before(self, name: str, module: nn.Module) -> None:
        if id(module) not in self._held:
            self._read(module, name)

    def _after(self, module: nn.Module) -> None:
        if id(module) not in self._held:
            forget(module)

    def _read(self, block: nn.Module, name: str) -> None:
        for inner, module in block.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    full = ".".join(part for part in (name, inner, key) if part)
                    module._parameters[key] = nn.Parameter(self.shards.tensor(self.stored[full]), requires_grad=False)


def forget(block: nn.Module) -> None:
    """Puts the block's parameters on the meta device."""
    for module in block.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
