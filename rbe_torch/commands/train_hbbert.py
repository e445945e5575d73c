"""`rbe train-hbbert`: trains a hyperbolic BERT and prints how well it tells parents."""

from __future__ import annotations

import argparse

from .tables import print_json, print_table


def run(options: argparse.Namespace) -> None:
    from ..hyperbolic.command import run

    facts = run(options)
    if options.json:
        print_json(facts)
        return
    print_table(("wrong parents", "validation F1", "test F1"),
                 [(kind, f"{row['validation_f1']:.3f}", f"{row['test_f1']:.3f}") for kind, row in facts["f1"].items()])
    print(f"{facts['entities']} entities, trained on {facts['trained_on']} direct pairs for {facts['steps']} steps, tested on {facts['tested_on']} held-out pairs "
          f"with 10 wrong parents each; loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}, curvature -{facts['curvature']:.4g}")
    print(f"{facts['out']}: model, tokenizer and the rule that accepts a pair (hierarchy.json)")
