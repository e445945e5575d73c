"""`rbe plan`: sizes before anything is run, or what each layer would get from a budget."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..cli import UsageError
from .budgets import calibration_of, check_budget
from .tables import megabytes, print_json, print_table


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
    print_table(("layout", f"linears {letters}", f"model {letters}", "bits/weight", "linears", "for"), rows, left=(0, 5))
    print(f"{result.converted} layers with {result.weights:,} weights would be converted; the rest, {megabytes(result.rest)}, stays as it is")
    for name, reason in result.skipped:
        print(f"  left alone: {name}: {reason}")


def _plan_budget(options: argparse.Namespace, path: Path) -> None:
    """What `rbe compress` with this budget would choose, and what it would choose from."""
    from ..budget import choose
    from ..models import load_dense
    from ..replace import find_linears
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
    if options.json:
        print_json({"layouts": {name: str(layout) for name, layout in choice.layouts.items()}, "frontier": choice.frontier})
        return
    print_table(("layer", "layout"), [(name, str(layout)) for name, layout in choice.layouts.items()], left=(0, 1))
    print("mixes considered (* chosen), loss as measured layer by layer:", *frontier_lines(choice.frontier), sep="\n")
