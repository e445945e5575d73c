"""A compressed transformers model as a program of torch.export (a .pt2 file), in which the linear layers stay torch.ops.rbe.linear on codes.

A program is run by `torch.export.load(file).module()(**inputs)` after `import rbe_torch`, which registers the operators; it needs neither
transformers nor the model's Python code. Number of sequences and, for text, their length are free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import replace_file

_TOLERANCE = 1e-4  # of the largest output: the program against the model; torch.export may choose another attention kernel


def example_inputs(model: nn.Module, sequences: int, length: int) -> dict[str, Tensor]:
    """Inputs of that size for a transformers model that reads token ids or pictures. ValueError: it reads something else."""
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.linspace(-1, 1, sequences * config.num_channels * height * width).view(sequences, -1, height, width)}
    if name != "input_ids":
        raise ValueError(f"--to: pt2 takes models that read input_ids or pixel_values; {type(model).__name__} reads {name}")
    ids = torch.arange(sequences * length).view(sequences, length) % min(config.get_text_config().vocab_size, 1000)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@torch.no_grad()
def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """The model's forward pass, from keyword arguments to its output, as it is in eval mode and without a cache. RuntimeError: the program
    does not compute, at another size, what the model computes."""
    model.eval()
    configs = {id(module.config): module.config for module in model.modules() if getattr(getattr(module, "config", None), "use_cache", False)}
    for config in configs.values():
        config.use_cache = False  # a cache is an object that grows, no tensor
    try:
        inputs = example_inputs(model, 2, 12)
        free = {name: dict.fromkeys((0, 1) if name.endswith(("ids", "mask")) else (0,), torch.export.Dim.DYNAMIC) for name in inputs}
        program = torch.export.export(model, (), inputs, dynamic_shapes=free, strict=False)
        other = example_inputs(model, 3, 9)
        for ours, wanted in zip(_tensors(program.module()(**other)), _tensors(model(**other)), strict=True):
            error, size = float((ours - wanted).abs().max()), float(wanted.abs().max())
            if not error <= _TOLERANCE * size:
                raise RuntimeError(f"the exported program differs from the model by {error:.3g}, of outputs up to {size:.3g}")
    finally:
        for config in configs.values():
            config.use_cache = True
    return program


def write_program(program: torch.export.ExportedProgram, file: Path) -> None:
    """Writes FILE whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            torch.export.save(program, handle)

    replace_file(file, write)


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
