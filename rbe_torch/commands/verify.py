"""`rbe verify`: reads a whole checkpoint and checks every hash and every value."""

from __future__ import annotations

import argparse

from .tables import print_json


def run(options: argparse.Namespace) -> None:
    from ..checkpoint import Checkpoint
    from ..progress import Progress

    checkpoint = Checkpoint(options.path)
    others = checkpoint.other_names()
    with Progress("verify", len(checkpoint.layers) + len(others), not options.quiet) as bar:
        for name in checkpoint.layers:
            checkpoint.layer(name)
            bar.step(1, name)
        for name in others:
            checkpoint.tensor(name)
            bar.step(1, name)
    facts = {"file": str(checkpoint.file), "ok": True, "layers": len(checkpoint.layers), "tensors": len(checkpoint.shapes), "id": checkpoint.manifest.id}
    if options.json:
        print_json(facts)
    else:
        print(f"{checkpoint.file}: whole. {facts['layers']} compressed layers and {facts['tensors']} tensors, every hash and every value checked")
