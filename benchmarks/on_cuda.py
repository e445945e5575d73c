"""On a CUDA device: coded products against dense bfloat16 and its torch.compile, by layout, size and tokens.

Each contestant is captured in a CUDA graph, so launches cost what they cost a server, and timed with events; also with backward.
Up to 16 tokens weights are cold: as many copies take turns inside the graph as no cache holds. A case is verified against the decoded
weight before it is timed. The share of a row is of what bounds it: bytes of the codes at the measured read rate (cold), or the dense layer's
multiply-adds at the measured bfloat16 rate. (Not called cuda.py: torch imports a package of that name.)
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

from rbe_torch import Layout, show_config

# (layout, out_features, in_features, tokens, with backward): the goals of docs/cuda.md
CASES = [
    ("rbe8x2_g8", 8192, 8192, 1, False), ("rbe8x2_g8", 8192, 8192, 4, False), ("rbe8x2_g8", 8192, 8192, 16, False),
    ("rbe16s_g8", 8192, 8192, 1, False), ("rbe16s_g8", 8192, 8192, 16, False), ("rbe22_g64", 8192, 8192, 1, False),
    ("rbe22_g64", 4096, 4096, 4096, False), ("rbe22_g64", 4096, 4096, 4096, True),
    ("rbe22_g128", 4096, 4096, 4096, False), ("rbe22_g128", 4096, 4096, 4096, True),
    ("rbe8x2_g8", 8192, 8192, 2048, False), ("rbe16s_g8", 8192, 8192, 2048, False), ("rbe8x2_g8", 4096, 4096, 2048, True),
]  # fmt: skip
COLD_TOKENS = 16
COLD_BYTES = 512 << 20  # more than the 50 MB of an H100's second-level cache, several times
TOLERANCE = 5e-2  # of the largest output: bfloat16 tables and weights
REPLAYS = 30


@dataclass
class Device:
    """What a result was measured on, and the two rates that bound it."""

    name: str
    torch: str
    cuda: str
    config: str
    read_bytes_per_second: float
    fma_per_second: float


def replay_seconds(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """Minimum and median seconds of one call, all captured in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    samples = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e3 / len(calls))
    return min(samples), statistics.median(samples)


