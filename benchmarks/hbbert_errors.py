"""Which test pairs a run of benchmarks/hbbert_whole.py gets wrong: right ones missed, by the edges between child and parent and by whether
the child's own edge was trained on; wrong parents accepted, by whether they are siblings of the child and have children themselves.

    python benchmarks/hbbert_errors.py --space hit --out out/hit       the run's own OUT
"""

from __future__ import annotations

import json
import sys
from typing import Any

import hbbert
import numpy as np
import torch
from harness import table
from hbbert_bench import MANIFOLD, SPACES, Bench

from rbe_torch.hyperbolic.families import FAMILY, Families
from rbe_torch.hyperbolic.hierarchy import Hierarchy
from rbe_torch.hyperbolic.layers import Space, manifold_of
from rbe_torch.hyperbolic.scoring import best_rule, f1_by, features, score
from rbe_torch.hyperbolic.tasks import NEGATIVES, negatives

HOPS = (("1 edge", 1, 1), ("2 edges", 2, 2), ("3 edges", 3, 3), ("4 or 5 edges", 4, 5), ("6 edges or more", 6, 99))


def hops(hierarchy: Hierarchy, child: int, parent: int) -> int:
    """Edges of the shortest way up from `child` to its ancestor `parent`."""
    level, count = {child}, 0
    while parent not in level:
        level, count = {above for entity in level for above in hierarchy.parents[entity]}, count + 1
    return count


def siblings(hierarchy: Hierarchy, child: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """bool [pairs, wrong]: whether it has a parent of the child's."""
    return np.array([[not set(hierarchy.parents[w]).isdisjoint(hierarchy.parents[c]) for w in row] for c, row in zip(child, wrong, strict=True)])


def trained_on_siblings(bench: Bench, family: int, batches: int = 10) -> float:
    """The share of siblings among a pair's ten wrong parents in training with --hard 1."""
    pairs = bench.splits["mixed"].train
    families = Families(bench.hierarchy, pairs, min(bench.settings.batch, len(pairs)), 1, family)
    triples = np.concatenate([entities[place] for entities, place in (families.batch(step, bench.settings.wrong, 0) for step in range(batches))])
    return float(siblings(bench.hierarchy, triples[:, 0], triples[:, 2:]).mean())


def means(groups: dict[str, np.ndarray], **facts: np.ndarray) -> list[dict[str, Any]]:
    """Of each group that has pairs: how many, and the means of the facts over them."""
    return [
        {"pairs": title, "count": int(chosen.sum()), **{name: float(values[chosen].mean()) for name, values in facts.items()}}
        for title, chosen in groups.items() if chosen.any()
    ]  # fmt: skip


def errors(bench: Bench, space: Space, points: torch.Tensor, kind: str) -> dict[str, Any]:
    hierarchy, parts = bench.hierarchy, bench.splits["mixed"]
    rule, _ = best_rule(*features(space, points, parts.validation, negatives(hierarchy, parts.validation, kind, seed=1)))
    wrong = negatives(hierarchy, parts.test, kind, seed=2)
    labels, distance, difference = features(space, points, parts.test, wrong)
    facts = {"accepted": score(distance, difference, rule.weight) > rule.threshold, "distance": distance, "norm difference": difference}
    child = np.array([pair[0] for pair in parts.test])
    trained = np.isin(child, [pair[0] for pair in parts.train])
    way = np.array([hops(hierarchy, *pair) for pair in parts.test])
    sibling = siblings(hierarchy, child, wrong).ravel()
    inner = np.array([bool(found) for found in hierarchy.children])[wrong.ravel()]
    right = {f"right, {title} up": (low <= way) & (way <= high) for title, low, high in HOPS}
    other = {
        f"wrong, {whose} {what} children": near & which
        for whose, near in (("siblings", sibling), ("others", ~sibling)) for what, which in (("with", inner), ("without", ~inner))
    }  # fmt: skip
    rows = means(right, **{name: values[labels] for name, values in facts.items()})
    rows += means(other, **{name: values[~labels] for name, values in facts.items()})
    both = np.concatenate([trained, trained.repeat(wrong.shape[1])])
    by_edge = {
        name: f1_by(rule, *(part[chosen] for part in (labels, distance, difference)))
        for name, chosen in (("child's edge trained", both), ("child's edge held out", ~both))
    }
    return {"lambda": rule.weight, "threshold": rule.threshold, "rows": rows, "f1": by_edge}


def main() -> int:
    parser = hbbert.parser(__doc__)
    parser.add_argument("--space", choices=tuple(SPACES), default="hit")
    parser.set_defaults(below=None, device="cpu", batch=512, wrong=10)
    options = parser.parse_args()
    options.full = options.below is None
    torch.set_num_threads(options.threads)
    name = options.space.replace(" ", "")
    curvature = json.loads((options.out / f"hbbert_whole_{name}.json").read_text())["curvature"]
    points = torch.load(options.out / f"hbbert-whole-{name}-{options.seed}.points.pt", weights_only=True)
    bench, space = Bench(options), manifold_of(MANIFOLD, curvature)
    found = {kind: errors(bench, space, points, kind) for kind in NEGATIVES}
    columns = ("pairs", "count", "accepted", "distance", "norm difference")
    for kind, facts in found.items():
        lines = [{key: value if isinstance(value, str | int) else f"{value:.3f}" for key, value in row.items()} for row in facts["rows"]]
        print(f"\nmixed {kind}, lambda {facts['lambda']:g}, F1 " + ", ".join(f"{name} {value:.3f}" for name, value in facts["f1"].items()))
        print(table(lines, columns))
    shares = {family: trained_on_siblings(bench, family) for family in (FAMILY // 2, FAMILY)}
    print("\nsiblings among wrong parents in training: " + ", ".join(f"{share:.3f} in families of {family}" for family, share in shares.items()))
    path = options.out / f"hbbert_errors_{name}.json"
    path.write_text(json.dumps({**found, "siblings_in_training": shares}, indent=1) + "\n")
    print(f"\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
