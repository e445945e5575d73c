"""A hierarchy: named entities and direct (child, parent) edges without a cycle. An entity may have several parents.

Read from text, child<TAB>parent a line, or made from pairs; what is wrong with it is said by line and by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Hierarchy:
    """names: one for each entity, need not be distinct. parents: for each entity those of its direct parents, without repetition.

    ValueError: no edge, an entity that is its own ancestor (the message shows the cycle).
    """

    names: Sequence[str]
    parents: Sequence[Sequence[int]]
    order: Sequence[int] = field(init=False)  # parents before children

    def __post_init__(self) -> None:
        if not any(self.parents):
            raise ValueError(f"data: holds no (child, parent) pair ({len(self.names)} entities)")
        object.__setattr__(self, "order", self._sorted())

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]]) -> Hierarchy:
        """Entities are told apart by name; a repeated pair counts once."""
        number: dict[str, int] = {}
        parents: list[dict[int, None]] = []
        for child, parent in pairs:
            for name in (child, parent):
                if name not in number:
                    number[name] = len(number)
                    parents.append({})
            parents[number[child]][number[parent]] = None
        return cls(list(number), [list(found) for found in parents])

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Direct (child, parent) pairs."""
        return [(child, parent) for child, found in enumerate(self.parents) for parent in found]

    @cached_property
    def ancestors(self) -> list[frozenset[int]]:
        """Of each entity, direct and indirect."""
        result: list[frozenset[int]] = [frozenset()] * len(self.names)
        for entity in self.order:
            above = self.parents[entity]
            result[entity] = frozenset(above).union(*(result[parent] for parent in above))
        return result

    @cached_property
    def children(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self.names]
        for child, parent in self.edges:
            result[parent].append(child)
        return result

    @cached_property
    def depths(self) -> list[int]:
        """Edges of the shortest way up to an entity without parents."""
        result = [0] * len(self.names)
        for entity in self.order:
            if self.parents[entity]:
                result[entity] = 1 + min(result[parent] for parent in self.parents[entity])
        return result

    @property
    def indirect(self) -> list[tuple[int, int]]:
        """(entity, ancestor) pairs that are no direct edges, in a fixed order."""
        return [(child, parent) for child, above in enumerate(self.ancestors) for parent in sorted(above.difference(self.parents[child]))]

    def below(self, root: int) -> Hierarchy:
        """The part of the hierarchy that consists of `root` and its descendants."""
        kept = [entity for entity in range(len(self.names)) if entity == root or root in self.ancestors[entity]]
        number = {entity: i for i, entity in enumerate(kept)}
        return Hierarchy(
            [self.names[entity] for entity in kept],
            [[number[parent] for parent in self.parents[entity] if parent in number] for entity in kept],
        )

    def _sorted(self) -> list[int]:
        """Parents before children, without recursion."""
        done, on_path, result = set(), {}, []
        for start in range(len(self.names)):
            stack = [(start, iter(self.parents[start]))] if start not in done else []
            on_path = {start: None} if stack else {}
            while stack:
                entity, rest = stack[-1]
                step = next((parent for parent in rest if parent not in done), None)
                if step is None:
                    stack.pop()
                    on_path.pop(entity)
                    done.add(entity)
                    result.append(entity)
                elif step in on_path:
                    path = list(on_path)
                    cycle = [self.names[i] for i in [*path[path.index(step) :], step]]
                    shown = cycle if len(cycle) <= 8 else [*cycle[:4], "...", *cycle[-3:]]
                    raise ValueError(
                        f"data: has a cycle, in which each is a child of the next: {' -> '.join(map(repr, shown))}".replace("'...'", "...")
                    )
                else:
                    on_path[step] = None
                    stack.append((step, iter(self.parents[step])))
        return result


def read_hierarchy(path: str | os.PathLike) -> Hierarchy:
    """A file of child<TAB>parent lines, or a directory whose *.tsv files together hold them. Blank lines and lines that start with # are
    skipped.

    ValueError: no such file, no pairs, a line that is no pair (by number), an entity given as its own parent, a cycle.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(source.glob("*.tsv"))
        if not files:
            raise ValueError(f"data: {source} holds no *.tsv file; it must hold child<TAB>parent lines")
    elif source.is_file():
        files = [source]
    else:
        raise ValueError(f"data: {source} is no file and no directory")
    pairs: list[tuple[str, str]] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {file} is not UTF-8 text: {error}") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            cells = [" ".join(cell.split()) for cell in line.split("\t")]
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"data: {file} line {number} is not child<TAB>parent: {line[:60]!r}")
            if cells[0] == cells[1]:
                raise ValueError(f"data: {file} line {number} makes {cells[0]!r} its own parent")
            pairs.append((cells[0], cells[1]))
    if not pairs:
        raise ValueError(f"data: {source} holds no pairs; a line is child<TAB>parent")
    return Hierarchy.from_pairs(pairs)
