"""What a model of a hierarchy is trained and judged on: HiT's two tasks (He et al. 2024, arXiv 2401.11374, section 4).

    multi-hop   trained on all direct edges; 5 % of the indirect ones validate, 5 % test
    mixed-hop   trained on 90 % of the direct edges; 5 % of them and 5 % of the indirect ones validate, as many test

Each (child, parent) comes with `count` wrong parents: random entities, or "hard" ones, siblings of the child filled up with random ones.
None is the child or one of its ancestors.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from .hierarchy import Hierarchy

TASKS = ("multi", "mixed")
NEGATIVES = ("random", "hard")
_TRIES = 100

Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class Split:
    """Positive (child, parent) pairs."""

    train: Pairs
    validation: Pairs
    test: Pairs


def split(hierarchy: Hierarchy, task: str = "multi", share: float = 0.05, seed: int = 0) -> Split:
    """share: of the pairs that validate, and again of those that test. ValueError: too few pairs for a part to hold one, or an unknown
    task."""
    if task not in TASKS:
        raise ValueError(f"task: is {task!r}, must be one of {', '.join(TASKS)}")
    generator = random.Random(seed)
    parts = [_held_out(hierarchy.indirect, share, generator)]
    if task == "mixed":
        parts.append(_held_out(hierarchy.edges, share, generator))
        train = parts[1][0]
    else:
        train = hierarchy.edges
    validation, test = (sum((part[i] for part in parts), []) for i in (1, 2))
    if not validation or not test or not train:
        raise ValueError(
            f"data: has {len(hierarchy.edges)} direct and {len(hierarchy.indirect)} indirect pairs, too few to hold "
            f"{100 * share:g} % of the indirect ones out twice; an indirect pair is an entity and a parent of its parent"
        )
    return Split(train, validation, test)


def _held_out(pairs: Pairs, share: float, generator: random.Random) -> tuple[Pairs, Pairs, Pairs]:
    shuffled = list(pairs)
    generator.shuffle(shuffled)
    count = round(share * len(shuffled))
    return shuffled[2 * count :], shuffled[:count], shuffled[count : 2 * count]


def negatives(hierarchy: Hierarchy, pairs: Pairs, kind: str = "random", count: int = 10, seed: int = 0) -> np.ndarray:
    """int64 [len(pairs), count]: wrong parents for the child of each pair. Distinct where the hierarchy has enough entities.

    ValueError: an unknown kind, or an entity above which, with itself, lies the whole hierarchy.
    """
    if kind not in NEGATIVES:
        raise ValueError(f"negatives: is {kind!r}, must be one of {', '.join(NEGATIVES)}")
    generator = random.Random(seed)
    result = np.empty((len(pairs), count), dtype=np.int64)
    total = len(hierarchy.names)
    for row, (child, _) in enumerate(pairs):
        above = hierarchy.ancestors[child]
        if len(above) + 1 >= total:
            raise ValueError(f"data: all other entities are ancestors of {hierarchy.names[child]!r}; it has no wrong parent")
        chosen: dict[int, None] = {}
        if kind == "hard":
            siblings = sorted({sibling for parent in hierarchy.parents[child] for sibling in hierarchy.children[parent]} - above - {child})
            chosen = dict.fromkeys(generator.sample(siblings, min(count, len(siblings))))
        tries = 0
        while len(chosen) < count and tries < _TRIES * count:
            tries += 1
            entity = generator.randrange(total)
            if entity != child and entity not in above:
                chosen[entity] = None
        drawn = list(chosen) or [next(entity for entity in range(total) if entity != child and entity not in above)]
        result[row] = [drawn[i % len(drawn)] for i in range(count)]
    return result
