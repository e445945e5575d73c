"""Forward + backward of a layer in training: rbe::linear and rbe::linear_backward with new amplitudes every step, against dense float32.

Counted for RBE: dx, dbasis, dgain, dbias, damplitude, and every relayout (unpacking, sorting) that a step makes, since scales change every
step. Counted for dense: y, dx, dW, dbias, each by the faster of the two orders of its matrix product. No autograd overhead in either.
"""

from __future__ import annotations

import functools

import harness
import torch
import torch.nn.functional as F

from rbe_torch import Layout

SIZES = [(4096, 4096)]
FULL_SIZES = [(768, 768), (3072, 768), (4096, 4096), (11008, 4096)]
LAYOUTS = ["rbe22_g32", "rbe22_g64", "rbe22_g128"]
FULL_LAYOUTS = [*LAYOUTS, "rbe22_g16", "rbe32_g64", "rbe9r_g16"]
TOKENS = [512]
FULL_TOKENS = [64, 512, 2048]
TOLERANCE = 2e-5  # largest error over the largest entry, against float64


def words(layout: Layout, m: int, n: int) -> torch.Tensor:
    """Random idx on the curve of training, exp(r) - 1; the amplitude argument brings sign and size."""
    idx = torch.randint(0, 256, (m, layout.groups(n), layout.stages), dtype=torch.int32)
    return idx << 10 | 7 << 18


def bound_seconds(layout: Layout, m: int, n: int, tokens: int, machine: harness.Machine) -> float:
    """Forward: table and gather. Backward: table again, gather twice (dscale, dP), dP to dx and to dbasis."""
    table, gather = 256 * n * tokens, m * layout.groups(n) * tokens
    return layout.stages * (4 * table + 3 * gather) / machine.fma_per_second


def run_case(text: str, m: int, n: int, tokens: int, machine: harness.Machine, seconds: float) -> dict[str, object]:
    layout = Layout.parse(text)
    x, dy, weight, bias = torch.randn(tokens, n), torch.randn(tokens, m), torch.randn(m, n), torch.randn(m)
    basis, gain = torch.randn(layout.stages, 256, layout.group), torch.rand(m) + 0.5
    amplitudes = [torch.rand(m, layout.groups(n), layout.stages) * 1.9 - 0.95 for _ in range(4)]
    keywords: dict[str, object] = {"layout": text, "in_features": n}
    codes = words(layout, m, n)
    if layout.fields == "rbe9r":
        packed = torch.zeros(m, layout.packed_row_bytes(n), dtype=torch.uint8)
        codes = torch.ops.rbe.unpack(packed, **keywords)
    packed = torch.ops.rbe.pack(codes, **keywords)

    def rbe(a: torch.Tensor):
        y = torch.ops.rbe.linear_inference(x, packed, basis, gain, bias, a, **keywords)
        return y, torch.ops.rbe.linear_backward(dy, x, packed, basis, gain, bias, a, **keywords)

    y, grads = rbe(amplitudes[0])
    exact = [t.double() for t in (dy, x)], [t.double() for t in (basis, gain, bias, amplitudes[0])]
    want = torch.ops.rbe.linear_backward(*exact[0], packed, *exact[1], **keywords)
    for name, a, b in zip(("dx", "dbasis", "dgain", "dbias", "damplitude"), grads, want, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        assert error < TOLERANCE, f"{text} {m}x{n} {name}: error {error}"

    timings = harness.race(
        {
            "y": [lambda: F.linear(x, weight, bias)],
            "y by mm": [lambda: torch.addmm(bias[:, None], weight, x.T)],
            "dx": [lambda: dy @ weight],
            "dx by mm": [lambda: weight.T @ dy.T],
            "dw": [lambda: dy.T @ x],
            "dw by mm": [lambda: x.T @ dy],
            "db": [lambda: dy.sum(0)],
            "rbe": [lambda a=a: rbe(a) for a in amplitudes],
        },
        seconds,
    )

    def dense(statistic: str) -> float:
        pick = lambda name: min(getattr(timings[name], statistic), getattr(timings[f"{name} by mm"], statistic))  # noqa: E731
        return pick("y") + pick("dx") + pick("dw") + getattr(timings["db"], statistic)

    rbe_time = timings["rbe"]
    return {
        "layout": text, "size": f"{m}x{n}", "tokens": tokens,
        "dense ms": f"{dense('minimum') * 1e3:.2f}", "rbe ms": f"{rbe_time.minimum * 1e3:.2f}",
        "speed-up": f"{dense('minimum') / rbe_time.minimum:.2f}", "by median": f"{dense('median') / rbe_time.median:.2f}",
        "share of bound": f"{bound_seconds(layout, m, n, tokens, machine) / rbe_time.minimum:.0%}",
    }  # fmt: skip


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    cases = {
        f"{text} {m}x{n} {tokens}": functools.partial(run_case, text, m, n, tokens, seconds=max(arguments.seconds, 3.0))
        for m, n in (FULL_SIZES if arguments.full else SIZES)
        for text in (FULL_LAYOUTS if arguments.full else LAYOUTS)
        for tokens in (FULL_TOKENS if arguments.full else TOKENS)
    }
    harness.run_cases(arguments, "backward", cases)


if __name__ == "__main__":
    main()
