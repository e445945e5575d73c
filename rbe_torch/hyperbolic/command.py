"""`rbe train-hbbert`: trains Hb-BERT on (child, parent) pairs of a user's own and saves the model, its tokenizer and the rule that accepts
a pair. stages.py trains."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..commands.target import check_directory
from ..models import copy_companions, load_tokenizer, model_directory
from .hierarchy import read_hierarchy
from .scoring import best_rule, f1_by, features
from .stages import UNFINISHED, train_in_stages
from .tasks import NEGATIVES, negatives, split
from .training import Names, encode_all

RULE_FILE = "hierarchy.json"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what it prints: sizes, losses, and F1 on the held-out pairs against random and hard negatives."""
    import torch

    out = Path(options.out)
    if out.is_dir() and any(out.iterdir()) and not options.force and not (out / UNFINISHED).is_dir():
        raise ValueError(f"--out: {out} is not empty and holds no interrupted run ({UNFINISHED}/); --force writes into it")
    check_directory(out, force=True, option="--out")
    hierarchy = read_hierarchy(options.data)
    parts = split(hierarchy, options.task, seed=options.seed)
    source = model_directory(options.model)
    names = Names(load_tokenizer(source), hierarchy.names)
    model, losses = train_in_stages(options, source, names, hierarchy, parts.train)
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
    shutil.rmtree(out / UNFINISHED)
    return facts
