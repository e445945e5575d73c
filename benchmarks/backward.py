"""Forward + backward of a layer in training: rbe::linear and rbe::linear_backward with new amplitudes every step, against dense float32.

Counted for RBE: dx, dbasis, dgain, dbias, damplitude, and every relayout (unpacking, sorting) that a step makes, since scales change every
step. Counted for dense: y, dx, dW, dbias, each by the faster of the two orders of its matrix product. No autograd overhead in either.
Both accuracy classes take turns with dense in one race; results are first checked against dense products of the decoded layer in float64.
"""

from __future__ import annotations

import functools
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

from rbe_torch import Layout

SIZES = [(4096, 4096, 512), (4096, 4096, 2048), (768, 768, 512), (3072, 768, 512)]
FULL_SIZES = [*SIZES, (11008, 4096, 512), (4096, 4096, 64), (768, 768, 2048), (3072, 768, 2048)]
LAYOUTS = ["rbe22_g32", "rbe22_g64", "rbe22_g128"]
FULL_LAYOUTS = [*LAYOUTS, "rbe22_g16", "rbe32_g64", "rbe9r_g16", "rbe4r_g64"]
CLASSES = ("exact", "fast")
# Largest error over the largest entry, and root mean square error over that of the entries (docs/operators.md), against float64.
LARGEST = {"exact": 2e-5, "fast": 1e-2}
MEAN = {"exact": dict.fromkeys(("y", "dx", "dbasis", "dgain", "dbias", "damplitude"), 2e-6),
        "fast": {"y": 3e-3, "dx": 2e-3, "dbasis": 3e-3, "dgain": 4e-3, "dbias": 2e-6, "damplitude": 4e-3}}  # fmt: skip


def words(layout: Layout, m: int, n: int) -> torch.Tensor:
    """Random idx on the curve of training, exp(r) - 1; the amplitude argument brings sign and size."""
    idx = torch.randint(0, 256, (m, layout.groups(n), layout.stages), dtype=torch.int32)
    return idx << 10 | 7 << 18


def bound_seconds(layout: Layout, m: int, n: int, tokens: int, accuracy: str, machine: harness.Machine) -> float:
    """Forward: table and gather. Backward: table again, gather twice (dscale, dP), dP to dx and to dbasis. At the measured rate of float32 products; float16
    sums at twice that; on a matrix unit (AMX) a product of bfloat16 pieces at 17 times that, six of them for an exact product, seven for all fast ones."""
    table, gather = 256 * n * tokens, m * layout.groups(n) * tokens
    half = accuracy == "fast" and "avx512_fp16" in machine.cpu
    tables = (4 if "amx_tile" not in machine.cpu else 7 / 17 if half else 4 * 6 / 17) * table
    return layout.stages * (tables + 3 * gather / (2 if half else 1)) / machine.fma_per_second


