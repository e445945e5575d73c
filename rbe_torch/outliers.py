"""Rows and groups with a few weights that are far larger than the rest: how a row is measured so that they do not set its gain, and which
vectors a basis table needs to reach them.

Trained transformers have single weights of ten to three hundred times the size of their row, and the largest inputs meet them: one such
weight that no sum of basis vectors reached cost a layer of MiniLM forty times the output error of all its other weights together.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 32  # vectors of the first stage for outliers, at most; they cost the other weights 2.6 % of squared error
TIMES_MEAN = 16.0  # squared error, over that of an ordinary vector, from which on a vector counts as out of reach
_CLIP = 4.0  # of the row's size so far
_ROUNDS = 3
_SMALLEST = 1 / 8  # of the root mean square
_PEAK = 4.0  # largest element from which on a vector may be out of reach
_ORDINARY = 6.0  # and to which it may shape the rest of the table
_COMMON = 0.99  # of all vectors may, whatever their size
_LLOYD_ROUNDS = 20


def row_size(weight: Tensor) -> Tensor:
    """Root mean square [m] of the rows of weight [m, n], elements taken as at most four times that size; at least 1/8 of the plain one."""
    square = weight.square()
    plain = square.mean(1, keepdim=True)
    size = plain
    for _ in range(_ROUNDS):
        size = torch.maximum(square.minimum(_CLIP**2 * size).mean(1, keepdim=True), _SMALLEST**2 * plain)
    return size[:, 0].sqrt()


def loudest(vectors: Tensor, most: int) -> Tensor:
    """The vectors [<= most, g] of [N, g] that may be out of reach, those with the largest elements first."""
    peak, index = vectors.abs().amax(1).topk(min(most, len(vectors)))
    return vectors[index[peak > _PEAK]]


def parted(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors that shape the table, vectors that may be out of its reach); some are both."""
    peak = vectors.abs().amax(1)
    limit = max(_ORDINARY, float(peak.kthvalue(max(1, int(_COMMON * len(peak)))).values))
    return vectors[peak <= limit], vectors[peak > _PEAK]


def centres_of(vectors: Tensor, count: int) -> Tensor:
    """k-means: at most `count` centres [C, g] of vectors [N, g], started on those farthest apart; as many as there are different vectors
    where those are fewer, none of none."""
    if len(vectors) == 0:
        return vectors
    chosen = [vectors[vectors.square().sum(1).argmax()]]
    distance = (vectors - chosen[0]).square().sum(1)
    while len(chosen) < count and float(distance.max()) > 0:
        chosen.append(vectors[distance.argmax()])
        distance = torch.minimum(distance, (vectors - chosen[-1]).square().sum(1))
    centres = torch.stack(chosen)
    for _ in range(_LLOYD_ROUNDS):
        index = torch.cdist(vectors, centres).argmin(1)
        members = torch.bincount(index, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, index, vectors)
        centres = torch.where(members > 0, sums / members.clamp(min=1), centres)
    return centres
