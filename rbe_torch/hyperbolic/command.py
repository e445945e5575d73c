"""`rbe train-hbbert`: trains Hb-BERT on (child, parent) pairs of a user's own and saves the model, its tokenizer and the rule that accepts
a pair."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..commands.target import check_directory
from ..models import copy_companions, load_any, load_tokenizer, model_directory
from ..progress import Progress
from .hierarchy import read_hierarchy
from .model import HbBertModel
from .scoring import best_rule, f1_by, features
from .tasks import NEGATIVES, negatives, split
from .training import Names, Options, encode_all, train

RULE_FILE = "hierarchy.json"
CHECKPOINT = "training.pt"
RATE, CODE_RATE = 1e-4, 5e-4  # benchmarks/hbbert.py: in codes far less is trained, and it takes larger steps


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what it prints: sizes, losses, and F1 on the held-out pairs against random and hard negatives."""
    import torch

    import rbe_torch

    out = Path(options.out)
    checkpoint = out / CHECKPOINT
    if out.is_dir() and any(out.iterdir()) and not options.force and not checkpoint.is_file():
        raise ValueError(f"--out: {out} is not empty and holds no interrupted run ({CHECKPOINT}); --force writes into it")
    check_directory(out, force=True, option="--out")
    hierarchy = read_hierarchy(options.data)
    parts = split(hierarchy, options.task, seed=options.seed)
    source = model_directory(options.model)
    tokenizer = load_tokenizer(source)
    names = Names(tokenizer, hierarchy.names)
    torch.manual_seed(options.seed)
    dense = load_any(source)
    if options.layout is not None:
        held = rbe_torch.Layout.parse(options.layout).has_amplitude  # such codes hold little of a trained weight however they are fitted
        inputs = None if held else names.batches(seed=options.seed)
        rbe_torch.compress(dense, options.layout, calibration=inputs, progress=not options.quiet)
    model = HbBertModel.from_pretrained(
        dense, manifold=options.manifold, curvature=options.curvature, mode=options.mode, learnable_curvature=options.learn_curvature
    )
    coded = any(isinstance(module, rbe_torch.RBELinear) for module in model.modules())
    if coded:
        rbe_torch.prepare_training(model)
    settings = Options(steps=options.steps, batch=options.batch, lr=options.lr or (CODE_RATE if coded else RATE), seed=options.seed)
    with Progress("train", settings.steps, not options.quiet) as bar:
        losses = train(
            model, names, hierarchy, parts.train, settings, checkpoint, report=lambda step, loss: bar.step(1, f"loss {loss:.3f}")
        )
    if coded:
        rbe_torch.finish_training(model)
    points = encode_all(model, names)
    held_out, rules = {}, {}
    for kind in NEGATIVES:
        judged = [
            features(model.manifold, points, pairs, negatives(hierarchy, pairs, kind, seed=options.seed + number))
            for number, pairs in enumerate((parts.validation, parts.test), 1)
        ]
        rule, validation = best_rule(*judged[0])
        held_out[kind] = {"validation_f1": validation, "test_f1": f1_by(rule, *judged[1])}
        rules[kind] = {"lambda": rule.weight, "threshold": rule.threshold}
    model.save_pretrained(out)
    copy_companions(source, out)
    facts = {
        "out": str(out), "entities": len(hierarchy.names), "direct_pairs": len(hierarchy.edges), "indirect_pairs": len(hierarchy.indirect),
        "task": options.task, "trained_on": len(parts.train), "tested_on": len(parts.test), "manifold": options.manifold,
        "mode": options.mode, "curvature": float(torch.as_tensor(model.manifold.c).detach()), "layout": options.layout,
        "steps": len(losses),
        "first_loss": sum(losses[:10]) / len(losses[:10]), "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "f1": held_out, "rules": rules,
    }  # fmt: skip
    (out / RULE_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return facts
