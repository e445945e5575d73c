"""Fits the basis table of a layout to trained weights: the k-means behind `compress`.

    W[i, group k] ~ gain[i] * sum over s of vector(code[i,k,s])            docs/format.md

Every trainer (trainers.py) takes *group vectors* [N, g]: rows of W divided by their size and cut into groups of g, a sample of them.

    rbe8          additive k-means
    rbe16s        k-means of |w|: the eight signs are in the code
    rbe22, rbe32  spherical k-means on lines, unit vectors: the scale is in the code
    rbe9r         random unit vectors: idx comes from a seed, so there is nothing to fit

Deterministic given a seed. The basis comes back as float32 that holds fp16-representable values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import BASIS_VECTORS, Layout
from .outliers import loudest, parted, row_size
from .trainers import ADDITIVE_ROUNDS, SAMPLE_VECTORS, Tick, fit_additive, fit_lines, fit_magnitudes, make_room, unit

SMALLEST = 2.0**-18  # of a weight's largest magnitude: 64 times the least fp16 gain
SAMPLE_NUMBERS = 1 << 23  # N * g at most
_LOUD = 64  # vectors with outliers that a weight adds to its sample: that many, or one for each so many of the sample


def round_count(layout: Layout) -> int:
    """How often fit_basis calls `tick`."""
    if layout.seeded:
        return 1
    additive = layout.fields == "rbe8" and layout.stages > 1
    return layout.stages + (sum(count for _, count in ADDITIVE_ROUNDS) if additive else 0)


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
    vectors = torch.empty(0, layout.group, dtype=torch.float32) if layout.seeded else sample_vectors(weights, layout.group, generator)
    return _fit(vectors, layout, generator, tick)


def fit_vectors(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick = lambda _: None) -> Tensor:
    """The basis for group vectors [N, g] in any order, as sample_some gives them."""
    return _fit(_shuffled(vectors, layout.group, generator), layout, generator, tick)


def _fit(vectors: Tensor, layout: Layout, generator: torch.Generator, tick: Tick) -> Tensor:
    if layout.seeded:
        basis = unit(torch.randn(layout.basis_shape, generator=generator, dtype=torch.float32))
        tick("random vectors")
        return basis.half().float()
    if layout.has_amplitude:
        return fit_lines(vectors, layout, generator, tick).half().float().contiguous()
    shaping, outliers = parted(vectors)
    basis = (fit_magnitudes if layout.fields == "rbe16s" else fit_additive)(shaping, layout, generator, tick)
    return make_room(basis, layout, shaping, outliers, generator).half().float().contiguous()


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
    if 0 < largest < SMALLEST:
        return f"has no value of a magnitude above {largest:.3g}, must have one of {SMALLEST:.2g} at least (an fp16 gain is 6e-8 or more), or be zero"
    return ""


def sample_vectors(weights: Sequence[Tensor], group: int, generator: torch.Generator) -> Tensor:
    """Group vectors [N, g] drawn from all weights in proportion to their size, in random order; rows divided by their size (outliers.py).

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
    """`wanted` group vectors of one weight [m, n], and those of its others that are most likely out of a table's reach: [>= wanted, g]."""
    weight = weight.detach().float()
    m, n = weight.shape
    full = max(1, n // group)
    size = row_size(weight)[:, None]
    rows = (weight / size.where(size > 0, torch.ones_like(size)))[:, : full * group].cpu()
    rows = torch.nn.functional.pad(rows, (0, full * group - rows.shape[1])).reshape(m * full, group)
    order = torch.randperm(m * full, generator=generator)
    return torch.cat([rows[order[:wanted]], loudest(rows[order[wanted:]], max(_LOUD, wanted // _LOUD))])


def _shuffled(vectors: Tensor, group: int, generator: torch.Generator) -> Tensor:
    vectors = vectors[vectors.square().sum(1) > 0]
    if len(vectors) == 0:  # every weight is zero: any table will do
        vectors = torch.randn(BASIS_VECTORS, group, generator=generator, dtype=torch.float32)
    return vectors[torch.randperm(len(vectors), generator=generator)]
