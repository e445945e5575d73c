"""`rbe bench`: a dense linear layer and its compressed form, timed side by side."""

from __future__ import annotations

import argparse

from .tables import print_json, print_table


def run(options: argparse.Namespace) -> None:
    import torch
    from torch import nn

    from .. import _ops
    from ..linear import RBELinear
    from ..progress import Progress
    from ..timing import interleave

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    layouts = options.layout or ["rbe8x2_g8", "rbe22_g64"]
    shapes = options.shape or [(768, 768), (3072, 768)]
    rows = []
    with torch.inference_mode(), Progress("bench", len(shapes) * len(options.tokens), not options.quiet) as bar:
        for m, n in shapes:
            coded = {layout: RBELinear(n, m, layout=layout, dtype=dtype, seed=0) for layout in layouts}
            dense = {layout: nn.Linear(n, m, dtype=dtype) for layout in layouts}
            for layout in layouts:
                dense[layout].weight.copy_(coded[layout].weight)
                dense[layout].bias.copy_(coded[layout].bias)
            for tokens in options.tokens:
                x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).to(dtype)
                calls = {"dense": lambda x=x: dense[layouts[0]](x)} | {name: lambda x=x, layer=layer: layer(x) for name, layer in coded.items()}
                times = interleave(calls, options.seconds * len(calls))
                for layout in layouts:
                    exact = torch.nn.functional.linear(x.double(), coded[layout].weight.double(), coded[layout].bias.double())
                    error = float((coded[layout](x).double() - exact).norm() / exact.norm())
                    ours, torch_ = times[layout], times["dense"]
                    rows.append({"layout": layout, "out_features": m, "in_features": n, "tokens": tokens, "dtype": options.dtype,
                                 "dense_min_us": 1e6 * torch_.minimum, "dense_median_us": 1e6 * torch_.median, "min_us": 1e6 * ours.minimum,
                                 "median_us": 1e6 * ours.median, "speedup": torch_.minimum / ours.minimum, "relative_error": error, "runs": ours.runs})
                bar.step(1, f"{m}x{n}, {tokens} tokens")
    facts = {"isa": _ops.isa(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    if options.json:
        print_json(facts)
        return
    print_table(("layout", "shape", "tokens", "dense us, min", "median", "rbe us, min", "median", "dense/rbe", "rel. error"),
                 [(row["layout"], f"{row['out_features']}x{row['in_features']}", row["tokens"], f"{row['dense_min_us']:.1f}", f"{row['dense_median_us']:.1f}",
                   f"{row['min_us']:.1f}", f"{row['median_us']:.1f}", f"{row['speedup']:.2f}", f"{row['relative_error']:.1e}") for row in rows])
    print(f"{options.dtype}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}, {facts['isa']}, torch {facts['torch']}; weights stay in the "
          "caches, dense and compressed in turn; dense/rbe compares the minima; error against a float64 product with the decoded weight")
