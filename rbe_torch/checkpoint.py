"""save_pretrained and load_pretrained: a directory with model.safetensors and config.json, written so that a kill leaves a whole one.

model.safetensors is a checkpoint by itself: its header has the manifest (rbe_torch/manifest.py) and with it the model's own configuration. It is written to a
temporary name in the same directory, synced and renamed, and that rename is the moment at which the old checkpoint becomes the new one. config.json
repeats the configuration where transformers looks for it; it is written after, and where a kill left an old one behind the header counts.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
from torch import nn

from .pack import pack_model
from .reader import CONFIG_FILE, WEIGHTS_FILE, Checkpoint

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "Checkpoint", "load_pretrained", "save_pretrained"]

GENERATION_FILE = "generation_config.json"


def save_pretrained(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes `model`, whose linear layers were compressed, to `directory`, which is made if it is missing.

    For a transformers model config.json is its own configuration, so that from_pretrained finds the model (after `import rbe_torch.hf`).
    ValueError: no RBELinear in the model, a layer in training form, or tensors without values.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} is a file, must be a directory or not exist")
    tensors, manifest = pack_model(model)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", **manifest.to_header()}
    replace_file(directory / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(tensors, path, metadata))
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        replace_file(directory / GENERATION_FILE, _text(generation.to_json_string()))
    config = {**(manifest.model_config or {}), "quantization_config": manifest.quantization_config()}
    replace_file(directory / CONFIG_FILE, _text(json.dumps(config, indent=2, sort_keys=True) + "\n"))


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: Path(path).write_text(text, encoding="utf-8")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a temporary file beside `path`, syncs it and renames it over `path`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_pretrained(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model saved at `path`, bit-exact, without the original weights.

    model: an instance of the architecture (its weights do not matter and may be on the meta device); it is changed in place and returned. Not needed for
    transformers models, which are built from their configuration. ValueError: a checkpoint that is damaged or does not fit the model.
    """
    checkpoint = Checkpoint(path)
    if model is None:
        if checkpoint.manifest.model_config is None:
            raise ValueError(f"model: is None, but {checkpoint.file} holds a {checkpoint.manifest.model_class} and no transformers "
                             "configuration; pass an instance of that class")
        from .hf import load_transformers

        return load_transformers(checkpoint)
    from .skeleton import fill_model

    with checkpoint.naming():
        return fill_model(model, checkpoint)
