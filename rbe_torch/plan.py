"""plan: what a model would weigh in each layout, from its configuration alone, with every byte counted."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .layout import Layout
from .replace import Found, Patterns, dense_weight, features, find_linears, stored_bytes

# From 1 to 4 bits for trained models, then those that are for training or fine-tuning in codes.
LAYOUTS = ("rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+lr8", "rbe8x3_g8", "rbe8x4_g8", "rbe22_g8", "rbe9r_g16", "rbe22_g16", "rbe22_g64",
           "rbe32_g64", "rbe22_g128")


@dataclass(frozen=True)
class PlanRow:
    """One layout. All sizes in bytes."""

    layout: str
    linears: int  # codes, gain, residual and basis of the converted layers
    model: int  # linears and everything else
    bits_per_weight: float
    purpose: str


@dataclass(frozen=True)
class Plan:
    rows: list[PlanRow]
    converted: int
    skipped: list[tuple[str, str]]  # name, reason
    weights: int
    dense_linears: int
    dense_model: int

    @property
    def rest(self) -> int:
        """Bytes that no layout touches."""
        return self.dense_model - self.dense_linears


def plan(model: nn.Module, layouts: tuple[str, ...] = LAYOUTS, include: Patterns = None, exclude: Patterns = None) -> Plan:
    """Sizes of `model`, which may be on the meta device, in each layout; which layers are converted is what `compress` would convert.

    The rest of the model keeps its dtype, as in a saved checkpoint, whose header (names, hashes) comes on top: some kilobytes.
    """
    found = find_linears(model, include, exclude)
    chosen = [entry for entry in found if entry.convertible]
    weights = [dense_weight(entry.module) for entry in chosen]
    dense_linears = sum(weight.numel() * weight.element_size() for weight in weights)
    dense_model = stored_bytes(model)
    count = sum(weight.numel() for weight in weights)
    rows = []
    for text in layouts:
        layout = Layout.parse(text)
        linears = sum(_bytes(entry, layout) for entry in chosen) + layout.basis_bytes
        rows.append(PlanRow(str(layout), linears, dense_model - dense_linears + linears, 8 * linears / count, _purpose(layout)))
    return Plan(rows, len(chosen), [(entry.name, entry.reason) for entry in found if not entry.convertible], count, dense_linears, dense_model)


def _bytes(entry: Found, layout: Layout) -> int:
    n, m = features(entry.module)
    return layout.bytes(m, n, basis=False)


def _purpose(layout: Layout) -> str:
    return "training, fine-tuning" if layout.has_amplitude else "compress"
