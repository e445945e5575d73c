"""Trainers of basis tables: group vectors [N, g], in random order, to a table [M, 256, g].

    additive    k-means, stages initialised one on the residual of another, then rounds of (encode by beam search, least squares for all
                M * 256 vectors at once)
    magnitudes  k-means of |v|: the signs are in the code
    lines       spherical k-means of lines (a vector and its negative are one), unit vectors: the scale is in the code

The first two leave some vectors to outliers (outliers.py): make_room.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import BASIS_VECTORS, Layout
from .outliers import ROOM, TIMES_MEAN, centres_of

SAMPLE_VECTORS = 1 << 20  # N at most
# (N, rounds): a small sample moves the table quickly but overfits (two stages of g = 8 have 65536 cells), so the last rounds take a large one.
# MiniLM, 2 stages: relative error 0.0974; with twice the vectors and rounds, at twice the time, 0.0969.
ADDITIVE_ROUNDS = ((1 << 15, 6), (1 << 17, 6), (1 << 19, 4))
_LLOYD_ROUNDS = 10
_LINE_ROUNDS = 15
_RIDGE = 1e-4  # of a vector's mean count: the data fix only the sum of the stages, not a constant moved from one to another
_JUDGES = 1 << 14  # vectors that say what a table leaves of an ordinary one
_ROOM_SAMPLE, _ROOM_ROUNDS = 1 << 17, 2

Tick = Callable[[str], None]


# ---- pieces ----------------------------------------------------------------------------------------------------------------------
def unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _draw(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the vectors, repeated where there are fewer."""
    order = torch.randperm(len(vectors), generator=generator)
    return vectors[order.repeat(-(-count // len(order)))[:count]].clone()


def _nearest(vectors: Tensor, basis: Tensor) -> Tensor:
    """int64 [N, M]: codes of vectors [N, g] on an additive basis [M, 256, g]."""
    layout = Layout("rbe8", vectors.shape[1], basis.shape[0])
    ones = torch.ones(len(vectors), dtype=torch.float32)
    words = torch.ops.rbe.encode(vectors, basis, ones, layout=str(layout), in_features=vectors.shape[1])
    return (words[:, 0] >> 10).long()  # idx 17..10 of the interchange word


def _sums(vectors: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(BASIS_VECTORS, vectors.shape[1], dtype=torch.float32).index_add_(0, index, vectors)


def _means(vectors: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
    """Mean of each cluster [256, g]; a cluster without members is put on a vector drawn at random."""
    count = torch.bincount(index, minlength=BASIS_VECTORS)
    means = _sums(vectors, index) / count.clamp(min=1)[:, None]
    empty = count == 0
    means[empty] = _draw(vectors, int(empty.sum()), generator)
    return means


def _lloyd(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """Plain k-means: 256 centres [256, g] of vectors [N, g]."""
    centres = _draw(vectors, BASIS_VECTORS, generator)
    for _ in range(_LLOYD_ROUNDS):
        centres = _means(vectors, _nearest(vectors, centres[None])[:, 0], generator)
    return centres


# ---- trainers: vectors [N, g] -> basis [M, 256, g] --------------------------------------------------------------------------------
def fit_additive(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    left, stages = vectors[: ADDITIVE_ROUNDS[0][0]] if layout.stages > 1 else vectors, []
    for stage in range(layout.stages):
        stages.append(_lloyd(left, generator))
        left = left - stages[-1][_nearest(left, stages[-1][None])[:, 0]]
        tick(f"stage {stage + 1} of {layout.stages}")
    basis = torch.stack(stages)
    if layout.stages == 1:
        return basis
    for size, count in ADDITIVE_ROUNDS:
        sample = vectors[:size]
        for _ in range(count):
            basis = _least_squares(sample, _nearest(sample, basis), generator)
            tick("all stages together")
    return basis


def _least_squares(vectors: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
    """The basis [M, 256, g] that minimises |vectors - sum over s of basis[s, codes[:, s]]|^2: normal equations over all M * 256 vectors.

    A vector that no code uses is put where it would reproduce a sample drawn at random.
    """
    stages = codes.shape[1]
    size = stages * BASIS_VECTORS
    block = [slice(s * BASIS_VECTORS, (s + 1) * BASIS_VECTORS) for s in range(stages)]
    counts = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, vectors.shape[1], dtype=torch.float64)
    for p in range(stages):
        right[block[p]] = _sums(vectors, codes[:, p]).double()
        for q in range(p, stages):
            pairs = torch.bincount(codes[:, p] * BASIS_VECTORS + codes[:, q], minlength=BASIS_VECTORS**2)
            counts[block[p], block[q]] = pairs.view(BASIS_VECTORS, -1).double()
            counts[block[q], block[p]] = counts[block[p], block[q]].t()
    unused = (counts.diagonal() == 0).nonzero()[:, 0]
    counts.diagonal().add_(_RIDGE * len(vectors) / BASIS_VECTORS)
    basis = torch.linalg.solve(counts, right).float()
    column = codes + BASIS_VECTORS * torch.arange(stages)
    order = torch.randperm(len(vectors), generator=generator)
    drawn = order.repeat(-(-len(unused) // len(order)))[: len(unused)]
    left = vectors[drawn] - basis[column[drawn]].sum(1)
    basis[unused] = left + basis[column[drawn, unused // BASIS_VECTORS]]
    return basis.view(stages, BASIS_VECTORS, -1)


def fit_magnitudes(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    left, stages = vectors, []
    for stage in range(layout.stages):
        size = left.abs()
        stages.append(_lloyd(size, generator))
        left = left.sign() * (size - stages[-1][_nearest(size, stages[-1][None])[:, 0]])
        tick(f"stage {stage + 1} of {layout.stages}")
    return torch.stack(stages)


def fit_lines(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    """Unit vectors b that make sum of |v - (v . b) b|^2 least, b the best one for each v; a round is a step of the power method."""
    left, stages = vectors[: SAMPLE_VECTORS // 4], []
    for stage in range(layout.stages):
        lines = unit(_draw(left, BASIS_VECTORS, generator))
        for _ in range(_LINE_ROUNDS):
            index, along = _nearest_lines(left, lines)
            lines = unit(_means(left * along, index, generator))
        index, along = _nearest_lines(left, lines)
        left = left - along * lines[index]
        stages.append(lines)
        tick(f"stage {stage + 1} of {layout.stages}")
    return torch.stack(stages)


def _nearest_lines(vectors: Tensor, lines: Tensor, chunk: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """Which line is nearest to each vector [N], and the vector's coordinate along it [N, 1]."""
    indices, alongs = [], []
    for part in vectors.split(chunk):
        product = part @ lines.t()
        indices.append(product.abs().argmax(1))
        alongs.append(product.gather(1, indices[-1][:, None]))
    return torch.cat(indices), torch.cat(alongs)


# ---- outliers --------------------------------------------------------------------------------------------------------------------
def make_room(basis: Tensor, layout: Layout, vectors: Tensor, outliers: Tensor, generator: torch.Generator) -> Tensor:
    """Puts centres of the outliers that `basis` [M, 256, g] cannot reach in place of the first stage's vectors that `vectors` use
    least, and fits the others to `vectors` again. Without such outliers the basis is returned as it is."""
    if len(outliers) == 0 or len(vectors) == 0:
        return basis
    ordinary = float(_left(vectors[:_JUDGES], basis, layout)[1].mean())
    centres = centres_of(outliers[_left(outliers, basis, layout)[1] > TIMES_MEAN * ordinary], ROOM)
    if len(centres) == 0:
        return basis
    if layout.fields == "rbe16s":
        centres = centres.abs()
    sample, basis = vectors[:_ROOM_SAMPLE], basis.clone()
    index = _left(sample, basis, layout)[0]
    slots = torch.bincount(index[:, 0], minlength=BASIS_VECTORS).argsort(stable=True)[: len(centres)]
    basis[0, slots] = centres
    if layout.fields == "rbe8" and layout.stages > 1:
        for _ in range(_ROOM_ROUNDS):
            basis = _least_squares(sample, _nearest(sample, basis), generator)
            basis[0, slots] = centres
    return basis


def _left(vectors: Tensor, basis: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(idx int64 [N, M], squared length [N] of what it leaves) of each vector in a basis whose codes have no scale."""
    ones, place = torch.ones(len(vectors), dtype=torch.float32), {"layout": str(layout).partition("+")[0], "in_features": vectors.shape[1]}
    words = torch.ops.rbe.encode(vectors, basis, ones, **place)
    rest = vectors - torch.ops.rbe.decode(words, basis, ones, **place)
    return (words[:, 0] >> 10 & 255).long(), rest.square().sum(1)
