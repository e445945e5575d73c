"""What the Hb-BERT benchmarks share: spaces and layouts, the hierarchy, and a training run of one of them (benchmarks/hbbert.py says how).

All spaces are the Poincare ball, so that distances near the origin, and with them the loss's margins, are the same; d is the hidden size.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hbbert_head import LENGTH, Projected, optimiser_with_head, principal_axes
from torch import nn

import rbe_torch
from rbe_torch import models
from rbe_torch.hyperbolic import HbBertModel
from rbe_torch.hyperbolic.hierarchy import Hierarchy
from rbe_torch.hyperbolic.scoring import best_rule, f1_by, features
from rbe_torch.hyperbolic.tasks import NEGATIVES, TASKS, Pairs, Split, negatives, split
from rbe_torch.hyperbolic.training import Names, Options, encode_all, train
from rbe_torch.hyperbolic.wordnet import read_wordnet

MANIFOLD = "poincare"


@dataclass(frozen=True)
class Kind:
    """curvature: in units of 1 / d. dims: None, the encoder's output read as a point as it is; 0, by a head with a learned scale; n, by one
    with a learned projection to n dimensions (hbbert_head.py), whose vectors are `length` long at first. control: the flat space to hold it
    against."""

    curvature: float
    learnable: bool = False
    dims: int | None = None
    length: float = LENGTH
    mode: str = "output"
    control: str | None = None


SPACES = {
    "euclidean": Kind(0.0),
    "hit": Kind(1.0, control="euclidean"),
    "euclidean scaled": Kind(0.0, dims=0),
    "ours": Kind(4.0, learnable=True, dims=0, control="euclidean scaled"),
    "euclidean 8": Kind(0.0, dims=8, length=LENGTH / 4),
    "ours 8": Kind(16.0, learnable=True, dims=8, control="euclidean 8"),
    "inner": Kind(0.125, learnable=True, mode="inner", control="euclidean"),
}
LAYOUTS = {"dense": None, "2 bits": "rbe8x2_g8", "rbe22_g64": "rbe22_g64"}
CALIBRATION = (16, 64)  # batches, names a batch


class Bench:
    """Hierarchy, token ids and the pretrained encoder, of whose vocabulary only the rows that these names use are kept: no other row is
    ever read."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        whole = read_wordnet(options.wordnet)
        self.hierarchy: Hierarchy = whole if options.full else whole.below(find(whole, options.below))
        source = models.model_directory(options.model)
        self.names = Names(models.load_tokenizer(source), self.hierarchy.names)
        self.dense = models.load_dense(source)
        used = self.names.ids.unique()
        table = self.dense.embeddings.word_embeddings.weight.detach()[used].clone()
        self.dense.embeddings.word_embeddings = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
        self.dense.config.vocab_size = len(used)
        self.names.ids = torch.searchsorted(used, self.names.ids)
        self.splits = {task: split(self.hierarchy, task, seed=options.seed) for task in TASKS}
        full = options.full
        self.settings = Options(
            steps=options.steps or (2000 if full else 120),
            batch=options.batch or (256 if full else 16),
            wrong=options.wrong or (10 if full else 4),
            lr=options.lr,
            seed=options.seed,
            bfloat16=options.bfloat16,
        )

    def model(self, space: str) -> HbBertModel | Projected:
        torch.manual_seed(self.options.seed)
        kind = SPACES[space]
        if kind.dims is None:
            return HbBertModel.from_pretrained(self.dense, **arguments_of(space, self.dense)).to(self.options.device)
        encoder = HbBertModel.from_pretrained(self.dense, manifold=MANIFOLD, mode="output", curvature=0.0)
        start = principal_axes(self.means, kind.dims, kind.length) if kind.dims else None
        c = kind.curvature / self.dense.config.hidden_size
        return Projected(encoder, MANIFOLD, c, kind.learnable, start, kind.length).to(self.options.device)

    @cached_property
    def means(self) -> torch.Tensor:
        """What the pretrained encoder makes of the names, [entities, d]."""
        encoder = HbBertModel.from_pretrained(self.dense, manifold=MANIFOLD, mode="output", curvature=0.0)
        return encode_all(encoder.to(self.options.device), self.names).cpu()

    def run(
        self, space: str, layout: str | None, task: str, hard: float, checkpoint: Path
    ) -> tuple[nn.Module, list[float], float | None]:
        """One training run: the model, its losses, and the rate of its steps in codes.

        At 2 bits half of the steps are dense and half in codes, layouts that cannot hold a trained weight take all of them in codes. Of
        several --code-lr the steps in codes are made with each from the same codes, and the model that validates best is kept.
        """
        settings = replace(self.settings, hard=hard)
        pairs = self.splits[task].train
        model, losses = self.model(space), []
        dense_steps = settings.steps if layout is None else settings.steps // 2 if layout == LAYOUTS["2 bits"] else 0
        if dense_steps:
            first = replace(settings, steps=dense_steps)
            losses = self.train(model, pairs, first, checkpoint.with_suffix(".dense.pt"))
        if layout is None:
            return model, losses, None
        inputs = self.names.batches(*CALIBRATION, self.options.seed, self.options.device) if layout == LAYOUTS["2 bits"] else None
        start, tried = to_codes(model, layout, inputs), []
        for rate in self.options.code_lr:
            coded = copy.deepcopy(start) if len(self.options.code_lr) > 1 else start
            rest = replace(settings, steps=settings.steps - dense_steps, seed=settings.seed + 1, lr=rate)
            torch.manual_seed(rest.seed)
            more = self.train(coded, pairs, rest, checkpoint.with_suffix(f".codes-{rate:g}.pt"))
            rbe_torch.finish_training(coded)
            valid = 0.0
            if len(self.options.code_lr) > 1:
                points = self.points(coded)
                valid = float(np.mean([self.f1(coded, points, self.splits[task], kind)["validation"] for kind in NEGATIVES]))
                print(f"{space}, {layout}, seed {self.options.seed}: at --code-lr {rate:g} validation F1 is {valid:.4f}", flush=True)
            tried.append((valid, coded, losses + more, rate))
        return max(tried, key=lambda entry: entry[0])[1:]

    def train(self, model: nn.Module, pairs: Pairs, settings: Options, checkpoint: Path | None = None) -> list[float]:
        """Prints after 20 steps what the run will take."""
        pace = Pace(settings.steps)
        return train(model, self.names, self.hierarchy, pairs, settings, checkpoint, report=pace, optimiser_for=optimiser_with_head)

    def points(self, model: nn.Module) -> torch.Tensor:
        return encode_all(model, self.names)

    def f1(self, model: nn.Module, points: torch.Tensor, parts: Split, kind: str) -> dict[str, float]:
        """lambda and threshold chosen on the validation pairs."""
        judged = [
            features(model.manifold, points, pairs, negatives(self.hierarchy, pairs, kind, seed=number))
            for number, pairs in enumerate((parts.validation, parts.test), 1)
        ]
        rule, validation = best_rule(*judged[0])
        return {"validation": validation, "test": f1_by(rule, *judged[1]), "lambda": rule.weight}

    def f1_of_both_tasks(self, model: nn.Module, points: torch.Tensor) -> dict[str, dict[str, float]]:
        """A model that was trained on the mixed-hop pairs, judged by all that were held out and by the indirect ones of them alone."""
        mixed = self.splits["mixed"]
        direct = set(self.hierarchy.edges)

        def indirect(pairs: Pairs) -> Pairs:
            return [pair for pair in pairs if pair not in direct]

        parts = {"multi": Split(mixed.train, indirect(mixed.validation), indirect(mixed.test)), "mixed": mixed}
        return {f"{task} {kind}": self.f1(model, points, parts[task], kind) for task in TASKS for kind in NEGATIVES}


