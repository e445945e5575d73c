"""`rbe compress`: a model into a compressed checkpoint, in memory or streamed."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import UsageError
from .budgets import calibration_of, check_budget
from .tables import megabytes, print_json
from .target import check_directory, check_file, check_room

if TYPE_CHECKING:
    from torch import nn


def run(options: argparse.Namespace) -> None:
    if options.tune is not None and options.calibrate is None:
        raise UsageError("--tune: needs --calibrate TEXT, the text to fit the model on")
    check_budget(options)
    if options.report is not None and Path(options.report).suffix not in (".html", ".json"):
        raise UsageError(f"--report: {options.report} must end in .html or .json")
    if options.stream:
        _stream(options)
        return
    from ..checkpoint import save_pretrained
    from ..compress import compress
    from ..models import copy_companions, directory_bytes, load_dense, model_directory

    source, target = model_directory(options.model), Path(options.out)
    check_directory(target, options.force, source)
    if options.report is not None and Path(options.report).parent != target:  # OUT itself may not be there yet
        check_file(Path(options.report), option="--report")
    model = load_dense(source)
    check_room(target, _size(model, options))
    report = compress(model, options.layout, options.include, options.exclude, calibration_of(options, model, source), options.bits, options.max_megabytes,
                      seed=options.seed, progress=not options.quiet, basis=options.basis, tune=options.tune)
    save_pretrained(model, target)
    if options.report is not None:
        (report.to_html if options.report.endswith(".html") else report.to_json)(options.report)
    copy_companions(source, target)
    before, after = directory_bytes(source), directory_bytes(target)
    if options.json:
        print_json({**report.to_dict(), "out": str(target), "file_bytes": after, "dense_file_bytes": before})
    else:
        print(report)
        print(f"{target}: {after / 1e6:.2f} MB, dense {before / 1e6:.2f} MB")


def _size(model: nn.Module, options: argparse.Namespace) -> int:
    """Bytes that the compressed model will take; of a budget in bits, what it allows."""
    from ..plan import plan

    sizes = plan(model, (options.layout,), options.include, options.exclude)
    if options.max_megabytes is not None:
        return int(1e6 * options.max_megabytes)
    return sizes.rows[0].model if options.bits is None else int(sizes.rest + options.bits * sizes.weights / 8)


def _stream(options: argparse.Namespace) -> None:
    given = [name for name in ("tune", "bits", "max_megabytes", "report") if getattr(options, name) is not None]
    if given or options.basis != "model":
        raise UsageError(f"--stream: compresses in one layout with one basis, without fine-tuning; leave out --{(given or ['basis'])[0].replace('_', '-')}")
    from ..models import copy_companions, directory_bytes, empty_model, load_config, model_directory
    from ..stream import PARTS, compress_checkpoint

    source, target = model_directory(options.model), Path(options.out)
    model = empty_model(load_config(source))
    if int(os.environ.get("RANK", "0")) == 0:
        check_directory(target, options.force or (target / PARTS).is_dir(), source)
        check_room(target, 2 * _size(model, options))  # the parts, and the file they become
    batches = None if options.calibrate is None else calibration_of(options, model, source)
    facts = compress_checkpoint(source, target, options.layout, options.include, options.exclude, batches, options.seed, not options.quiet)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    copy_companions(source, target)
    if options.json:
        print_json({**facts, "out": str(target), "dense_file_bytes": directory_bytes(source)})
        return
    print(f"{facts['layers']} layers, {facts['weights']:,} weights, {facts['bits_per_weight']:.3f} bits a weight; {facts['encoded']} encoded now, "
          f"{facts['finished_before']} finished before")
    print(f"{target}: {megabytes(directory_bytes(target))}, dense {megabytes(directory_bytes(source))}")
