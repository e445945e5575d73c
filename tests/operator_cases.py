"""Random arguments for the operators: one call builds everything that a layout, a shape and a dtype need."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

MASKS = {"rbe32": -1, "rbe22": 0x3FFFFF, "rbe8": 0x3FC00, "rbe16s": 0x3FCFF, "rbe9r": 0x2FF, "rbe4r": 0x2E0, "rbe2r": 0x280}
CONSTANTS = {"rbe9r": 7 << 18, "rbe4r": 5 << 18 | 16, "rbe2r": 5 << 18 | 64}  # the curve, and the middle of a cell of amplitudes
BITS = {"rbe32": 32, "rbe22": 22, "rbe8": 8, "rbe16s": 16, "rbe9r": 9, "rbe4r": 4, "rbe2r": 2}
LAYOUTS = ["rbe22_g8", "rbe22x2_g5", "rbe32_g16", "rbe8_g8", "rbe8x2_g8", "rbe8x3_g4", "rbe16s_g8", "rbe9r_g7", "rbe4r_g7", "rbe2r_g3"]


def products_check_values() -> bool:
    """On a CUDA device they do not, because looking at values would wait for it (docs/cuda.md); pack and unpack do."""
    return torch.get_default_device().type == "cpu" and "RBE_CUDA_ON_HOST" not in os.environ


def split(layout: str) -> tuple[str, int, int]:
    """(fields, stages, group) of a layout string."""
    fields, rest = layout.split("_g")
    name, _, stages = fields.partition("x")
    return name, int(stages or 1), int(rest.split("+")[0])


def seeded_idx(m: int, groups: int, stages: int, seed: int) -> torch.Tensor:
    """FORMAT's hash, for layouts ending in r."""
    wrap = 0xFFFFFFFF
    c = torch.arange(m * groups * stages, dtype=torch.int64).reshape(m, groups, stages)
    h = (seed + 0x9E3779B9 * (c + 1)) & wrap
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & wrap
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & wrap
    return (h ^ (h >> 16)) >> 24


def random_codes(layout: str, m: int, n: int, generator: torch.Generator, seed: int = 0) -> torch.Tensor:
    """int32 [m, K, M], every bit of the layout random."""
    name, stages, group = split(layout)
    groups = -(-n // group)
    words = torch.randint(-(2**31), 2**31, (m, groups, stages), generator=generator) & MASKS[name]
    if name in CONSTANTS:
        words = words | seeded_idx(m, groups, stages, seed) << 10 | CONSTANTS[name]
    return words.to(torch.int32)


@dataclass
class Case:
    """The tensors of a product, in the order of the operator, and its keyword arguments."""

    x: torch.Tensor
    codes: torch.Tensor
    basis: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor | None
    amplitude: torch.Tensor | None
    residual: tuple[torch.Tensor | None, ...]
    keywords: dict[str, Any]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return (self.x, self.codes, self.basis, self.gain, self.bias, self.amplitude, *self.residual)

    def run(self, **changed: Any) -> torch.Tensor:
        """rbe::linear with some of the tensors or keywords replaced."""
        names = ("x", "codes", "basis", "gain", "bias", "amplitude")
        tensors = [changed.pop(name, getattr(self, name)) for name in names]
        return torch.ops.rbe.linear(*tensors, *self.residual, **(self.keywords | changed))

    def dense(self) -> torch.Tensor:
        """W in float64."""
        amplitude = None if self.amplitude is None else self.amplitude.detach().double()
        keywords = {k: v for k, v in self.keywords.items() if k != "accuracy"}
        basis, gain = self.basis.detach().double(), self.gain.detach().double()
        return torch.ops.rbe.decode(self.codes, basis, gain, amplitude, *self.residual, **keywords)

    def require_grad(self) -> Case:
        for t in (self.x, self.basis, self.gain, self.bias, self.amplitude):
            if t is not None:
                t.requires_grad_()
        return self


def make_case(*args: Any, **keywords: Any) -> Case:
    """The arguments of _make_case; drawn on the CPU, so that every device gets the same, and moved to torch's default device."""
    with torch.device("cpu"):
        case = _make_case(*args, **keywords)
    device = torch.get_default_device()
    if device.type == "cpu":
        return case
    moved = [None if t is None else t.to(device) for t in case.tensors]
    return Case(*moved[:6], tuple(moved[6:]), case.keywords)


def _make_case(layout: str = "rbe22_g8", m: int = 5, n: int = 19, tokens: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float32,
               bias: bool = True, amplitude: bool = False, seed: int = 0, rounded: bool = True) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(1000 + seed)
    name, stages, group = split(layout)
    groups = -(-n // group)
    real = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keywords: dict[str, Any] = {"layout": layout, "in_features": n}
    if name in CONSTANTS:
        keywords["seed"] = seed
    if not rounded:
        keywords["rounded"] = False
    return Case(
        x=normal(*tokens, n).to(dtype),
        codes=random_codes(layout, m, n, generator, seed),
        basis=(normal(stages, 256, group) / n**0.5).to(real),
        gain=(torch.rand(m, generator=generator, dtype=torch.float64) + 0.5).to(real),
        bias=normal(m).to(real) if bias else None,
        amplitude=(torch.rand(m, groups, stages, generator=generator, dtype=torch.float64) * 1.9 - 0.95).to(real) if amplitude else None,
        residual=make_residual(layout, m, n, generator),
        keywords=keywords,
    )


def make_residual(layout: str, m: int, n: int, generator: torch.Generator) -> tuple[torch.Tensor | None, ...]:
    """The four residual tensors that the layout's suffix needs."""
    suffix = layout.partition("+")[2]

    def int8(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    def scale(count: int) -> torch.Tensor:
        return torch.rand(count, generator=generator) * 0.01

    if suffix == "int8":
        return int8(m, n), scale(m), None, None
    if suffix == "fp8":
        return torch.randn(m, n, generator=generator).to(torch.float8_e4m3fn), scale(m), None, None
    if suffix.startswith("lr"):
        rank = int(suffix[2:])
        return int8(m, rank), scale(rank), int8(rank, n), scale(rank)
    if suffix.startswith("sp"):
        kept = max(1, int(float(suffix[2:]) * n + 0.5))
        columns = torch.stack([torch.randperm(n, generator=generator)[:kept].sort().values for _ in range(m)])
        return torch.randn(m, kept, generator=generator).half(), None, columns.to(torch.int32), None
    return None, None, None, None
