"""How time grows with each size alone: rows m, columns n, tokens T, group g, stages M, on log axes with the line that the operation count predicts.

From a middle shape one size runs from small to large, neighbours a step apart that is no multiple of a tile. A cliff is a size at which an operation takes
more than 1.3 times what it takes at the next larger one; the table names them. Operations: the multiply-adds of the path that runs, tables 256 n T M + m K M T,
or m n T where the weight is decoded. Warm, one call after the other.
"""

from __future__ import annotations

import functools

import harness
import torch

from rbe_torch import Layout, _ops
from rbe_torch.codes import for_kernels, random_words

CLIFF = 1.3
MIDDLE = {"m": 1536, "n": 1536, "tokens": 96}
RUNS = {
    "m": [96, 160, 256, 384, 640, 1000, 1536, 2500, 4096],
    "n": [96, 160, 256, 384, 640, 1000, 1536, 2500, 4096],
    "tokens": [1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64, 96, 160, 256, 512],
    "g": [1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 100, 128, 256],
    "stages": [1, 2, 3, 4, 6, 8],
}
CASES = [("rbe22", 64, 1, "exact"), ("rbe8", 8, 2, "exact"), ("rbe8", 8, 2, "fast"), ("rbe16s", 8, 1, "exact")]


def layout_of(field: str, group: int, stages: int) -> Layout:
    return Layout.parse(f"{field}{'' if stages == 1 else f'x{stages}'}_g{group}")


def operations(layout: Layout, m: int, n: int, tokens: int, path: str) -> float:
    """Multiply-adds of the path, by the words that describe it."""
    if "table" in path:
        return layout.stages * tokens * (256.0 * n + m * layout.groups(n))
    return float(m) * n * tokens


def measure(field: str, group: int, stages: int, accuracy: str, m: int, n: int, tokens: int, seconds: float) -> tuple[float, float]:
    """Seconds of a call, and its operations."""
    layout = layout_of(field, group, stages)
    words = random_words(layout, m, n, 0, torch.Generator().manual_seed(0))
    keywords = {"layout": str(layout), "in_features": n}
    codes = for_kernels(torch.ops.rbe.pack(words, **keywords), m, layout)
    basis, gain, x = torch.randn(layout.basis_shape), torch.rand(m) + 0.5, torch.randn(tokens, n)
    timing = harness.race({"rbe": [lambda: torch.ops.rbe.linear_inference(x, codes, basis, gain, accuracy=accuracy, **keywords)]}, seconds)["rbe"]
    return timing.minimum, operations(layout, m, n, tokens, _ops.describe_linear(str(layout), m, n, tokens, accuracy=accuracy))


def run_case(field: str, group: int, stages: int, accuracy: str, size: str, machine: harness.Machine, seconds: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for value in RUNS[size]:
        shape = {**MIDDLE, "g": group, "stages": stages, size: value}
        time, count = measure(field, shape["g"], shape["stages"], accuracy, shape["m"], shape["n"], shape["tokens"], seconds / len(RUNS[size]))
        rows.append({"layout": str(layout_of(field, group, stages)), "class": accuracy, "size": size, "value": value, "ms": f"{time * 1e3:.4f}",
                     "ps an operation": f"{time / count * 1e12:.2f}", "cliff": ""})
    for row, larger in zip(rows, rows[1:], strict=False):
        work = float(larger["value"]) / float(row["value"]) if size in ("m", "n", "tokens", "stages") else 1.0
        ratio = float(row["ms"]) * work / float(larger["ms"])  # more than 1: slower a unit of the size than the next one
        if size != "g" and float(row["ms"]) > CLIFF * float(larger["ms"]):
            row["cliff"] = f"{float(row['ms']) / float(larger['ms']):.2f} times the next"
        row["over next, per unit"] = f"{ratio:.2f}" if size != "g" else ""
    return rows


def plot(rows: list[dict[str, object]], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = plt.subplots(1, len(sizes), figsize=(4 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for key in dict.fromkeys((row["layout"], row["class"]) for row in rows if row["size"] == size):
            points = [(row["value"], float(row["ms"])) for row in rows if (row["size"], row["layout"], row["class"]) == (size, *key)]
            (line,) = axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=" ".join(key))
            if size in ("m", "n", "tokens", "stages"):  # proportional, through the largest
                last = points[-1]
                axis.plot([p[0] for p in points], [last[1] * p[0] / last[0] for p in points], linestyle=":", linewidth=0.8, color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel=size)
    axes[0][0].set_ylabel("ms")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    cases = {}
    for field, group, stages, accuracy in CASES:
        for size in RUNS:
            if (size == "g" and field == "rbe16s") or (size == "stages" and field == "rbe22"):
                continue
            run = functools.partial(run_case, field, group, stages, accuracy, size, seconds=max(arguments.seconds, 4.0))
            cases[f"{layout_of(field, group, stages)} {accuracy} {size}"] = run
    rows, path = harness.run_cases(arguments, "growth", cases)
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
