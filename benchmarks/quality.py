"""Accuracy per byte: rbe_torch against other ways to store weights in few bits, on all-MiniLM-L6-v2, everything counted.

    python benchmarks/quality.py --data DIR                       every row (an hour or more on one core)
    python benchmarks/quality.py --data DIR --only "x2_g8|GPTQ"   rows whose name contains this or that, in this order
    python benchmarks/quality.py --data DIR --samples 128 --out other            calibrated on fewer sentences
    python benchmarks/quality.py --data DIR --pairs FILE --out other             calibrated on the sentences of a file of pairs

A row that OUT/quality.json has already is kept, so that a table can be made in pieces.

DIR holds stsb/sts-train.csv, stsb/sts-dev.csv, sst2/train.tsv and sst2/dev.tsv. Calibration is 1,024 sentences drawn from the training
parts of both, the same for every method, and fine-tuning draws from the training parts too; scores are on the dev parts, which nothing was
chosen on:

    cosine      mean over the 3,000 sentences of STS-B dev to the dense model's own embeddings
    Spearman    of STS-B dev's similarities
    SST-2       accuracy on dev of a linear probe that was fitted to the dense embeddings of 2,000 training sentences

All linear layers are compressed (10.8 M weights); embeddings stay as they are for every method. Bits: everything that a layer stores over
its weights.
"""

from __future__ import annotations

import os
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import harness
import quality_rows
import rivals
import torch
from quality_methods import dynamic_int8, from_inputs, from_weights, integers, ours, tuned
from quality_rows import Methods, Rows
from torch import nn

from rbe_torch import evaluate, models, text

SAMPLES = 1024
TUNE_SENTENCES = 16384
PROBE_SENTENCES = 2000
AQLM_EPOCHS = 10
BUDGETS = (2.2, 2.5)
MOST_BITS = 5  # in the picture
OURS = ("rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+lr8", "rbe8x2_g8+sp0.005", "rbe8x3_g8", "rbe8x4_g8")
FULL = ("rbe8x2_g8+int8", "rbe8x2_g8+fp8")  # 10 bits: the rows' notes say how exact, `worst_norm`


