"""rbe_torch: linear layers whose weights stay compressed. Importing it registers torch.ops.rbe.*; everything else loads when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

from . import _ops as _ops  # registers the operators

__version__ = "0.1.0"

_HOME = {
    "Layout": "layout",
    "RBELinear": "linear",
    "Report": "report",
    "convert": "replace",
    "decompress": "replace",
    "compress": "compress",
    "prepare_training": "train",
    "finish_training": "train",
    "param_groups": "train",
    "save_pretrained": "checkpoint",
    "load_pretrained": "checkpoint",
    "show_config": "config",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
