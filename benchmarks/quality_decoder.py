"""Accuracy per byte of a language model: perplexity a token of the decoder that train_decoder.py trained, in few bits, everything counted.

    python benchmarks/train_decoder.py --out out/decoder --minutes 60
    python benchmarks/quality_decoder.py --model out/decoder --out out

Calibration is 128 windows of the decoder's context from OUT/train.txt, the same for every method; perplexity is measured on 64 KB of
OUT/valid.txt, which nothing was chosen on. The token embedding, which is the output head too, stays as it is for every method. Methods are
those of quality.py. A row that OUT/quality_decoder.json has already is kept.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import harness
import quality
import rivals
import torch
from torch import nn

import rbe_torch
from rbe_torch import evaluate, models, text, walk

WINDOWS, VALID_BYTES = 128, 1 << 16


class Decoder:
    """A directory that train_decoder.py wrote, as quality.py's methods want a task."""

    def __init__(self, directory: Path) -> None:
        self.source = directory
        tokenizer, model = models.load_tokenizer(directory), models.load_dense(directory)
        context = text.context_of(model)
        train = text.text_windows(tokenizer, (directory / "train.txt").read_text(encoding="utf-8")[: 40 * WINDOWS * context], context)
        chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        self.calibration = [{"input_ids": part} for part in chosen[:WINDOWS].split(8)]
        self.more = [{"input_ids": part} for part in chosen[: 32 * WINDOWS].split(8)]
        self.valid = text.text_windows(tokenizer, (directory / "valid.txt").read_text(encoding="utf-8")[:VALID_BYTES], context)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"perplexity": evaluate.perplexity(model, self.valid)}


def tuned(task: Decoder, layout: str, minutes: float) -> quality.Result:
    from rbe_torch.tune import tune_model

    model = models.load_dense(task.source)
    report = rbe_torch.compress(model, layout, calibration=task.calibration)
    task.keep(f"{layout} calibrated", {"bits": report.bits_per_weight, **task.score(model), "seconds": report.seconds})
    tuning = tune_model(model, models.load_dense(task.source), walk.calls_of(task.more, torch.device("cpu")), 60 * minutes)
    return model, report.bits_per_weight, {"tuning": tuning}


def methods(task: Decoder, minutes: float) -> dict[str, Callable[[], quality.Result]]:
    rows: dict[str, Callable[[], quality.Result]] = {"dense": lambda: (models.load_dense(task.source), 32.0, {})}
    for bits in (2, 3, 4):
        rows[f"round int{bits} g64"] = lambda bits=bits: quality.each_weight(
            task, lambda w: rivals.rounded(w, bits), rivals.integer_bits(bits)
        )
        rows[f"GPTQ int{bits} g64"] = lambda bits=bits: quality.with_moments(task, bits, False)
        rows[f"GPTQ int{bits} g64, our moments"] = lambda bits=bits: quality.with_moments(task, bits, True)
    for layout in ("rbe8_g8", "rbe8x2_g8", "rbe8x3_g8"):
        rows[f"{layout} data-free"] = lambda layout=layout: quality.ours(task, layout)
        rows[f"{layout} calibrated"] = lambda layout=layout: quality.ours(task, layout, calibration=task.calibration)
        rows[f"{layout} tuned"] = lambda layout=layout: tuned(task, layout, minutes)
    return rows


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory that train_decoder.py wrote")
    parser.add_argument("--tune", type=float, default=10.0, help="minutes of fine-tuning for each layout, default 10")
    parser.add_argument("--again", action="store_true", help="measure rows that the JSON has already")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "quality_decoder.json"
    facts: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    machine = harness.Machine(harness.cpu_name(), rbe_torch._ops.isa(), torch.get_num_threads(), torch.__version__)
    task = Decoder(arguments.model)

    def keep(name: str, row: dict[str, Any]) -> None:
        facts["rows"][name] = row
        training = arguments.model / "training.json"
        facts.update(
            machine=asdict(machine), tokens=task.valid.numel(), training=json.loads(training.read_text()) if training.is_file() else None
        )
        file.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{name}: {row}", flush=True)

    task.keep = keep
    rows = methods(task, arguments.tune)
    for name in [name for pattern in arguments.only.split("|") for name in rows if pattern in name]:
        if not arguments.again and "bits" in facts["rows"].get(name, {}):
            continue
        start = time.monotonic()
        model, bits, notes = rows[name]()
        seconds = time.monotonic() - start
        keep(name, {"bits": bits, **task.score(model), "seconds": seconds, **notes})
    dense = facts["rows"].get("dense", {}).get("perplexity")
    print(
        harness.table(
            [
                {
                    "method": name,
                    "bits": f"{row['bits']:.2f}",
                    "perplexity": f"{row['perplexity']:.3f}",
                    "above dense": "" if dense is None else f"{row['perplexity'] - dense:.3f}",
                    "seconds": f"{row['seconds']:.0f}",
                }
                for name, row in sorted(facts["rows"].items(), key=lambda item: (-item[1]["bits"], item[0]))
            ],
            ["method", "bits", "perplexity", "above dense", "seconds"],
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
