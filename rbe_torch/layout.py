"""Layouts: what a string such as `rbe22_g64` or `rbe8x2_g8+int8` means, and how many bytes a layer takes in it.

    <fields>[x<stages>]_g<group>[+int8 | +fp8 | +lr<rank> | +sp<fraction>]

The grammar and its limits are those of the C parser (ops/rbe.h); the two refuse the same strings.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

FIELD_BITS = {"rbe32": 32, "rbe22": 22, "rbe8": 8, "rbe16s": 16, "rbe9r": 9, "rbe4r": 4, "rbe2r": 2}
BASIS_VECTORS = 256
MAX_STAGES = 16
MAX_GROUP = 65536
MAX_RANK = 65535

_NUMBER = r"[1-9][0-9]*"
_PATTERN = re.compile(
    rf"(?P<fields>rbe32|rbe22|rbe8|rbe16s|rbe9r|rbe4r|rbe2r)(?:x(?P<stages>{_NUMBER}))?_g(?P<group>{_NUMBER})"
    rf"(?:\+(?P<residual>int8|fp8|lr(?P<rank>{_NUMBER})|sp(?P<fraction>0\.[0-9]{{1,15}})))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Layout:
    """A field layout, a group size, a number of stages and an optional residual. Hashable; `str(layout)` parses back to it."""

    fields: str
    group: int
    stages: int = 1
    residual: str | None = None  # None, "int8", "fp8", "lr8", "sp0.005"

    def __post_init__(self) -> None:
        parsed = _match(str(self))
        types = (type(self.fields), type(self.group), type(self.stages))
        if types != (str, int, int) or (parsed["fields"], int(parsed["group"]), int(parsed["stages"] or 1), parsed["residual"]) != (
            self.fields, self.group, self.stages, self.residual
        ):
            raise ValueError(f"layout: {self!r} is not a layout, expected plain str and int fields")

    @staticmethod
    def parse(text: str | Layout) -> Layout:
        """The layout that `text` names. ValueError if it names none."""
        if isinstance(text, Layout):
            return text
        if not isinstance(text, str):
            raise TypeError(f"layout: is a {type(text).__name__}, must be a str such as 'rbe22_g64' or a Layout")
        return _parse(text)

    def __str__(self) -> str:
        stages = f"x{self.stages}" if self.stages != 1 else ""
        return f"{self.fields}{stages}_g{self.group}" + (f"+{self.residual}" if self.residual else "")

    @property
    def bits(self) -> int:
        """Stored bits of one code."""
        return FIELD_BITS[self.fields]

    @property
    def seeded(self) -> bool:
        """True where idx is drawn from a seed instead of being stored."""
        return self.fields.endswith("r")

    @property
    def has_amplitude(self) -> bool:
        """True where a code has a scale of its own, which training can move."""
        return self.fields not in ("rbe8", "rbe16s")

    @property
    def rank(self) -> int:
        """Rank of a low-rank residual, otherwise 0."""
        return int(self.residual[2:]) if self.residual and self.residual.startswith("lr") else 0

    @property
    def fraction(self) -> float:
        """Fraction of entries that a sparse residual keeps, otherwise 0."""
        return float(self.residual[2:]) if self.residual and self.residual.startswith("sp") else 0.0

    @property
    def basis_shape(self) -> tuple[int, int, int]:
        return (self.stages, BASIS_VECTORS, self.group)

    @property
    def basis_bytes(self) -> int:
        """Bytes of one basis table, fp16."""
        return 2 * self.stages * BASIS_VECTORS * self.group

    @property
    def amp_unstored(self) -> int:
        """Lowest bits of amp that a code does not store: they are 100..0, the middle of the cell that the stored bits name."""
        return 9 - self.bits if self.seeded else 0

    def groups(self, in_features: int) -> int:
        """K = ceil(n / g)."""
        return -(-in_features // self.group)

    def codes_shape(self, m: int, n: int) -> tuple[int, int, int]:
        return (m, self.groups(n), self.stages)

    def packed_row_bytes(self, n: int) -> int:
        """Bytes of one packed row, ceil(K * M * bits / 8)."""
        return -(-self.groups(n) * self.stages * self.bits // 8)

    def sparse_columns(self, n: int) -> int:
        """Entries that a sparse residual keeps in each row."""
        return max(1, round(self.fraction * n)) if self.fraction else 0

    def residual_shapes(self, m: int, n: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, torch dtype name) of the tensors that hold the residual; empty without one."""
        if self.residual is None:
            return {}
        if self.residual == "int8":
            return {"residual": ((m, n), "int8"), "residual_scale": ((m,), "float32")}
        if self.residual == "fp8":
            return {"residual": ((m, n), "float8_e4m3fn"), "residual_scale": ((m,), "float32")}
        if self.rank:
            return {
                "residual": ((m, self.rank), "int8"),
                "residual_scale": ((self.rank,), "float32"),
                "residual_right": ((self.rank, n), "int8"),
                "residual_right_scale": ((self.rank,), "float32"),
            }
        kept = (m, self.sparse_columns(n))
        return {"residual": (kept, "float16"), "residual_right": (kept, "int32")}

    def residual_bytes(self, m: int, n: int) -> int:
        size = {"int8": 1, "float8_e4m3fn": 1, "float16": 2, "int32": 4, "float32": 4}
        total = 0
        for shape, dtype in self.residual_shapes(m, n).values():
            count = 1
            for extent in shape:
                count *= extent
            total += count * size[dtype]
        return total

    def bytes(self, m: int, n: int, basis: bool = True) -> int:
        """Bytes of an m x n weight on disk: packed codes, fp16 gain, residual, the seed's 8 bytes, and the fp16 basis if asked."""
        seed = 8 if self.seeded else 0
        return (m * self.packed_row_bytes(n) + 2 * m + self.residual_bytes(m, n) + seed
                + (self.basis_bytes if basis else 0))

    def bits_per_weight(self, m: int, n: int, basis_shared_by: int | None = None) -> float:
        """Bits a weight with everything counted. `basis_shared_by` layers of this size pay for one basis; None: this layer alone."""
        shared = 1 if basis_shared_by is None else basis_shared_by
        if m < 1 or n < 1 or shared < 1:
            raise ValueError(f"bits_per_weight: m={m}, n={n}, basis_shared_by={basis_shared_by}, each must be at least 1")
        return 8 * (self.bytes(m, n, basis=False) + self.basis_bytes / shared) / (m * n)


