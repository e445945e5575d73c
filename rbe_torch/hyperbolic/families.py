"""Batches whose names serve one another as wrong parents: pairs of one parent come together, so that a child's siblings are in the batch,
and every name of it is encoded once however often the loss uses it.

A batch of 512 pairs has about 660 distinct names and gives each pair as many wrong parents as wanted; drawn for each pair anew, 10 wrong
parents a pair would be 5,000 names.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from .hierarchy import Hierarchy
from .tasks import Pairs

FAMILY = 16  # children of a parent that come together; 10 siblings can then be wrong parents, as in the hard pairs of tasks.py


class Lists:
    """Lists of integers, end to end."""

    def __init__(self, lists: Sequence[Sequence[int]]) -> None:
        self.counts = np.array([len(entries) for entries in lists])
        self.starts = np.concatenate([[0], self.counts.cumsum()[:-1]])
        self.entries = np.array([entry for entries in lists for entry in entries], dtype=np.int64)

    def of(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position in `which`, entry) of all entries of these lists."""
        counts = self.counts[which]
        row = np.arange(len(which)).repeat(counts)
        return row, self.entries[(self.starts[which] - counts.cumsum() + counts)[row] + np.arange(counts.sum())]


class Families:
    """Batches of `size` pairs, in epochs over all of `pairs`; up to `family` children of a parent come together. Batch number `step` follows
    from the seed and `step` alone.

    ValueError: fewer pairs than `size`, or a family without children.
    """

    def __init__(self, hierarchy: Hierarchy, pairs: Pairs, size: int, seed: int = 0, family: int = FAMILY) -> None:
        if not 0 < size <= len(pairs):
            raise ValueError(f"batch: is {size}, must be positive and at most the {len(pairs)} pairs there are")
        if family < 1:
            raise ValueError(f"family: is {family}, must be positive")
        self.pairs, self.size, self.seed, self.family = np.array(pairs, dtype=np.int64), size, seed, family
        self.above = Lists([sorted(found) for found in hierarchy.ancestors])
        self.siblings = Lists([sorted({s for p in found for s in hierarchy.children[p]}) for found in hierarchy.parents])
        self.place = np.full(len(hierarchy.names), -1)
        self.order = functools.lru_cache(1)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """The pairs, families of at most `family` siblings next to one another."""
        generator = np.random.default_rng((self.seed, epoch))
        shuffled = generator.permutation(len(self.pairs))
        by_parent = shuffled[self.pairs[shuffled, 1].argsort(kind="stable")]
        parent = self.pairs[by_parent, 1]
        first = np.flatnonzero(np.diff(parent, prepend=-1))
        rank = np.arange(len(parent)) - first.repeat(np.diff(first, append=len(parent)))
        family = (np.diff(parent, prepend=-1) != 0) | (rank % self.family == 0)
        number = generator.permutation(family.sum())[family.cumsum() - 1]
        return by_parent[number.argsort(kind="stable")]

    def batch(self, step: int, hard: int, easy: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct entities [E] and of each pair child, parent, `hard` siblings and `easy` others as places in them, [size, 2 + hard +
        easy]. None of the others is an ancestor; where the batch has too few siblings, others stand for them."""
        generator = np.random.default_rng((self.seed, 1, step))
        epoch, at = divmod(step, len(self.pairs) // self.size)
        chosen = self.pairs[self.order(epoch)[at * self.size : (at + 1) * self.size]]
        entities, place = np.unique(chosen, return_inverse=True)
        place = place.reshape(chosen.shape)
        self.place[entities] = np.arange(len(entities))
        right = self._marked(chosen[:, 0], self.above, len(entities))
        right[np.arange(self.size), place[:, 0]] = True
        if len(entities) - int(right.sum(1).max()) < hard + easy:
            raise ValueError(f"batch: is {self.size}, too small for {hard + easy} wrong parents a pair out of its {len(entities)} entities")
        rank = generator.random(right.shape, dtype=np.float32) - 4 * right  # the highest are taken
        siblings = self._marked(chosen[:, 0], self.siblings, len(entities))
        self.place[entities] = -1
        near = _highest(rank + siblings, hard)
        np.put_along_axis(rank, near, -4, 1)
        return entities, np.concatenate([place, near, _highest(rank, easy)], 1)

    def _marked(self, children: np.ndarray, lists: Lists, count: int) -> np.ndarray:
        """bool [children, count]: whether the entity in this place of the batch is in the child's list."""
        row, entry = lists.of(children)
        marks, column = np.zeros((len(children), count), dtype=bool), self.place[entry]
        marks[row[column >= 0], column[column >= 0]] = True
        return marks


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` highest of each row."""
    return values.argpartition(values.shape[1] - count, 1)[:, values.shape[1] - count :] if count else np.zeros((len(values), 0), dtype=np.int64)
