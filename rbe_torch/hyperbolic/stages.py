"""The training run of `rbe train-hbbert`, in stages that each leave what they made in OUT/unfinished/:

    dense         steps with dense weights                      dense.pt, written every minute
    compression   the linear layers to the layout               compressed/, a model, written when it is whole
    codes         steps in codes                                codes.pt, written every minute

Without a layout the dense stage is all of it. A run that was killed goes on where it stopped when the same command is given again: a kill
costs at most a minute of steps, or the compression that was under way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import rbe_torch

from ..checkpoint import replace_file
from ..models import load_any
from ..progress import Progress
from .hierarchy import Hierarchy
from .model import HbBertModel
from .tasks import Pairs
from .training import Names, Options, train

UNFINISHED = "unfinished"
RATE, CODE_RATE = 1e-4, 5e-4  # benchmarks/hbbert.py: in codes far less is trained, and it takes larger steps
_SETTINGS = ("manifold", "mode", "curvature", "learn_curvature", "task", "steps", "dense_steps", "batch", "shared", "bfloat16", "lr", "seed", "model")


def train_in_stages(
    options: argparse.Namespace, source: Path, names: Names, hierarchy: Hierarchy, pairs: Pairs
) -> tuple[HbBertModel, list[float]]:
    """The trained model, in the form that saves, and the losses of all steps. options: those of the command. source: the BERT's directory.

    ValueError: OUT/unfinished/ is of a run with other settings, more dense steps than steps, or a layout for a model that is in codes.
    """
    if options.dense_steps is not None and (options.layout is None or options.dense_steps > options.steps):
        reason = "needs --layout" if options.layout is None else f"must be at most --steps {options.steps}"
        raise ValueError(f"--dense-steps: is {options.dense_steps}, {reason}")
    folder = Path(options.out) / UNFINISHED
    torch.manual_seed(options.seed)
    if (folder / "compressed").is_dir():
        model, losses = HbBertModel.from_pretrained(folder / "compressed"), json.loads((folder / "dense.json").read_text())
    else:
        model, losses = _opened(options, source), []
        if _coded(model) and options.layout is not None:
            raise ValueError(f"--layout: is {options.layout}, but the linear layers of {options.model} are in codes already")
    _same_run(folder / "run.json", options, len(hierarchy.names), len(pairs))

    def learn(steps: int, seed: int, file: str) -> list[float]:
        rate = options.lr or (CODE_RATE if _coded(model) else RATE)
        settings = Options(steps=steps, batch=options.batch, lr=rate, seed=seed, bfloat16=options.bfloat16, shared=options.shared)
        with Progress("train in codes" if _coded(model) else "train", steps, not options.quiet) as bar:
            return train(model, names, hierarchy, pairs, settings, folder / file, report=lambda step, loss: bar.step(1, f"loss {loss:.3f}"))

    if options.layout is not None and not _coded(model):
        held = not rbe_torch.Layout.parse(options.layout).has_amplitude  # others hold little of a trained weight however they are fitted
        steps = options.dense_steps if options.dense_steps is not None else options.steps // 2 if held else 0
        losses = learn(steps, options.seed, "dense.pt") if steps else []
        inputs = names.batches(seed=options.seed) if held else None
        rbe_torch.compress(model, options.layout, calibration=inputs, progress=not options.quiet)
        _keep(model, losses, folder)
    codes = _coded(model)
    if codes:
        rbe_torch.prepare_training(model)
        torch.manual_seed(options.seed + 1)  # dropout of this stage, whichever process it begins in
    rest = options.steps - len(losses)
    if rest:
        losses = losses + learn(rest, options.seed + bool(losses), "codes.pt" if codes else "dense.pt")
    if codes:
        rbe_torch.finish_training(model)
    return model.eval(), losses


def _opened(options: argparse.Namespace, source: Path) -> HbBertModel:
    given = {"manifold": options.manifold, "curvature": options.curvature, "mode": options.mode}
    return HbBertModel.from_pretrained(load_any(source), **given, learnable_curvature=options.learn_curvature)


def _coded(model: HbBertModel) -> bool:
    return any(isinstance(module, rbe_torch.RBELinear) for module in model.modules())


def _same_run(file: Path, options: argparse.Namespace, entities: int, pairs: int) -> None:
    """Writes what the run depends on, or compares it with what is there."""
    settings: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS}
    settings |= {"layout": None if options.layout is None else str(options.layout), "entities": entities, "pairs": pairs}
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda path: Path(path).write_text(json.dumps(settings), encoding="utf-8"))
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    both = {name: (there.get(name), value) for name, value in settings.items()}
    differing = ", ".join(f"{name} {old!r} there, {new!r} here" for name, (old, new) in both.items() if old != new)
    if differing:
        raise ValueError(f"OUT: {file.parent} is of an interrupted run with other settings ({differing}); delete it to start again")


def _keep(model: HbBertModel, losses: list[float], folder: Path) -> None:
    """The compressed model under its name only when it is whole."""
    replace_file(folder / "dense.json", lambda path: Path(path).write_text(json.dumps(losses), encoding="utf-8"))
    partial = folder / "compressed.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    os.replace(partial, folder / "compressed")
