"""HiT's protocol on all 74,401 nouns, on one CPU core: what benchmarks/hbbert.py --full is for a GPU.

A training run on the mixed-hop pairs is judged in all four settings, as in the reduced run: the indirect pairs that were held out make
multi-hop, of which the run has seen fewer direct edges than HiT's. With --task multi it takes all direct edges, as HiT does for multi-hop,
and is judged in its two settings alone. A step takes pairs by families and wrong parents from the batch
(rbe_torch/hyperbolic/families.py), in epochs, half of the wrong parents siblings where the batch has them, and encodes each name once,
without padding; no dropout, products in bfloat16. Validation F1 on a part of the validation pairs is written while it trains; lambda and
threshold of the result are chosen on all of them. A run that was cut goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hbbert
import numpy as np
import torch
from harness import cpu_name, table
from hbbert_bench import SPACES, Bench
from hbbert_head import optimiser_with_head
from torch import nn

from rbe_torch.hyperbolic.families import FAMILY
from rbe_torch.hyperbolic.scoring import ALPHA, BETA, best_rule, features
from rbe_torch.hyperbolic.tasks import NEGATIVES, TASKS, negatives
from rbe_torch.hyperbolic.training import encode_all, train


class Watch:
    """Called after every step: each --every steps it appends validation F1 to `file`, on --watched indirect pairs and, where the task holds
    such out, as many direct ones."""

    def __init__(self, bench: Bench, model: nn.Module, file: Path) -> None:
        direct = set(bench.hierarchy.edges)
        held = bench.splits[bench.options.task].validation
        parts = {"indirect": [pair for pair in held if pair not in direct], "direct": [pair for pair in held if pair in direct]}
        self.parts = {name: random.Random(0).sample(pairs, min(bench.options.watched, len(pairs))) for name, pairs in parts.items() if pairs}
        kinds = [(name, kind) for name in self.parts for kind in NEGATIVES]
        self.wrong = {(name, kind): negatives(bench.hierarchy, self.parts[name], kind, seed=1) for name, kind in kinds}
        used = [np.array(pairs).ravel() for pairs in self.parts.values()] + [wrong.ravel() for wrong in self.wrong.values()]
        self.entities = torch.from_numpy(np.unique(np.concatenate(used)))
        self.bench, self.model, self.file = bench, model, file
        self.start, self.cpu = time.perf_counter(), time.process_time()
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        if step % self.bench.options.every:
            return
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.bench.options.bfloat16):
            some = encode_all(self.model, self.bench.names, entities=self.entities)
        points = torch.zeros(len(self.bench.names.lengths), some.shape[1])
        points[self.entities] = some
        entry: dict[str, Any] = {"step": step, "loss": float(np.mean(self.losses))}
        for (name, kind), wrong in self.wrong.items():
            entry[f"{name} {kind}"] = best_rule(*features(self.model.manifold, points, self.parts[name], wrong))[1]
        entry["c"] = float(torch.as_tensor(self.model.manifold.c).detach())
        entry |= {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.cpu}
        self.losses, self.start, self.cpu = [], time.perf_counter(), time.process_time()
        with self.file.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        print(json.dumps({key: round(value, 4) for key, value in entry.items()}), flush=True)


def without_dropout(model: nn.Module) -> nn.Module:
    """And with attention by two products: at dropout 0 torch's fused one takes half of a step on a CPU, in its backward pass."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if getattr(module, "config", None) is not None:
            module.config._attn_implementation = "eager"
    return model


