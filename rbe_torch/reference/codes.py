"""Layouts, seeded idx, and code words to and from packed bytes."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .scale import CELLS

_BITS = {"rbe32": 32, "rbe22": 22, "rbe8": 8, "rbe16s": 16, "rbe9r": 9, "rbe4r": 4, "rbe2r": 2}
_LAYOUT = re.compile(r"(rbe32|rbe22|rbe8|rbe16s|rbe9r|rbe4r|rbe2r)(?:x([1-9]\d*))?_g([1-9]\d*)(?:\+(int8|fp8|lr|sp)([\d.]*))?")


class Parsed(NamedTuple):
    field: str
    bits: int
    group: int
    stages: int
    residual: str | None


def parse(layout: str) -> Parsed:
    match = _LAYOUT.fullmatch(layout)
    if match is None:
        raise ValueError(f"layout: {layout!r} must be <fields>[x<stages>]_g<group>[+residual], for example rbe22_g64")
    field, stages, group, residual, _ = match.groups()
    return Parsed(field, _BITS[field], int(group), int(stages or 1), residual)


def _multiply32(h: Tensor, factor: int) -> Tensor:
    """h * factor modulo 2^32 in int64 without overflow."""
    return ((h & 0xFFFF) * factor + (((h >> 16) * (factor & 0xFFFF)) << 16)) & 0xFFFFFFFF


def seeded_idx(
    rows: int, groups: int, stages: int, seed: int, *, row0: int = 0, k0: int = 0, groups_total: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:  # fmt: skip
    """The idx that the seed gives, int32 [rows, groups, stages], for a shard whose first row and group in the layer are row0 and k0."""
    total = groups if groups_total is None else groups_total
    i = torch.arange(rows, dtype=torch.int64, device=device)[:, None, None] + row0
    k = torch.arange(groups, dtype=torch.int64, device=device)[None, :, None] + k0
    s = torch.arange(stages, dtype=torch.int64, device=device)
    c = ((i * total + k) * stages + s) & 0xFFFFFFFF
    h = (_multiply32((c + 1) & 0xFFFFFFFF, 0x9E3779B9) + seed) & 0xFFFFFFFF
    h = _multiply32(h ^ (h >> 16), 0x85EBCA6B)
    h = _multiply32(h ^ (h >> 13), 0xC2B2AE35)
    return ((h ^ (h >> 16)) >> 24).to(torch.int32)


# What a code stores, least significant bit first: (shift in the word, width) of each piece.
_PIECES = {"rbe32": [(0, 32)], "rbe22": [(0, 22)], "rbe8": [(10, 8)], "rbe16s": [(0, 8), (10, 8)], "rbe9r": [(0, 8), (9, 1)],
           "rbe4r": [(5, 3), (9, 1)], "rbe2r": [(7, 1), (9, 1)]}


def _bit_places(field: str, device: torch.device) -> Tensor:
    """Bit of the word that each stored bit comes from, int64 [bits]."""
    return torch.tensor([shift + b for shift, width in _PIECES[field] for b in range(width)], device=device)


def _seeded_words(words: Tensor, parsed: Parsed, in_features: int, seed: int, row0: int, k0: int) -> Tensor:
    """The bits that layouts ending in r fix rather than store: idx from the seed, cat and sub, the end of amp."""
    rows, groups, stages = words.shape
    total = -(-in_features // parsed.group)
    idx = seeded_idx(rows, groups, stages, seed, row0=row0, k0=k0, groups_total=total, device=words.device)
    curve = 1 << 20 | (1 if parsed.field in CELLS else 3) << 18
    return (idx << 10) | curve | (128 // CELLS[parsed.field] if parsed.field in CELLS else 0)


def unpack_words(packed: Tensor, parsed: Parsed, in_features: int, seed: int, row0: int, k0: int) -> Tensor:
    """`unpack` without its check."""
    rows, width = packed.shape
    groups = min(width * 8 // (parsed.bits * parsed.stages), -(-in_features // parsed.group) - k0)  # small codes would fit into the padding
    bits = (packed[..., None].to(torch.int64) >> torch.arange(8, device=packed.device)) & 1
    bits = bits.reshape(rows, width * 8)[:, : groups * parsed.stages * parsed.bits].reshape(rows, groups, parsed.stages, parsed.bits)
    words = (bits << _bit_places(parsed.field, packed.device)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return words | _seeded_words(words, parsed, in_features, seed, row0, k0) if parsed.field.endswith("r") else words


def _pack(words: Tensor, parsed: Parsed) -> Tensor:
    rows = words.shape[0]
    bits = ((words.to(torch.int64)[..., None] >> _bit_places(parsed.field, words.device)) & 1).reshape(rows, -1)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).reshape(rows, -1, 8)
    return (bits << torch.arange(8, device=words.device)).sum(-1).to(torch.uint8)


def pack(words: Tensor, *, layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0) -> Tensor:
    """int32 words [m, K, M] as uint8 [m, ceil(K*M*bits/8)].

    Raises: ValueError where a word has bits that the layout does not store, or an idx that the seed does not give.
    """
    parsed = parse(layout)
    packed = _pack(words, parsed)
    if not torch.equal(unpack_words(packed, parsed, in_features, seed, row0, k0), words):
        raise ValueError(f"codes: words hold bits (or a seeded idx) that {layout} with seed {seed} does not store")
    return packed


def unpack(packed: Tensor, *, layout: str, in_features: int, seed: int = 0, row0: int = 0, k0: int = 0) -> Tensor:
    """uint8 [m, ceil(K*M*bits/8)] as int32 words [m, K, M].

    Raises: ValueError where padding bits are not zero.
    """
    parsed = parse(layout)
    words = unpack_words(packed, parsed, in_features, seed, row0, k0)
    if not torch.equal(_pack(words, parsed), packed):
        raise ValueError("codes: padding bits of packed codes must be zero")
    return words