def measure_device(size: int = 8192, cold_bytes: int = COLD_BYTES) -> Device:
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    big = torch.randn(cold_bytes // 4, device="cuda")
    fma = size**3 / replay_seconds([lambda: a @ a])[0]
    return Device(torch.cuda.get_device_name(), torch.__version__, str(torch.version.cuda), str(show_config()["cuda"]),
                  cold_bytes / replay_seconds([lambda: big.sum()])[0], fma)  # fmt: skip


def with_backward(f: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], dy: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(f(*leaves), leaves, dy)


def run_case(text: str, m: int, n: int, tokens: int, backward: bool, device: Device, cold_bytes: int = COLD_BYTES) -> dict[str, object]:
    """A row: every contestant's seconds for one product, after a check against the decoded weight."""
    layout = Layout.parse(text)
    row_bytes = layout.packed_row_bytes(n)
    cold = tokens <= COLD_TOKENS
    many = lambda each: max(2, math.ceil(cold_bytes / each)) if cold else 1
    x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
    basis, gain = torch.randn(layout.stages, 256, layout.group, device="cuda"), torch.rand(m, device="cuda") + 0.5
    codes = [torch.randint(0, 256, (m, row_bytes), device="cuda", dtype=torch.uint8) for _ in range(many(m * row_bytes))]
    dense = [torch.randn(m, n, device="cuda", dtype=torch.bfloat16) for _ in range(many(2 * m * n))]
    keywords = {"layout": text, "in_features": n}

    weight = torch.ops.rbe.decode(codes[0], basis, gain, **keywords)
    want = x.float() @ weight.T
    error = ((torch.ops.rbe.linear_inference(x, codes[0], basis, gain, **keywords) - want).abs().max() / want.abs().max()).item()
    assert error < TOLERANCE, f"{text} {m}x{n}, {tokens} tokens: error {error}"
    del weight, want

    compiled = torch.compile(F.linear)
    if backward:
        leaves = [t.requires_grad_() for t in (x, basis, gain)]
        amplitude = None
        if layout.fields not in ("rbe8", "rbe16s"):
            amplitude = torch.rand(m, layout.groups(n), layout.stages, device="cuda").mul_(1.8).sub_(0.9).requires_grad_()
        dy = torch.randn(tokens, m, device="cuda", dtype=torch.bfloat16)
        given = [*leaves, amplitude] if amplitude is not None else leaves
        product = lambda x, b, g, a=None: torch.ops.rbe.linear(x, codes[0], b, g, None, a, **keywords)
        w = dense[0].requires_grad_()
        calls = {
            "rbe": [with_backward(product, given, dy)],
            "dense": [with_backward(F.linear, [x, w], dy)],
            "compiled": [with_backward(compiled, [x, w], dy)],
        }
    else:
        calls = {
            "rbe": [lambda c=c: torch.ops.rbe.linear_inference(x, c, basis, gain, **keywords) for c in codes],
            "dense": [lambda w=w: F.linear(x, w) for w in dense],
            "compiled": [lambda w=w: compiled(x, w) for w in dense],
        }
    seconds = {name: replay_seconds(each) for name, each in calls.items()}
    best = min(seconds["dense"][0], seconds["compiled"][0])
    floor = m * row_bytes / device.read_bytes_per_second if cold else tokens * m * n * (3 if backward else 1) / device.fma_per_second
    row: dict[str, object] = {
        "layout": text,
        "size": f"{m}x{n}",
        "tokens": tokens,
        "pass": "f + b" if backward else "forward",
        "error": f"{error:.1e}",
    }
    for name, (low, middle) in seconds.items():
        row[f"{name} us"] = f"{low * 1e6:.1f}"
        row[f"{name} median"] = f"{middle * 1e6:.1f}"
    return row | {
        "speed-up": f"{best / seconds['rbe'][0]:.2f}",
        "bound": "read" if cold else "dense",
        "share": f"{floor / seconds['rbe'][0]:.2f}",
    }


def draw(rows: list[dict[str, object]], path: Path) -> None:
    """Bars: speed-up over the faster dense contestant, one a case, with the line at 1."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1))
    names = [f"{r['layout']} {r['size']} {r['tokens']} {r['pass']}" for r in rows]
    axes.barh(names, [float(str(r["speed-up"])) for r in rows])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the faster of bfloat16 F.linear and its torch.compile")
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON and the picture")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--divide", type=int, default=1, help="sizes and tokens divided by this, to try the program; times then mean nothing")
    arguments = parser.parse_args()
    by = arguments.divide
    if by < 1:
        parser.error(f"--divide was {by}; must be at least 1")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/on_cuda.py: needs a CUDA device; torch finds none")
    torch.manual_seed(0)
    chosen = [case for case in CASES if arguments.only in " ".join(map(str, case))]
    if not chosen:
        raise SystemExit(f"--only {arguments.only!r} leaves no case")
    cold_bytes = COLD_BYTES // by**2
    device = measure_device(8192 // by, cold_bytes)
    print(f"{device.name}, torch {device.torch}, CUDA {device.cuda}; measured: read {device.read_bytes_per_second / 1e9:.0f} GB/s, "
          f"bfloat16 {device.fma_per_second / 1e12:.0f} T multiply-adds/s")  # fmt: skip
    rows = []
    for layout, m, n, tokens, backward in chosen:
        rows.append(run_case(layout, m // by, n // by, max(1, tokens // by), backward, device, cold_bytes))
        torch.cuda.empty_cache()
        print(*rows[-1].values(), sep="  ", flush=True)
    print("\n" + harness.table(rows, list(rows[0])))
    path = harness.write(arguments.out, "cuda", device, rows)
    draw(rows, path.with_suffix(".png"))
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
