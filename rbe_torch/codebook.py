"""Fits the basis table of a layout to trained weights: the k-means behind `compress`.

    W[i, group k] ~ gain[i] * sum over s of vector(code[i,k,s])            docs/format.md

Every trainer takes *group vectors* [N, g]: rows of W divided by their root mean square and cut into groups of g, a sample of them.

    rbe8          additive k-means: stages initialised one on the residual of another, then rounds of (encode by beam search, least squares
                  for all M * 256 vectors at once)
    rbe16s        k-means of |w|: the eight signs are in the code
    rbe22, rbe32  spherical k-means on lines (a vector and its negative are one), unit vectors: the scale is in the code
    rbe9r         random unit vectors: idx comes from a seed, so there is nothing to fit

Deterministic given a seed. The basis comes back as float32 that holds fp16-representable values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .layout import BASIS_VECTORS, Layout

SAMPLE_VECTORS = 1 << 20  # N at most
SAMPLE_NUMBERS = 1 << 23  # N * g at most
# (N, rounds): a small sample moves the table quickly but overfits (two stages of g = 8 have 65536 cells), so the last rounds take a large one.
# MiniLM, 2 stages: relative error 0.0974; with twice the vectors and rounds, at twice the time, 0.0969.
_ADDITIVE_ROUNDS = ((1 << 15, 6), (1 << 17, 6), (1 << 19, 4))
_LLOYD_ROUNDS = 10
_LINE_ROUNDS = 15
_RIDGE = 1e-4  # of a vector's mean count: the data fix only the sum of the stages, not a constant moved from one to another

Tick = Callable[[str], None]


def round_count(layout: Layout) -> int:
    """How often fit_basis calls `tick`."""
    if layout.seeded:
        return 1
    additive = layout.fields == "rbe8" and layout.stages > 1
    return layout.stages + (sum(count for _, count in _ADDITIVE_ROUNDS) if additive else 0)


def fit_basis(weights: Sequence[Tensor], layout: str | Layout, seed: int = 0, tick: Tick = lambda _: None) -> Tensor:
    """One basis [M, 256, g] for all `weights`, float32 on the CPU.

    weights: at least one finite floating-point matrix [m, n], on any device. tick: called with a word or two after each round.
    ValueError: no weights, or one that is no matrix, is empty, on the meta device or not finite.
    """
    layout = Layout.parse(layout)
    if not weights:
        raise ValueError("weights: is empty, must hold at least one matrix")
    for index, weight in enumerate(weights):
        problem = cannot_encode(weight)
        if problem:
            raise ValueError(f"weights[{index}]: {problem}")
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.empty(0, layout.group) if layout.seeded else sample_vectors(weights, layout.group, generator)
    return _fit(vectors, layout, generator, tick)


def fit_vectors(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick = lambda _: None) -> Tensor:
    """The basis for group vectors [N, g] in any order, as sample_some gives them."""
    return _fit(_shuffled(vectors, layout.group, generator), layout, generator, tick)


def _fit(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    if layout.seeded:
        basis = _unit(torch.randn(layout.basis_shape, generator=generator))
        tick("random vectors")
        return basis.half().float()
    if layout.has_amplitude:
        fit = _fit_lines
    elif layout.fields == "rbe16s":
        fit = _fit_magnitudes
    else:
        fit = _fit_additive
    return fit(vectors, layout, generator, tick).half().float().contiguous()


def cannot_encode(weight: Tensor) -> str:
    """Why a tensor cannot be encoded, as the rest of a sentence; empty if it can."""
    if weight.dim() != 2 or weight.numel() == 0:
        return f"has shape {tuple(weight.shape)}, must be a matrix with at least one row and one column"
    if not weight.is_floating_point():
        return f"is {weight.dtype}, must be floating-point"
    if weight.is_meta:
        return "is on the meta device, which holds no numbers"
    if not bool(torch.isfinite(weight).all()):
        count = int((~torch.isfinite(weight)).sum())
        return f"has {count} value{'s that are' if count > 1 else ' that is'} not finite (NaN or infinite), must have none"
    largest = float(weight.abs().max())
    if largest > 65504:
        return f"has a value of magnitude {largest:.3g}, must be at most 65504, the largest that an fp16 gain can hold"
    return ""


def sample_vectors(weights: Sequence[Tensor], group: int, generator: torch.Generator) -> Tensor:
    """Group vectors [N, g] drawn from all weights in proportion to their size, in random order; rows divided by their root mean square.

    A ragged last group is left out unless a weight has no other (then it is padded with zeros), and so are vectors that are all zero.
    """
    sizes = sample_sizes([tuple(weight.shape) for weight in weights], group)
    return _shuffled(torch.cat([sample_some(weight, group, wanted, generator) for weight, wanted in zip(weights, sizes, strict=True)]), group, generator)


def sample_sizes(shapes: Sequence[tuple[int, ...]], group: int) -> list[int]:
    """How many vectors sample_some is to draw from weights of these shapes."""
    most = max(1, min(SAMPLE_VECTORS, SAMPLE_NUMBERS // group))
    counts = [m * max(1, n // group) for m, n in shapes]
    total = sum(counts)
    return [count if total <= most else max(1, round(most * count / total)) for count in counts]


def sample_some(weight: Tensor, group: int, wanted: int, generator: torch.Generator) -> Tensor:
    """`wanted` group vectors [wanted, g] of one weight [m, n]."""
    weight = weight.detach().float()
    m, n = weight.shape
    full = max(1, n // group)
    rms = weight.square().mean(1, keepdim=True).sqrt()
    rows = (weight / rms.where(rms > 0, torch.ones_like(rms)))[:, : full * group].cpu()
    rows = torch.nn.functional.pad(rows, (0, full * group - rows.shape[1])).reshape(m * full, group)
    return rows[torch.randperm(m * full, generator=generator)[:wanted]]


def _shuffled(vectors: Tensor, group: int, generator: torch.Generator) -> Tensor:
    vectors = vectors[vectors.square().sum(1) > 0]
    if len(vectors) == 0:  # every weight is zero: any table will do
        vectors = torch.randn(BASIS_VECTORS, group, generator=generator)
    return vectors[torch.randperm(len(vectors), generator=generator)]


# ---- pieces ----------------------------------------------------------------------------------------------------------------------
def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _draw(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the vectors, repeated where there are fewer."""
    order = torch.randperm(len(vectors), generator=generator)
    return vectors[order.repeat(-(-count // len(order)))[:count]].clone()


def _nearest(vectors: Tensor, basis: Tensor) -> Tensor:
    """int64 [N, M]: codes of vectors [N, g] on an additive basis [M, 256, g]."""
    layout = Layout("rbe8", vectors.shape[1], basis.shape[0])
    ones = torch.ones(len(vectors))
    words = torch.ops.rbe.encode(vectors, basis, ones, layout=str(layout), in_features=vectors.shape[1])
    return (words[:, 0] >> 10).long()  # idx 17..10 of the interchange word


def _sums(vectors: Tensor, index: Tensor) -> Tensor:
    return torch.zeros(BASIS_VECTORS, vectors.shape[1]).index_add_(0, index, vectors)


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
def _fit_additive(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    left, stages = vectors[: _ADDITIVE_ROUNDS[0][0]] if layout.stages > 1 else vectors, []
    for stage in range(layout.stages):
        stages.append(_lloyd(left, generator))
        left = left - stages[-1][_nearest(left, stages[-1][None])[:, 0]]
        tick(f"stage {stage + 1} of {layout.stages}")
    basis = torch.stack(stages)
    if layout.stages == 1:
        return basis
    for size, count in _ADDITIVE_ROUNDS:
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


def _fit_magnitudes(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    left, stages = vectors, []
    for stage in range(layout.stages):
        size = left.abs()
        stages.append(_lloyd(size, generator))
        left = left.sign() * (size - stages[-1][_nearest(size, stages[-1][None])[:, 0]])
        tick(f"stage {stage + 1} of {layout.stages}")
    return torch.stack(stages)


def _fit_lines(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    """Unit vectors b that make sum of |v - (v . b) b|^2 least, b the best one for each v; a round is a step of the power method."""
    left, stages = vectors[: SAMPLE_VECTORS // 4], []
    for stage in range(layout.stages):
        lines = _unit(_draw(left, BASIS_VECTORS, generator))
        for _ in range(_LINE_ROUNDS):
            index, along = _nearest_lines(left, lines)
            lines = _unit(_means(left * along, index, generator))
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
