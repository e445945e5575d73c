"""`rbe plan`: sizes before anything is run, or what each layer would get from a budget."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import UsageError
from .budgets import calibration_of, check_budget
from .tables import megabytes, print_json, print_table

if TYPE_CHECKING:
    from ..budget import Choice
    from ..replace import Found


def run(options: argparse.Namespace) -> None:
    from ..models import PACKAGED, empty_model, load_config, model_directory
    from ..plan import LAYOUTS, plan
    from ..published import PUBLISHED, published_config

    path = Path(options.model)
    if not path.is_file():
        path = model_directory(options.model) if path.is_dir() or options.model in PACKAGED else path
    named = not path.exists() and options.model in PUBLISHED
    check_budget(options)
    if options.bits is not None or options.max_megabytes is not None:
        _plan_budget(options, path)
        return
    if options.calibrate is not None:
        raise UsageError("--calibrate: sizes alone need no text; give --bits or --max-megabytes with it")
    result = plan(empty_model(published_config(options.model) if named else load_config(path)), tuple(options.layout or LAYOUTS), options.include, options.exclude)
    if options.json:
        print_json({**asdict(result), "rest": result.rest})
        return
    unit, letters = (1e9, "GB") if result.dense_model >= 1e10 else (1e6, "MB")
    rows = [("dense", f"{result.dense_linears / unit:.2f}", f"{result.dense_model / unit:.2f}", f"{8 * result.dense_linears / result.weights:.3f}", "", "")]
    rows += [(row.layout, f"{row.linears / unit:.2f}", f"{row.model / unit:.2f}", f"{row.bits_per_weight:.3f}", f"{result.dense_linears / row.linears:.1f}x",
              row.purpose) for row in result.rows]
    print_table(("layout", f"linears {letters}", f"model {letters}", "bits/weight", "smaller", "for"), rows, left=(0, 5))
    print(f"{result.converted} layers with {result.weights:,} weights would be converted; the rest, {megabytes(result.rest)}, stays as it is")
    for name, reason in result.skipped:
        print(f"  left alone: {name}: {reason}")


def _plan_budget(options: argparse.Namespace, path: Path) -> None:
    """What `rbe compress` with this budget would choose, and what it would choose from."""
    from ..budget import choose, rest_bytes
    from ..models import load_dense
    from ..replace import dense_weight, find_linears
    from ..report import frontier_lines
    from ..walk import calls_of

    if not path.is_dir():
        raise UsageError(f"--bits, --max-megabytes: losses are measured on weights, and {path} is no model directory")
    model = load_dense(path)
    chosen = [entry for entry in find_linears(model, options.include, options.exclude) if entry.convertible]
    batches = calibration_of(options, model, path)
    calls = None if batches is None else calls_of(batches, chosen[0].module.weight.device)
    layouts = {"candidates": tuple(options.layout)} if options.layout else {}
    choice = choose(model, chosen, calls, options.bits, options.max_megabytes, options.seed, not options.quiet, **layouts)
    facts = [_layer_facts(entry, choice) for entry in chosen]
    if options.json:
        print_json({"layouts": {row["name"]: row["layout"] for row in facts}, "layers": facts, "frontier": choice.frontier})
        return
    print_table(("layer", "shape", "layout", "stages", "residual", "bits/weight", "loss"),
                [(row["name"], f"{row['out_features']}x{row['in_features']}", row["layout"], row["stages"], row["residual"] or "-", f"{row['bits_per_weight']:.3f}",
                  f"{row['loss']:.3g}") for row in facts], left=(0, 1, 2, 4))
    size = next(row["bytes"] for row in choice.frontier if row["chosen"])
    print(f"these {len(facts)} layers: {megabytes(size)}, {8 * size / sum(dense_weight(entry.module).numel() for entry in chosen):.3f} bits a weight with gains, "
          f"residuals and bases; the whole model {megabytes(size + rest_bytes(model, chosen))}")
    print("loss: " + ("of the weights alone, squared error relative to their size times their number; --calibrate measures the model's output instead"
                      if calls is None else "how far the model's output is from the dense one's when this layer alone is in codes"))
    print("mixes considered (* chosen), losses of the layers added up:", *frontier_lines(choice.frontier), sep="\n")


def _layer_facts(entry: Found, choice: Choice) -> dict[str, Any]:
    from ..replace import features

    layout, (n, m) = choice.layouts[entry.name], features(entry.module)
    return {"name": entry.name, "out_features": m, "in_features": n, "layout": str(layout), "stages": layout.stages, "residual": layout.residual,
            "bits_per_weight": 8 * layout.bytes(m, n, basis=False) / (m * n), "loss": choice.losses[entry.name]}
