"""Layers for the tests of RBELinear."""

from __future__ import annotations

import torch
from operator_cases import random_codes

from rbe_torch import Layout, RBELinear

LAYOUTS = ["rbe22_g8", "rbe32x2_g5", "rbe8x2_g8", "rbe16s_g8", "rbe9r_g7", "rbe4r_g3", "rbe2r_g5"]
FLOAT32_SUM = 2e-5  # absolute, sums of some tens of products of values near 1


def made(layout: str = "rbe22_g8", n: int = 37, m: int = 11, **options) -> RBELinear:
    return RBELinear(n, m, layout=layout, seed=1, **options)


def parts(layout: str, m: int = 6, n: int = 21, seed: int = 77) -> dict:
    """Random arguments of from_codes."""
    generator = torch.Generator().manual_seed(5)
    parsed = Layout.parse(layout)
    return {
        "codes": random_codes(layout, m, n, generator, seed if parsed.seeded else 0),
        "basis": torch.randn(parsed.basis_shape, generator=generator), "gain": torch.rand(m, generator=generator) + 0.1,
        "bias": torch.randn(m, generator=generator), "layout": layout, "in_features": n, "seed": seed if parsed.seeded else None,
    }  # fmt: skip