def _match(text: str) -> dict[str, str | None]:
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise ValueError(
            f"layout: {text!r} is not a layout, expected <rbe32|rbe22|rbe8|rbe16s|rbe9r|rbe4r|rbe2r>[x<stages>]_g<group>"
            "[+int8|+fp8|+lr<rank>|+sp<fraction>] such as 'rbe22_g64' or 'rbe8x2_g8'"
        )
    parts = found.groupdict()
    for name, limit in (("stages", MAX_STAGES), ("group", MAX_GROUP), ("rank", MAX_RANK)):
        digits = parts[name] or "1"
        if len(digits) > 9 or int(digits) > limit:
            raise ValueError(f"layout: {text!r} has {name} {digits}, must be 1 to {limit}")
    if parts["fields"] == "rbe16s" and parts["group"] != "8":
        raise ValueError(f"layout: {text!r} has group {parts['group']}, but rbe16s has eight signs a code and must have g8")
    if parts["fraction"] and not float(parts["fraction"]) > 0:
        raise ValueError(f"layout: {text!r} keeps the fraction {parts['fraction']}, must be above 0 and below 1")
    return parts


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Layout:
    parts = _match(text)
    return Layout(parts["fields"], int(parts["group"]), int(parts["stages"] or 1), parts["residual"])
