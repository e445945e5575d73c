"""What the Hb-BERT benchmarks share: spaces and layouts, the hierarchy, and a training run of one of them (benchmarks/hbbert.py says how).

All spaces are the Poincare ball, so that distances near the origin, and with them the loss's margins, are the same; d is the hidden size.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import rbe_torch
from rbe_torch import models
from rbe_torch.hyperbolic import HbBertModel
from rbe_torch.hyperbolic.hierarchy import Hierarchy
from rbe_torch.hyperbolic.scoring import best_rule, f1_by, features
from rbe_torch.hyperbolic.tasks import NEGATIVES, TASKS, Pairs, Split, negatives, split
from rbe_torch.hyperbolic.training import Names, Options, encode_all, train
from rbe_torch.hyperbolic.wordnet import read_wordnet

# What HbBertModel.from_pretrained takes, curvatures in units of 1 / d; and the factor on the pretrained embeddings before training, which
# says how deep in the ball they start.
SPACES: dict[str, dict[str, Any]] = {
    "euclidean": {"manifold": "poincare", "mode": "output", "curvature": 0.0},
    "euclidean halved": {"manifold": "poincare", "mode": "output", "curvature": 0.0},
    "hit": {"manifold": "poincare", "mode": "output"},
    "ours": {"manifold": "poincare", "mode": "output", "curvature": 4.0},
    "inner": {"manifold": "poincare", "mode": "inner", "curvature": 0.125, "learnable_curvature": True},
}
SCALE = {"euclidean": 1.0, "euclidean halved": 0.5, "hit": 1.0, "ours": 0.5, "inner": 1.0}
CONTROL = {"hit": "euclidean", "ours": "euclidean halved", "inner": "euclidean"}  # differs in curvature alone
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
        table = self.dense.embeddings.word_embeddings
        self.dense.embeddings.word_embeddings = nn.Embedding.from_pretrained(table.weight.detach()[used].clone(), freeze=False, padding_idx=0)
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

    def model(self, space: str) -> HbBertModel:
        torch.manual_seed(self.options.seed)
        return HbBertModel.from_pretrained(scaled(self.dense, SCALE[space]), **arguments_of(space, self.dense)).to(self.options.device)

    def run(self, space: str, layout: str | None, task: str, hard: float, checkpoint: Path) -> tuple[HbBertModel, list[float], float | None]:
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
            losses = train(model, self.names, self.hierarchy, pairs, first, checkpoint.with_suffix(".dense.pt"))
        if layout is None:
            return model, losses, None
        inputs = self.names.batches(*CALIBRATION, self.options.seed, self.options.device) if layout == LAYOUTS["2 bits"] else None
        start, tried = to_codes(model, layout, inputs), []
        for rate in self.options.code_lr:
            coded = copy.deepcopy(start) if len(self.options.code_lr) > 1 else start
            rest = replace(settings, steps=settings.steps - dense_steps, seed=settings.seed + 1, lr=rate)
            torch.manual_seed(rest.seed)
            more = train(coded, self.names, self.hierarchy, pairs, rest, checkpoint.with_suffix(f".codes-{rate:g}.pt"))
            rbe_torch.finish_training(coded)
            valid = 0.0
            if len(self.options.code_lr) > 1:
                points = self.points(coded)
                valid = float(np.mean([self.f1(coded, points, self.splits[task], kind)["validation"] for kind in NEGATIVES]))
                print(f"{space}, {layout}, seed {self.options.seed}: at --code-lr {rate:g} validation F1 is {valid:.4f}", flush=True)
            tried.append((valid, coded, losses + more, rate))
        return max(tried, key=lambda entry: entry[0])[1:]

    def points(self, model: HbBertModel) -> torch.Tensor:
        return encode_all(model, self.names)

    def f1(self, model: HbBertModel, points: torch.Tensor, parts: Split, kind: str) -> dict[str, float]:
        """lambda and threshold chosen on the validation pairs."""
        judged = [
            features(model.manifold, points, pairs, negatives(self.hierarchy, pairs, kind, seed=number))
            for number, pairs in enumerate((parts.validation, parts.test), 1)
        ]
        rule, validation = best_rule(*judged[0])
        return {"validation": validation, "test": f1_by(rule, *judged[1]), "lambda": rule.weight}

    def f1_of_both_tasks(self, model: HbBertModel, points: torch.Tensor) -> dict[str, dict[str, float]]:
        """A model that was trained on the mixed-hop pairs, judged by all that were held out and by the indirect ones of them alone."""
        mixed = self.splits["mixed"]
        direct = set(self.hierarchy.edges)

        def indirect(pairs: Pairs) -> Pairs:
            return [pair for pair in pairs if pair not in direct]

        parts = {"multi": Split(mixed.train, indirect(mixed.validation), indirect(mixed.test)), "mixed": mixed}
        return {f"{task} {kind}": self.f1(model, points, parts[task], kind) for task in TASKS for kind in NEGATIVES}


def arguments_of(space: str, bert: nn.Module) -> dict[str, Any]:
    """What HbBertModel.from_pretrained takes for a row."""
    given = dict(SPACES[space])
    if "curvature" in given:
        given["curvature"] /= bert.config.hidden_size
    return given


def scaled(bert: nn.Module, factor: float) -> nn.Module:
    """A copy whose last hidden states, and with them their mean, are `factor` times those of `bert`: the last LayerNorm takes it."""
    bert = copy.deepcopy(bert)
    norm = bert.encoder.layer[-1].output.LayerNorm
    with torch.no_grad():
        norm.weight *= factor
        norm.bias *= factor
    return bert


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
        rbe_torch.compress(model, layout, calibration=calibration, progress=False)
    return rbe_torch.prepare_training(model)
