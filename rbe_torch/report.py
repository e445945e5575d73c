"""Report: what became of every layer of a model, with every byte counted. Prints as a table; `.to_json()` for machines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from .linear import RBELinear


@dataclass
class LayerRow:
    """One linear layer. Bytes are those on disk; the basis is counted in Report.basis_bytes, once however many layers share it."""

    name: str
    kind: str  # class of the module that was found
    out_features: int
    in_features: int
    layout: str | None = None  # None: skipped
    reason: str = ""  # why it was skipped
    code_bytes: int = 0
    gain_bytes: int = 0
    residual_bytes: int = 0
    basis: int | None = None  # which of Report.bases
    relative_error: float | None = None  # |W - reconstruction|^2 / |W|^2
    output_error: float | None = None  # calibrated: |W x - output|^2 / |W x|^2 on sequences that were not fitted, z behind compressed layers
    damping: float | None = None  # calibrated: of X^T X, the one that the held-out sequences chose
    seconds: float | None = None
    note: str = ""  # anything else worth a line

    @property
    def converted(self) -> bool:
        return self.layout is not None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def own_bytes(self) -> int:
        """Codes, gain and residual, without the basis."""
        return self.code_bytes + self.gain_bytes + self.residual_bytes


@dataclass
class Report:
    """Rows of a conversion. `bits_per_weight` counts codes, gain, residual, and each distinct basis once."""

    rows: list[LayerRow] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)  # bytes of each distinct basis table: fp16, or the seed that gives it
    other_bytes: int = 0  # everything else the model stores: embeddings, norms, biases, skipped layers
    seconds: float | None = None  # of the whole run
    notes: list[str] = field(default_factory=list)  # warnings that belong to the whole model
    frontier: list[dict[str, Any]] = field(default_factory=list)  # of a budget: bytes, bits a weight and estimated loss of every mix considered
    tuning: dict[str, Any] | None = None  # what fine-tuning did: losses before and after, steps, seconds
    _tables: list[Any] = field(default_factory=list, repr=False)

    def add_converted(self, name: str, layer: RBELinear, kind: str = "Linear", relative_error: float | None = None,
                      seconds: float | None = None, note: str = "", output_error: float | None = None, damping: float | None = None) -> LayerRow:
        """Adds the row of a layer that now is `layer`; its basis is recognised by identity."""
        layout, m, n = layer.layout, layer.out_features, layer.in_features
        row = LayerRow(name, kind, m, n, str(layout), "", m * layout.packed_row_bytes(n), 2 * m,
                       layout.residual_bytes(m, n) + (8 if layout.seeded else 0), self._basis_index(layer),
                       relative_error, output_error, damping, seconds, note)
        self.rows.append(row)
        return row

    def add_skipped(self, name: str, module: nn.Module, reason: str) -> LayerRow:
        """Adds the row of a module that was left alone."""
        m, n = weight_shape(module)
        row = LayerRow(name, type(module).__name__, m, n, None, reason)
        self.rows.append(row)
        return row

    def _basis_index(self, layer: RBELinear) -> int:
        from .seeded import basis_seed_of

        for index, table in enumerate(self._tables):
            if table is layer.basis:
                return index
        self._tables.append(layer.basis)
        drawn = basis_seed_of(layer.basis, layer.layout, layer._buffers.get("basis_seed")) is not None
        self.bases.append(4 if drawn else layer.layout.basis_bytes)  # a seed of 32 bits
        return len(self._tables) - 1

    @property
    def converted(self) -> list[LayerRow]:
        return [row for row in self.rows if row.converted]

    @property
    def skipped(self) -> list[LayerRow]:
        return [row for row in self.rows if not row.converted]

    @property
    def weights(self) -> int:
        """Weights of the converted layers."""
        return sum(row.weights for row in self.converted)

    @property
    def basis_bytes(self) -> int:
        return sum(self.bases)

    @property
    def compressed_bytes(self) -> int:
        """Codes, gain, residual and basis of the converted layers."""
        return sum(row.own_bytes for row in self.converted) + self.basis_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the converted layers, with everything counted."""
        return 8 * self.compressed_bytes / self.weights if self.weights else 0.0

    @property
    def relative_error(self) -> float | None:
        """Mean of the layers' relative errors, weighted by their number of weights; None where none was measured."""
        rows = [row for row in self.converted if row.relative_error is not None]
        total = sum(row.weights for row in rows)
        return sum(row.relative_error * row.weights for row in rows) / total if total else None

    def layer_bits(self, row: LayerRow) -> float:
        """Bits a weight of one row; each layer pays for its basis in proportion to its weights."""
        sharing = sum(other.weights for other in self.converted if other.basis == row.basis)
        basis = self.bases[row.basis] * row.weights / sharing
        return 8 * (row.own_bytes + basis) / row.weights

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for row in self.rows:
            entry = asdict(row) | {"converted": row.converted}
            if row.converted:
                entry["bits_per_weight"] = self.layer_bits(row)
            rows.append(entry)
        return {
            "layers": rows, "bases": list(self.bases), "notes": list(self.notes), "seconds": self.seconds,
            "converted": len(self.converted), "skipped": len(self.skipped), "weights": self.weights,
            "bits_per_weight": self.bits_per_weight, "relative_error": self.relative_error,
            "compressed_bytes": self.compressed_bytes, "basis_bytes": self.basis_bytes, "other_bytes": self.other_bytes,
            "float32_bytes": 4 * self.weights, "worst": [row.name for row in self.worst()], "frontier": self.frontier, "tuning": self.tuning,
        }

    def to_json(self, path: str | None = None) -> str:
        """The report as a JSON string; also written to `path` if given."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")
        return text

    def worst(self, count: int = 5) -> list[LayerRow]:
        """The converted layers that lose most: by output error where the run was calibrated, else by relative error."""
        def lost(row: LayerRow) -> float:
            value = row.output_error if row.output_error is not None else row.relative_error
            return -1.0 if value is None else value

        return sorted(self.converted, key=lost, reverse=True)[:count]

    def to_html(self, path: str) -> None:
        """Writes the report as one HTML page that needs nothing else: summary, bars of every layer's error, frontier, layers left alone. No times:
        a seed makes the same page."""
        from .report_page import page

        with open(path, "w", encoding="utf-8") as file:
            file.write(page(self))

    def __str__(self) -> str:
        calibrated = any(row.output_error is not None for row in self.converted)
        header = ["layer", "shape", "layout", "bits/weight", "rel. error", "output error", "seconds"]
        table = [header if calibrated else [cell for cell in header if cell != "output error"]]
        for row in self.converted:
            cells = [row.name, f"{row.out_features}x{row.in_features}", row.layout, f"{self.layer_bits(row):.3f}", _number(row.relative_error, ".4f")]
            cells += [_number(row.output_error, ".4f")] if calibrated else []
            table.append([*cells, _number(row.seconds, ".2f")])
        width = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
        lines = []
        for line in table:
            cells = [cell.ljust(width[c]) if c < 3 else cell.rjust(width[c]) for c, cell in enumerate(line)]
            lines.append("  ".join(cells).rstrip())
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(self.summary())
        if self.other_bytes:
            lines.append(f"everything else the model stores: {self.other_bytes / 1e6:.2f} MB")
        if len(self.converted) > 1 and self.relative_error is not None:
            lines.append("lose most: " + ", ".join(f"{row.name} ({_number(row.output_error if calibrated else row.relative_error, '.4f')})" for row in self.worst()))
        if self.tuning is not None:
            lines.append(f"fine-tuning: {self.tuning['steps']} steps, {self.tuning['seconds']:.0f} s, loss on batches not trained on {self.tuning['before']:.5f} -> "
                         f"{self.tuning['after']:.5f}" + ("" if self.tuning["kept"] else ", which is no gain: everything was put back"))
        if self.frontier:
            lines.append("mixes considered (* chosen), losses of the layers added up:")
            lines += frontier_lines(self.frontier)
        if self.skipped:
            lines.append(f"{len(self.skipped)} left alone:")
            name = max(len(row.name) for row in self.skipped)
            lines += [f"  {row.name.ljust(name)}  {row.kind}  {row.reason}" for row in self.skipped]
        lines += [f"{row.name}: {row.note}" for row in self.converted if row.note]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def summary(self, timed: bool = True) -> str:
        """One line: layers, bytes, bits a weight, relative error, and if `timed` seconds."""
        return (
            f"{len(self.converted)} converted, {self.weights:,} weights: {4 * self.weights / 1e6:.2f} MB in float32, "
            f"{self.compressed_bytes / 1e6:.2f} MB now, {self.bits_per_weight:.3f} bits a weight "
            f"(basis {self.basis_bytes / 1e6:.3f} MB, {len(self.bases)} table{'' if len(self.bases) == 1 else 's'})"
            + (f", relative error {self.relative_error:.4f}" if self.relative_error is not None else "")
            + (f", {self.seconds:.1f} s" if timed and self.seconds is not None else "")
        )


def frontier_lines(frontier: list[dict[str, Any]], most: int = 12) -> list[str]:
    """Some of the mixes, evenly spaced and with the chosen one, a line each."""
    step = max(1, -(-len(frontier) // most))
    shown = [row for index, row in enumerate(frontier) if index % step == 0 or index == len(frontier) - 1 or row.get("chosen")]
    return [f"{'*' if row.get('chosen') else ' '} {row['bits_per_weight']:7.3f} bits  {row['bytes'] / 1e6:9.2f} MB  loss {row['loss']:.5g}  "
            + ", ".join(f"{count} x {layout}" for layout, count in sorted(row["layers"].items())) for row in shown]


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear-like or embedding module; (0, 0) where it has neither."""
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return int(module.nf), int(module.nx)
    if hasattr(module, "num_embeddings"):
        return int(module.num_embeddings), int(module.embedding_dim)
    if hasattr(module, "embed_dim"):
        return int(module.embed_dim), int(module.embed_dim)
    return 0, 0


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
