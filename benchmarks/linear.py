"""Forward products: torch.ops.rbe.linear against the faster of dense F.linear and mm(W, x^T), float32, by size, layout and tokens.

Up to 16 tokens weights are cold: dense weights and packed codes rotate through buffers that no cache holds. The bound of a row is what
the machine's measured rates allow: the bytes of the codes read once, or the multiply-adds of the algorithm, whichever takes longer.
"""

from __future__ import annotations

import functools

import harness
import torch
import torch.nn.functional as F

from rbe_torch import Layout
from rbe_torch.codes import for_kernels, random_words

SIZES = [(768, 768), (4096, 4096), (11008, 4096)]  # of the last, one token
FULL_SIZES = [(768, 768), (3072, 768), (4096, 4096), (11008, 4096)]
LAYOUTS = ["rbe22_g32", "rbe22_g64", "rbe22_g128", "rbe8x2_g8", "rbe8x4_g8", "rbe16s_g8"]
FULL_LAYOUTS = ["rbe22_g16", "rbe22_g32", "rbe22_g64", "rbe22_g128", "rbe32_g64", "rbe9r_g16", "rbe8_g8", "rbe8x2_g8", "rbe8x4_g8", "rbe16s_g8"]
TOKENS = [1, 4, 8, 16, 64, 512, 2048]
FULL_TOKENS = [1, 2, *TOKENS[1:]]
COLD_TOKENS = 16
# Largest error over the largest output against float64 of the decoded weight.
TOLERANCE = {"exact": 1e-5, "fast": 5e-2}


def random_codes(layout: Layout, m: int, n: int, copies: int) -> list[torch.Tensor]:
    """Random codes in the form that a layer holds, at as many places of memory."""
    packed = torch.ops.rbe.pack(random_words(layout, m, n, 0), layout=str(layout), in_features=n)
    held = for_kernels(packed, m, layout)
    return [held.clone() for _ in range(copies)]


def bound_seconds(layout: Layout, m: int, n: int, tokens: int, machine: harness.Machine) -> float:
    """The faster algorithm's multiply-adds at the measured product rate, or the codes at the measured read rate."""
    stages, groups = layout.stages, layout.groups(n)
    table = stages * tokens * (256 * n + m * groups)
    fma = min(table, tokens * m * n) / machine.fma_per_second
    codes = m * layout.packed_row_bytes(n) / machine.read_bytes_per_second if tokens <= COLD_TOKENS else 0.0
    return max(fma, codes)


def run_case(text: str, m: int, n: int, tokens: int, accuracy: str, machine: harness.Machine, seconds: float) -> dict[str, object]:
    layout = Layout.parse(text)
    cold = tokens <= COLD_TOKENS
    weight = torch.randn(m, n)
    dense = [weight.clone() for _ in range(harness.copies_for_cold(4 * m * n) if cold else 1)]
    codes = random_codes(layout, m, n, harness.copies_for_cold(m * layout.packed_row_bytes(n)) if cold else 1)
    basis, gain, x = torch.randn(layout.stages, 256, layout.group), torch.rand(m) + 0.5, torch.randn(tokens, n)
    keywords = {"layout": text, "in_features": n, "accuracy": accuracy}

    want = x.double() @ torch.ops.rbe.decode(codes[0], basis.double(), gain.double(), layout=text, in_features=n).T
    got = torch.ops.rbe.linear_inference(x, codes[0], basis, gain, **keywords)
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error < TOLERANCE[accuracy], f"{text} {m}x{n} tokens {tokens} {accuracy}: error {error}"

    timings = harness.race(
        {
            "linear": [lambda w=w: F.linear(x, w) for w in dense],
            "mm": [lambda w=w: torch.mm(w, x.T) for w in dense],
            "rbe": [lambda c=c: torch.ops.rbe.linear_inference(x, c, basis, gain, **keywords) for c in codes],
        },
        seconds,
    )
    best = min((timings["linear"], timings["mm"]), key=lambda t: t.minimum)
    bound = bound_seconds(layout, m, n, tokens, machine)
    return {
        "layout": text, "size": f"{m}x{n}", "tokens": tokens, "class": accuracy,
        "dense ms": f"{best.minimum * 1e3:.3f}", "rbe ms": f"{timings['rbe'].minimum * 1e3:.3f}",
        "speed-up": f"{best.minimum / timings['rbe'].minimum:.2f}", "by median": f"{best.median / timings['rbe'].median:.2f}",
        "share of bound": f"{bound / timings['rbe'].minimum:.0%}", "error": f"{error:.0e}",
    }  # fmt: skip


def overview(rows: list[dict[str, object]]) -> str:
    """A table for each size: times dense by minimum (by median), a column for each number of tokens."""
    tables = []
    for size in dict.fromkeys(row["size"] for row in rows):
        lines: dict[str, dict[str, object]] = {}
        for row in rows:
            if row["size"] != size:
                continue
            dense = lines.setdefault("dense, ms", {size: "dense, ms"})
            dense.setdefault(row["tokens"], row["dense ms"])
            name = f"{row['layout']} {row['class']}"
            lines.setdefault(name, {size: name})[row["tokens"]] = f"{float(row['speed-up']):.1f} ({float(row['by median']):.1f})"
        tokens = sorted({row["tokens"] for row in rows if row["size"] == size})
        tables.append(harness.table(list(lines.values()), [size, *tokens]))
    return "\n\n".join(tables)


def plot(rows: list[dict[str, object]], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["size"] for row in rows})
    colours = {layout: f"C{i}" for i, layout in enumerate(dict.fromkeys(row["layout"] for row in rows))}
    figure, axes = plt.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False, sharey=True)
    for axis, size in zip(axes[0], sizes, strict=True):
        for key in sorted({(row["layout"], row["class"]) for row in rows if row["size"] == size}):
            line = sorted((row["tokens"], float(row["speed-up"])) for row in rows if row["size"] == size and (row["layout"], row["class"]) == key)
            axis.plot(*zip(*line, strict=True), marker="o", label=" ".join(key), color=colours[key[0]], linestyle="-" if key[1] == "exact" else "--")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=size)
    axes[0][0].set_ylabel("times faster than dense float32")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    cases = {}
    for m, n in FULL_SIZES if arguments.full else SIZES:
        for text in FULL_LAYOUTS if arguments.full else LAYOUTS:
            for tokens in FULL_TOKENS if arguments.full else TOKENS[:1] if (m, n) == SIZES[-1] else TOKENS:
                for accuracy in ("exact", "fast"):
                    run = functools.partial(run_case, text, m, n, tokens, accuracy, seconds=arguments.seconds)
                    cases[f"{text} {m}x{n} {tokens} {accuracy}"] = run
    rows, path = harness.run_cases(arguments, "linear", cases)
    print("\n" + overview(rows))
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
