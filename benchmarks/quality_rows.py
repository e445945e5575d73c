"""The rows of quality.py and quality_decoder.py: each is a way to store a model in few bits, run, scored and kept in a JSON file.

A task has the dense model's directory `source`, the `calibration` batches that all methods get, the batches `more` for fine-tuning, and
score(model). A method returns (model, bits a weight, notes).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import harness
import torch
from torch import nn

import rbe_torch

Result = tuple[nn.Module, float, dict[str, Any]]
Methods = dict[str, Callable[[], Result]]


class Task(Protocol):
    source: Path
    calibration: list[dict[str, torch.Tensor]]
    more: list[dict[str, torch.Tensor]]

    def score(self, model: nn.Module) -> dict[str, float]: ...


class Rows:
    """facts["rows"]: name -> bits, scores, seconds, notes; written to the file after every row."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": {}}

    def keep(self, name: str, row: dict[str, Any]) -> None:
        self.facts["rows"][name] = row
        self.file.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {row}", flush=True)

    def run(self, methods: Methods, task: Task, only: str, again: bool) -> None:
        """Runs the methods whose name contains one of the words of only (w|w|...), in that order. A row that is there is kept unless
        again; a method that cannot run has a row that says why."""
        chosen = [name for word in only.split("|") for name in methods if word in name]
        if not chosen:
            raise SystemExit(f"--only {only!r} leaves none of: {', '.join(methods)}")
        for name in dict.fromkeys(chosen):
            if not again and "bits" in self.facts["rows"].get(name, {}):
                continue
            start = time.monotonic()
            try:
                model, bits, notes = methods[name]()
            except (ImportError, RuntimeError, NotImplementedError) as error:
                self.keep(name, {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"})
                continue
            seconds = time.monotonic() - start
            self.keep(name, {"bits": bits, **task.score(model), "seconds": seconds, **notes})

    def table(self, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
        """Markdown, by falling bits: the method, its bits, the columns made from its row, seconds; or why it failed."""
        rows = sorted(self.facts["rows"].items(), key=lambda item: (-item[1].get("bits", -1), item[0]))
        lines = [
            {"method": name, "bits": row["failed"]}
            if "failed" in row
            else {
                "method": name,
                "bits": f"{row['bits']:.2f}",
                **{title: text(row) for title, text in columns.items()},
                "seconds": f"{row['seconds']:.0f}",
            }
            for name, row in rows
        ]
        return harness.table(lines, ["method", "bits", *columns, "seconds"])


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON and the picture")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--only", default="", help="rows whose name contains this; words divided by | run in their order")
    made.add_argument("--tune", type=float, default=10.0, help="minutes of fine-tuning for each layout, default 10")
    made.add_argument("--again", action="store_true", help="measure rows that the JSON has already")
    return made


def start(arguments: argparse.Namespace, name: str) -> Rows:
    """Seed and threads; the rows of OUT/name.json, with the machine's facts."""
    torch.manual_seed(0)
    random.seed(0)  # AQLM's order of groups
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments.out / f"{name}.json")
    rows.facts["machine"] = asdict(harness.Machine(harness.cpu_name(), rbe_torch._ops.isa(), torch.get_num_threads(), torch.__version__))
    return rows
