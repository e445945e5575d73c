"""What the scripts of this folder share: the schedule, a file of runs, the table's choice among rates and seeds, and pictures of loss against bytes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402

LINE, WIDTH = 9, 190  # of a name in a picture, in points


def cosine(optimiser: torch.optim.Optimizer, steps: int, warm_up: int, last: float = 0.0) -> torch.optim.lr_scheduler.LambdaLR:
    """Rates straight up in `warm_up` steps, on half a cosine down to `last` of them."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, share)


class Runs:
    """The rows of a JSON, written after each, so that a table can be made in pieces and by several processes. missing: what rows have that do not say."""

    def __init__(self, path: Path, **missing: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.missing = path, missing
        self.machine = self._read().get("machine") or asdict(harness.Machine.measure())

    def _read(self) -> dict:
        saved = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.rows = [{**self.missing, **row} for row in saved.get("rows", [])]
        return saved

    def holds(self, **wanted: object) -> bool:
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, object]) -> None:
        print(*row.values(), sep="  ", flush=True)
        self._read()
        self.rows.append(row)
        self.path.write_text(json.dumps({"machine": self.machine, "rows": self.rows}, indent=1) + "\n")


def at_best_rate(rows: Sequence[dict], rates: Sequence[str], loss: Callable[[dict], float]) -> tuple[list[dict], int]:
    """Of one contestant: its rows at the rate that most seeds ran at (of several such, the one of least mean loss), and how many rates were tried."""
    by_rate: dict[tuple, list[dict]] = {}
    for row in rows:
        by_rate.setdefault(tuple(row[key] for key in rates), []).append(row)
    return min(by_rate.values(), key=lambda group: (-len(group), sum(map(loss, group)) / len(group))), len(by_rate)


def spread(rows: Sequence[dict], key: str) -> dict[str, str]:
    """Mean and range, as columns of a table."""
    values = [row[key] for row in rows]
    return {key: f"{sum(values) / len(values):.3f}", "from": f"{min(values):.3f}", "to": f"{max(values):.3f}"}


@dataclass
class Panel:
    """A point a row of `table`, with its range where `ranges` says that "from" and "to" are those of y; `line`: a height to reach."""

    title: str
    table: Sequence[dict]
    x: str
    y: str
    xlabel: str
    ylabel: str
    ranges: bool = True
    line: float | None = None


def picture(panels: Sequence[Panel], path: Path) -> None:
    """Bytes on a log axis, ours red; names that would cover one another are moved apart."""
    plt = harness.pyplot()
    if plt is None:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(8 if len(panels) == 1 else 6 * len(panels), 5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for row in panel.table:
            y, ours = float(row[panel.y]), "rbe" in row["name"]
            low, high = (float(row[end]) for end in ("from", "to")) if panel.ranges else (y, y)
            axis.errorbar(row[panel.x], y, [[y - low], [high - y]], fmt="o" if ours else "s", color="C3" if ours else "C0", capsize=3)
        if panel.line is not None:
            axis.axhline(panel.line, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    figure.tight_layout()
    points = 72 / figure.dpi
    for axis, panel in zip(axes[0], panels, strict=True):
        placed: list[tuple[float, float]] = []
        for row in sorted(panel.table, key=lambda row: float(row[panel.y])):
            at = row[panel.x], float(row[panel.y])
            across, own = axis.transData.transform(at) * points
            height = max([own, *(other + LINE for place, other in placed if abs(place - across) < WIDTH and other + LINE > own - LINE)])
            placed.append((across, height))
            left = axis.transAxes.inverted().transform((across / points, 0))[0] > 0.6
            axis.annotate(row["name"], at, xytext=(-6 if left else 6, height - own), textcoords="offset points", va="center", ha="right" if left else "left", fontsize=7,
                          bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    figure.savefig(path, dpi=120)
