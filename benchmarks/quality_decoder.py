"""Accuracy per byte of a language model: perplexity a token of the decoder that train_decoder.py trained, in few bits, everything counted.

    python benchmarks/train_decoder.py --out out/decoder --minutes 60
    python benchmarks/quality_decoder.py --model out/decoder --out out

Calibration is 128 windows of the decoder's context from OUT/train.txt, the same for every method; perplexity is measured on 32 KB of
OUT/valid.txt, which nothing was chosen on. The token embedding, which is the output head too, stays as it is for every method. Methods are
those of quality.py. A row that OUT/quality_decoder.json has already is kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import quality_rows
import torch
from quality_methods import integers, ours, tuned
from quality_rows import Methods, Rows
from torch import nn

from rbe_torch import evaluate, models, text

WINDOWS, VALID_BYTES = 128, 1 << 15
TUNE_WINDOWS = 4096
OURS = ("rbe8_g8", "rbe8x2_g8", "rbe8x3_g8", "rbe8x4_g8")


class Decoder:
    """A directory that train_decoder.py wrote."""

    def __init__(self, directory: Path) -> None:
        self.source = directory
        tokenizer, model = models.load_tokenizer(directory), models.load_dense(directory)
        context = text.context_of(model)
        train = text.text_windows(tokenizer, (directory / "train.txt").read_text(encoding="utf-8")[: 40 * WINDOWS * context], context)
        chosen = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
        self.calibration = [{"input_ids": part} for part in chosen[:WINDOWS].split(8)]
        self.more = [{"input_ids": part} for part in chosen[:TUNE_WINDOWS].split(8)]
        self.valid = text.text_windows(tokenizer, (directory / "valid.txt").read_text(encoding="utf-8")[:VALID_BYTES], context)

    def score(self, model: nn.Module) -> dict[str, float]:
        return {"perplexity": evaluate.perplexity(model, self.valid)}


def methods(task: Decoder, rows: Rows, minutes: float) -> Methods:
    made: Methods = {"dense": lambda: (models.load_dense(task.source), 32.0, {}), **integers(task, (2, 3, 4))}
    for layout in OURS:
        made[f"{layout} data-free"] = lambda layout=layout: ours(task, layout)
        made[f"{layout} calibrated"] = lambda layout=layout: ours(task, layout, calibration=task.calibration)
        made[f"{layout} tuned"] = lambda layout=layout: tuned(task, rows, layout, minutes, layout)
    return made


def main() -> int:
    parser = quality_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="directory that train_decoder.py wrote")
    arguments = parser.parse_args()
    rows = quality_rows.start(arguments, "quality_decoder")
    task = Decoder(arguments.model)
    training = arguments.model / "training.json"
    rows.facts.update(tokens=task.valid.numel(), training=json.loads(training.read_text(encoding="utf-8")) if training.is_file() else None)
    rows.run(methods(task, rows, arguments.tune), task, f"dense|{arguments.only}", arguments.again)
    dense = rows.facts["rows"]["dense"]["perplexity"]
    print(rows.table({"perplexity": lambda row: f"{row['perplexity']:.3f}", "above dense": lambda row: f"{row['perplexity'] - dense:.3f}"}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
