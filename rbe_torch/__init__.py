"""rbe_torch: linear layers whose weights stay compressed. Importing it registers torch.ops.rbe.*; everything else loads when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _ops as _ops  # registers the operators

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import load_pretrained as load_pretrained
    from .checkpoint import save_pretrained as save_pretrained
    from .compress import compress as compress
    from .config import show_config as show_config
    from .layout import Layout as Layout
    from .linear import RBELinear as RBELinear
    from .replace import convert as convert
    from .replace import decompress as decompress
    from .report import Report as Report
    from .train import finish_training as finish_training
    from .train import param_groups as param_groups
    from .train import prepare_training as prepare_training

__all__ = ["Layout", "RBELinear", "Report", "compress", "convert", "decompress", "finish_training", "load_pretrained", "param_groups", "prepare_training",
           "save_pretrained", "show_config"]  # fmt: skip
_HOME = {
    "Layout": "layout", "RBELinear": "linear", "Report": "report", "compress": "compress", "convert": "replace", "decompress": "replace",
    "finish_training": "train", "load_pretrained": "checkpoint", "param_groups": "train", "prepare_training": "train", "save_pretrained": "checkpoint",
    "show_config": "config",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
