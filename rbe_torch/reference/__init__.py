"""The format once more, in pure torch: a second implementation that shares no code or data with the C library.

It is the independent check of `docs/format.md`, and the differentiable form that higher derivatives go through: `decode` and `linear`
are ordinary torch operations without data-dependent control flow, so they work in float32 and float64, under `torch.func`, on meta and
fake tensors and with symbolic shapes. Slow and memory-hungry by design: W is formed.

Letters: m rows (out_features), n columns (in_features), g group size, K = ceil(n / g) groups, M stages.
"""

from __future__ import annotations

from .codes import pack, seeded_idx, unpack
from .encode import encode
from .scale import curve_table, scale
from .weight import decode, linear

__all__ = ["curve_table", "decode", "encode", "linear", "pack", "scale", "seeded_idx", "unpack"]