def check(name: str, accuracy: str, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for key, value in got.items():
        error = value.double() - want[key]
        largest, mean = (error.abs().max() / want[key].abs().max()).item(), (error.norm() / want[key].norm()).item()
        if not (largest < LARGEST[accuracy] and mean < MEAN[accuracy][key]):
            raise SystemExit(f"{name} {accuracy} {key}: wrong by {largest:.1e} of the largest entry, {mean:.1e} in the mean")


def true_values(dy: torch.Tensor, x: torch.Tensor, packed: torch.Tensor, tensors: list[torch.Tensor], keywords: dict) -> dict[str, torch.Tensor]:
    """y and all gradients in float64, by dense products of W and the derivative of decoding it."""
    dy, x = dy.double(), x.double()
    basis, gain, bias, amplitude = (t.double().requires_grad_() for t in tensors)
    weight = torch.ops.rbe.decode(packed, basis, gain, amplitude, **keywords)
    dbasis, dgain, damplitude = torch.autograd.grad(weight, (basis, gain, amplitude), dy.T @ x)
    weight = weight.detach()
    y = torch.addmm(bias.detach(), x, weight.T)
    return {"y": y, "dx": dy @ weight, "dbasis": dbasis, "dgain": dgain, "dbias": dy.sum(0), "damplitude": damplitude}


def run_case(text: str, m: int, n: int, tokens: int, machine: harness.Machine, seconds: float) -> list[dict[str, object]]:
    layout = Layout.parse(text)
    x, dy, weight, bias = torch.randn(tokens, n), torch.randn(tokens, m), torch.randn(m, n), torch.randn(m)
    basis, gain = torch.randn(layout.stages, 256, layout.group), torch.rand(m) + 0.5
    amplitudes = [torch.rand(m, layout.groups(n), layout.stages) * 1.9 - 0.95 for _ in range(4)]
    keywords: dict[str, object] = {"layout": text, "in_features": n}
    if layout.fields.endswith("r"):  # idx from a seed: any bits will do
        packed = torch.zeros(m, layout.packed_row_bytes(n), dtype=torch.uint8)
    else:
        packed = torch.ops.rbe.pack(words(layout, m, n), **keywords)

    def rbe(a: torch.Tensor, accuracy: str):
        y = torch.ops.rbe.linear_inference(x, packed, basis, gain, bias, a, **keywords, accuracy=accuracy)
        return y, *torch.ops.rbe.linear_backward(dy, x, packed, basis, gain, bias, a, **keywords, accuracy=accuracy)

    want = true_values(dy, x, packed, [basis, gain, bias, amplitudes[0]], keywords)
    for accuracy in CLASSES:
        got = dict(zip(("y", "dx", "dbasis", "dgain", "dbias", "damplitude"), rbe(amplitudes[0], accuracy), strict=True))
        check(f"{text} {m}x{n}", accuracy, got, want)
    del want

    timings = harness.race(
        {
            "y": [lambda: F.linear(x, weight, bias)],
            "y by mm": [lambda: torch.addmm(bias[:, None], weight, x.T)],
            "dx": [lambda: dy @ weight],
            "dx by mm": [lambda: weight.T @ dy.T],
            "dw": [lambda: dy.T @ x],
            "dw by mm": [lambda: x.T @ dy],
            "db": [lambda: dy.sum(0)],
            **{accuracy: [lambda a=a, c=accuracy: rbe(a, c) for a in amplitudes] for accuracy in CLASSES},
        },
        seconds,
    )

    def dense(statistic: str) -> float:
        pick = lambda name: min(getattr(timings[name], statistic), getattr(timings[f"{name} by mm"], statistic))  # noqa: E731
        return pick("y") + pick("dx") + pick("dw") + getattr(timings["db"], statistic)

    return [
        {
            "layout": text, "size": f"{m}x{n}", "tokens": tokens, "class": accuracy,
            "dense ms": f"{dense('minimum') * 1e3:.2f}", "rbe ms": f"{timings[accuracy].minimum * 1e3:.2f}",
            "speed-up": f"{dense('minimum') / timings[accuracy].minimum:.2f}", "by median": f"{dense('median') / timings[accuracy].median:.2f}",
            "share of bound": f"{bound_seconds(layout, m, n, tokens, accuracy, machine) / timings[accuracy].minimum:.0%}",
        }
        for accuracy in CLASSES
    ]  # fmt: skip


def plot(rows: list[dict], path: Path) -> None:
    """Speed-up over size and tokens, a bar a layout and class."""
    plt = harness.pyplot()
    if plt is None:
        return
    places = list(dict.fromkeys((row["size"], row["tokens"]) for row in rows))
    kinds = list(dict.fromkeys((row["layout"], row["class"]) for row in rows))
    figure, axis = plt.subplots(figsize=(2.5 * len(places) + 3, 4))
    for i, kind in enumerate(sorted(kinds, key=lambda kind: kind[1])):
        bars = [(places.index((row["size"], row["tokens"])), float(row["speed-up"])) for row in rows if (row["layout"], row["class"]) == kind]
        at = [place + (i - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for place, _ in bars]
        axis.bar(at, [height for _, height in bars], 0.8 / len(kinds), label=" ".join(kind), hatch="" if kind[1] == "exact" else "//", edgecolor="white")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(ylabel="times faster than dense float32", title="forward + backward", xticks=range(len(places)))
    axis.set_xticklabels([f"{size}\n{tokens} tokens" for size, tokens in places])
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    cases = {
        f"{text} {m}x{n} {tokens}": functools.partial(run_case, text, m, n, tokens, seconds=max(arguments.seconds, 3.0))
        for m, n, tokens in (FULL_SIZES if arguments.full else SIZES)
        for text in (FULL_LAYOUTS if arguments.full else LAYOUTS)
    }
    rows, path = harness.run_cases(arguments, "backward", cases)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