class Sentences:
    """Sentences, the dense model, its embeddings and the probe."""

    def __init__(self, data: Path, model: str, samples: int, pairs: Path | None) -> None:
        self.source = models.model_directory(model)
        self.tokenizer = models.load_tokenizer(self.source)
        stsb = [line.split("\t") for line in (data / "stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()]
        self.train, self.dev = evaluate.read_sst2(data)
        train = [cells[column] for cells in stsb for column in (5, 6)] + self.train.texts[:20000]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        chosen = [train[i] for i in order]
        calibration = chosen[:samples] if pairs is None else evaluate.read_pairs(pairs).sentences
        self.samples = len(calibration)
        self.calibration = text.sentence_batches(self.tokenizer, calibration)
        self.to_tune = chosen[:TUNE_SENTENCES]
        self.pairs = evaluate.read_pairs(data)

    @cached_property
    def dense(self) -> torch.Tensor:
        return evaluate.embed(models.load_dense(self.source), self.tokenizer, self.pairs.sentences)

    @cached_property
    def probe(self) -> torch.Tensor:
        probed = evaluate.embed(models.load_dense(self.source), self.tokenizer, self.train.texts[-PROBE_SENTENCES:])
        return evaluate.fit_probe(probed, self.train.labels[-PROBE_SENTENCES:])

    @cached_property
    def more(self) -> list[dict[str, torch.Tensor]]:
        return text.sentence_batches(self.tokenizer, self.to_tune)

    def score(self, model: nn.Module) -> dict[str, float]:
        got = evaluate.embed(model, self.tokenizer, self.pairs.sentences)
        cosine = (got * self.dense).sum(1)
        return {
            "cosine": float(cosine.mean()),
            "cosine_p5": float(cosine.quantile(0.05)),
            "spearman": evaluate.spearman(evaluate.pair_similarity(got), self.pairs.scores),
            "sst2": evaluate.probe_accuracy(self.probe, evaluate.embed(model, self.tokenizer, self.dev.texts), self.dev.labels),
        }


# ---- rows -------------------------------------------------------------------------------------------------------------------------
def methods(task: Sentences, rows: Rows, minutes: float) -> Methods:
    made: Methods = {"dense": lambda: (models.load_dense(task.source), 32.0, {}), **integers(task, (2, 3, 4))}
    for bits in (2, 3, 4):
        made[f"HQQ int{bits} g64"] = lambda bits=bits: from_weights(task, lambda w: rivals.hqq(w, bits))
    made["NF4 g64"] = lambda: from_weights(task, lambda w: (rivals.nf4(w), 4 + 16 / 64))
    for bits in (2, 4):
        made[f"quanto int{bits} g128"] = lambda bits=bits: from_weights(task, lambda w: rivals.quanto(w, bits))
    made["torch dynamic int8"] = lambda: dynamic_int8(task)
    for books in (1, 2):
        made[f"AQLM {books}x8 g8"] = lambda books=books: from_inputs(task, lambda w, h: rivals.aqlm(w, h, books, AQLM_EPOCHS))
    for layout in OURS:
        made[f"{layout} data-free"] = lambda layout=layout: ours(task, layout)
        made[f"{layout} calibrated"] = lambda layout=layout: ours(task, layout, calibration=task.calibration)
        made[f"{layout} tuned"] = lambda layout=layout: tuned(task, rows, layout, minutes, layout)
    for layout in FULL:
        made[f"{layout} data-free"] = lambda layout=layout: ours(task, layout)
    for bits in BUDGETS:
        name = f"mix by budget {bits}"
        made[f"{name} data-free"] = lambda bits=bits: ours(task, bits=bits)
        made[f"{name} calibrated"] = lambda bits=bits: ours(task, bits=bits, calibration=task.calibration)
        made[f"{name} tuned"] = lambda bits=bits, name=name: tuned(task, rows, name, minutes, bits=bits)
    return made


def main() -> int:
    parser = quality_rows.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/ and sst2/")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"sentences to calibrate on, default {SAMPLES}")
    parser.add_argument("--pairs", type=Path, help="calibrate on the sentences of this file of pairs instead")
    arguments = parser.parse_args()
    rows = quality_rows.start(arguments, "quality")
    task = Sentences(arguments.data, arguments.model, arguments.samples, arguments.pairs)
    rows.facts.update(sentences=len(task.pairs.sentences), samples=task.samples)
    rows.run(methods(task, rows, arguments.tune), task, arguments.only, arguments.again)
    print(
        rows.table(
            {
                "cosine": lambda row: f"{row['cosine']:.4f}",
                "5 % worst": lambda row: f"{row['cosine_p5']:.4f}",
                "Spearman": lambda row: f"{row['spearman']:.4f}",
                "SST-2": lambda row: f"{row['sst2']:.4f}",
            }
        )
    )
    draw(rows.facts, arguments.out / "quality.png")
    return 0


def kind_of(name: str) -> str:
    """What a row's name says without its size: rows of a kind are one line of the picture."""
    first, *words = name.split()
    how = words[-1] if words else ""
    if first == "mix":
        return f"rbe_torch, mix by budget, {how}"
    if first.startswith("rbe"):
        return f"rbe_torch, {'signs, ' if first.startswith('rbe16s') else ''}{'with residual, ' if '+' in first else ''}{how}"
    return " ".join(word for word in (first, *words) if not word.startswith(("int", "g8", "g64", "g128", "1x8", "2x8")))


def draw(facts: dict[str, Any], path: Path) -> None:
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, row in facts["rows"].items():
        if "failed" in row or row["bits"] > MOST_BITS:
            continue
        kinds.setdefault(kind_of(name), []).append((row["bits"], row["cosine"]))
    if not kinds:
        return
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    colours = {own: cycle(pyplot.colormaps["Dark2" if own else "tab10"].colors) for own in (True, False)}
    for kind, points in sorted(kinds.items(), key=lambda item: not item[0].startswith("rbe")):
        points.sort()
        own = kind.startswith("rbe")
        marker, width, style = ("o", 2, "-") if own else ("x", 1, "--")
        axes.plot(*zip(*points, strict=True), marker=marker, linewidth=width, linestyle=style, color=next(colours[own]), label=kind)
    axes.set(
        xlabel="bits a weight, everything counted",
        ylabel="mean cosine to the dense embeddings, STS-B dev",
        xlim=(0.8, MOST_BITS),
        ylim=(0, 1.01),
        title="all-MiniLM-L6-v2, every linear layer compressed",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