def main() -> int:
    parser = hbbert.parser(__doc__)
    parser.add_argument("--space", choices=tuple(SPACES), default="ours")
    parser.add_argument("--task", choices=TASKS, default="mixed", help="whose direct pairs are trained on; multi: all; default mixed")
    parser.add_argument("--hard", type=float, default=0.5, help="share of siblings among the wrong parents; default 0.5")
    parser.add_argument("--family", type=int, default=FAMILY, help=f"children of a parent that come together; default {FAMILY}")
    parser.add_argument("--alpha", type=float, default=ALPHA, help=f"margin between parents and wrong ones; default HiT's {ALPHA:g}")
    parser.add_argument("--beta", type=float, default=BETA, help=f"margin between a parent's norm and its child's; default HiT's {BETA:g}")
    parser.add_argument("--every", type=int, default=100, help="steps between points of the validation curve; default 100")
    parser.add_argument("--watched", type=int, default=400, help="validation pairs of each kind that the curve is of; default 400")
    parser.add_argument("--start", type=Path, help="checkpoint of an earlier run of this script, whose weights this one begins with")
    parser.add_argument(
        "--start-share", type=float, default=0.0,
        help="judge a mean of weights, so much of --start's and the rest of the trained ones; given anew for a finished run it judges again",
    )  # fmt: skip
    parser.add_argument("--stop-at", type=int, help="leave after this step; the same command without it goes on")
    parser.add_argument("--judge", action="store_true", help="with --stop-at: the result of the run as far as it has come")
    parser.set_defaults(below=None, bfloat16=True, steps=1000, batch=512, wrong=10, lr=5e-4, device="cpu")
    options = parser.parse_args()
    if options.start_share and options.start is None:
        parser.error(f"--start-share: is {options.start_share:g} without --start, whose weights it is of")
    options.full = options.below is None
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"hbbert-whole-{options.space.replace(' ', '')}-{options.seed}"
    bench = Bench(options)
    model = without_dropout(bench.model(options.space))
    settings = replace(bench.settings, hard=options.hard, alpha=options.alpha, beta=options.beta, shared=True, family=options.family)
    if options.start is not None:
        start = torch.load(options.start, weights_only=True)["model"]
        model.load_state_dict(start)
        settings = replace(settings, seed=options.seed + 1)  # other epochs; the split is that of --seed
    curve = stem.with_suffix(".curve.jsonl")
    losses = train(
        model, bench.names, bench.hierarchy, bench.splits[options.task].train, settings, stem.with_suffix(".pt"),
        report=Watch(bench, model, curve), stop_at=options.stop_at, optimiser_for=optimiser_with_head,
    )  # fmt: skip
    if options.stop_at is not None and options.stop_at < options.steps and not options.judge:
        return 0
    if options.start_share:
        model.load_state_dict({key: value.lerp(start[key], options.start_share) for key, value in model.state_dict().items()})
    points = bench.points(model)
    torch.save(points, stem.with_suffix(".points.pt"))
    if options.task == "mixed":
        f1 = bench.f1_of_both_tasks(model, points)
    else:
        f1 = {f"multi {kind}": bench.f1(model, points, bench.splits["multi"], kind) for kind in NEGATIVES}
    c = float(torch.as_tensor(model.manifold.c).detach())
    depth = c**0.5 * points.norm(dim=1)
    steps = {entry["step"]: entry for entry in map(json.loads, curve.read_text().splitlines())}
    row = {
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "space": {"name": options.space, **asdict(SPACES[options.space])}, "task": options.task, "settings": asdict(settings),
        "steps": len(losses), "start": options.start and str(options.start), "start_share": options.start_share,
        "entities": len(bench.hierarchy.names), "trained_on": len(bench.splits[options.task].train),
        "test_pairs": {task: len(parts.test) for task, parts in bench.splits.items()},
        "curvature": c, "scale": float(model.log_scale.exp().detach()) if hasattr(model, "log_scale") else None,
        "depth_in_ball": {"mean": float(depth.mean()), "max": float(depth.max())},
        "cpu_seconds": sum(entry["cpu_seconds"] for entry in steps.values()),
        "seconds": sum(entry["seconds"] for entry in steps.values()),
        "f1": f1, "curve": list(steps.values()),
    }  # fmt: skip
    path = options.out / f"hbbert_whole_{options.space.replace(' ', '')}.json"
    path.write_text(json.dumps(row, indent=1) + "\n")
    rows = [{"row": "HiT, published", **{name: f"{hbbert.PUBLISHED[name]:.3f}" for name in f1}}]
    rows.append({"row": options.space, **{name: f"{found['test']:.3f}" for name, found in f1.items()}})
    print("\n" + table(rows, ("row", *f1)) + f"\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