class Pace:
    """Called after each step of a run: prints once, from the mean of PACED steps after the first WARM ones, how long it will take."""

    WARM, PACED = 5, 15

    def __init__(self, steps: int) -> None:
        self.steps, self.times = steps, []

    def __call__(self, step: int, loss: float) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == self.WARM + self.PACED:
            each = (self.times[-1] - self.times[self.WARM - 1]) / self.PACED
            rest = each * (self.steps - step) / 60
            print(f"step {step} of {self.steps}: {each:.3f} s a step, {rest:.1f} minutes to the end of this run", flush=True)


def arguments_of(space: str, bert: nn.Module) -> dict[str, Any]:
    """What HbBertModel.from_pretrained takes for a row without a head."""
    kind = SPACES[space]
    c = kind.curvature / bert.config.hidden_size
    return {"manifold": MANIFOLD, "mode": kind.mode, "curvature": c, "learnable_curvature": kind.learnable}


def find(hierarchy: Hierarchy, word: str) -> int:
    """The entity of that name with the most descendants. SystemExit: there is none."""
    named = [i for i, name in enumerate(hierarchy.names) if name == word]
    if not named:
        raise SystemExit(f"--below: WordNet has no noun {word!r}")
    return max(named, key=lambda i: sum(i in above for above in hierarchy.ancestors))


def to_codes(model: nn.Module, layout: str, calibration: list[dict[str, torch.Tensor]] | None) -> nn.Module:
    """Compressed, in training form."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rbe22_g64 holds nothing of a trained weight: the row shows it
        rbe_torch.compress(model.encoder if isinstance(model, Projected) else model, layout, calibration=calibration, progress=False)
    return rbe_torch.prepare_training(model)
