"""rbe_torch: linear layers whose weights stay compressed. Importing it registers torch.ops.rbe.*; it reads no file and warns of nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _ops as _ops  # registers the operators
from .compress import compress
from .layout import Layout
from .linear import RBELinear
from .rates import param_groups
from .replace import convert, decompress
from .report import Report
from .train import finish_training, prepare_training

if TYPE_CHECKING:
    from .checkpoint import load_pretrained, save_pretrained
    from .config import show_config
    from .distill import Distillation
    from .initial import keep_variance
    from .latent import latent_loss
    from .lowrank import add_lowrank
    from .reindex import Reindexer
    from .watch import TrainingDiverged, TrainingWatch

__version__ = "0.1.0"
__all__ = [
    "Distillation", "Layout", "RBELinear", "Reindexer", "Report", "TrainingDiverged", "TrainingWatch", "add_lowrank", "compress", "convert", "decompress",
    "finish_training", "keep_variance", "latent_loss", "load_pretrained", "param_groups", "prepare_training", "save_pretrained", "show_config",
]  # fmt: skip
_LATER = {  # their modules import other packages, or are for those who train
    "load_pretrained": "checkpoint", "save_pretrained": "checkpoint", "show_config": "config", "Distillation": "distill", "latent_loss": "latent",
    "add_lowrank": "lowrank", "keep_variance": "initial",
    "Reindexer": "reindex", "TrainingDiverged": "watch", "TrainingWatch": "watch",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LATER:
        value = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
        globals()[name] = value
        return value
    if name == "hyperbolic":  # a subpackage that needs the extra of its name
        return importlib.import_module(".hyperbolic", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER, "hyperbolic"})
