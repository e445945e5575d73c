"""Options that `rbe compress` and `rbe plan` share: a budget, and text to calibrate on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cli import UsageError


def check_budget(options: argparse.Namespace) -> None:
    if options.bits is not None and options.max_megabytes is not None:
        raise UsageError("--bits, --max-megabytes: give one of them")


def calibration_of(options: argparse.Namespace, model: Any, directory: Path) -> Any:
    if options.calibrate is None:
        return None
    from ..models import load_tokenizer
    from ..text import calibration_batches, read_lines

    return calibration_batches(model, load_tokenizer(directory), read_lines(options.calibrate), options.samples, options.seed)
