"""Code words in torch: their amplitudes, words with other amplitudes, and random words.

Word (docs/format.md), most significant first: amp_fine 31..22, cat 21..20, sub 19..18, idx 17..10, sign 9, deriv 8, amp 7..0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _ops
from .layout import Layout

SIGN_BIT = 1 << 9
IDX_SHIFT = 10
CURVE_EXP = 1 << 20 | 3 << 18  # cat 1, sub 3: exp(r) - 1, which is 0 at 0, so that training can pass through it
U_MAX = 1 - 2.0**-18
_NEGATIVE_ZERO = -(2.0**-20)  # rounds to amplitude 0 with the sign bit set


def amplitude_of(words: Tensor) -> Tensor:
    """float32 a in (-1, 1), of the words' shape: a < 0 where the sign is set, |a| = (amp + amp_fine/1024) / 256."""
    words = words.to(torch.int64)
    u = ((words & 255) * 1024 + (words >> 22 & 1023)).to(torch.float32) / 2**18
    negative = (words & SIGN_BIT) != 0
    return torch.where(negative, torch.where(u == 0, _NEGATIVE_ZERO, -u), u)


def with_amplitude(words: Tensor, amplitude: Tensor, layout: Layout) -> Tensor:
    """int32 words whose sign, amp and amp_fine are those of `amplitude` rounded half up to the layout's bits, or in the middle of its cell (rbe4r, rbe2r)."""
    u = amplitude.detach().to(torch.float64).abs().clamp(max=U_MAX)
    if layout.fields == "rbe32":
        step = (u * 2**18 + 0.5).floor().to(torch.int64).clamp(max=2**18 - 1)
        amp, fine = step >> 10, step & 1023
    elif layout.amp_unstored:
        amp, fine = (u * 2**8).floor().to(torch.int64) >> layout.amp_unstored << layout.amp_unstored | 1 << layout.amp_unstored - 1, 0
    else:
        amp, fine = (u * 256 + 0.5).floor().to(torch.int64).clamp(max=255), 0
    kept = words.to(torch.int64) & (255 << IDX_SHIFT | 15 << 18 | 1 << 8)
    word = kept | amp | fine << 22 | (amplitude < 0).to(torch.int64) * SIGN_BIT
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def second_moment(words: Tensor, layout: Layout) -> float:
    """Mean of scale^2 of words on the curve that random_words takes; 1 where codes have no scale."""
    if not layout.has_amplitude:
        return 1.0
    u = amplitude_of(words).abs()
    scale = 2 * u.sinh() if layout.amp_unstored else (2 * u).expm1()
    return float(scale.square().mean())


def scaled_amplitude(amplitude: Tensor, factor: float, layout: Layout) -> Tensor:
    """Amplitudes whose scales, on the curve that random_words takes, are `factor` times those of `amplitude`."""
    if layout.amp_unstored:
        return (factor * amplitude.sinh()).asinh()  # 2 sinh(a)
    return amplitude.sign() * (factor * (2 * amplitude.abs()).expm1()).log1p() / 2  # exp(2 a) - 1


def random_words(layout: Layout, m: int, n: int, seed: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """int32 words [m, K, M] on the CPU: idx uniform (drawn from `seed` where the layout says so), scales of second moment 1."""
    shape = layout.codes_shape(m, n)
    drawn = {"generator": generator, "device": "cpu"}  # whatever torch's default device is
    if layout.seeded:
        zeros = torch.zeros(m, layout.packed_row_bytes(n), dtype=torch.uint8, device="cpu")
        words = torch.ops.rbe.unpack(zeros, layout=str(layout), in_features=n, seed=seed)
    else:
        words = torch.randint(0, 256, shape, dtype=torch.int32, **drawn) << IDX_SHIFT
    if layout.fields == "rbe16s":
        return words | torch.randint(0, 256, shape, dtype=torch.int32, **drawn)
    if not layout.has_amplitude:
        return words
    scale = torch.randn(shape, dtype=torch.float32, **drawn)
    if layout.amp_unstored:
        return with_amplitude(words, (scale / 2).asinh(), layout)  # their curve is 2 sinh(u)
    amplitude = scale.sign() * scale.abs().log1p() / 2  # exp(2u) - 1 = |scale|
    return with_amplitude(words | CURVE_EXP, amplitude, layout)


def is_interleaved(codes: Tensor | None) -> bool:
    """Whether these are interleaved codes of one byte, uint8 [ceil(m/64), K*M, 64]: docs/format.md."""
    return codes is not None and codes.dtype == torch.uint8 and codes.dim() == 3


def for_kernels(codes: Tensor | None, rows: int, layout: Layout) -> Tensor | None:
    """Packed or interleaved codes in whichever of the two forms the kernels of their device read best; rows are padded by a tenth at most."""
    if type(codes) is not Tensor or codes.is_meta:  # not there, or a DTensor or the like, whose shards would not be whole
        return codes
    padded = -(-rows // 64) * 64
    gains = layout.fields == "rbe8" and not layout.residual and codes.device.type == "cpu" and 10 * padded <= 11 * rows and _ops.reads_interleaved()
    if gains == is_interleaved(codes):
        return codes
    return torch.ops.rbe.interleave(codes) if gains else torch.ops.rbe.deinterleave(codes, rows)
