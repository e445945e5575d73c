"""How much accuracy an Hb-BERT keeps at 2 bits: after compression (PTQ), training in codes (QAT) and training on (QAT + fine-tuning).

    dense                  the pretrained encoder, trained for the task
    PTQ                    that model compressed to rbe8x2_g8 with inputs of the task as calibration, nothing more
    QAT                    PTQ, then as many steps in codes (rbe_torch.prepare_training) as the dense model had
    QAT + fine-tuning      QAT, then as many steps again at a quarter of the rate
    dense, steps of ...    with --controls, the dense model trained on like QAT and like QAT + fine-tuning: what more steps alone are worth

Tasks: SST-2 (accuracy on its dev set; --data names a folder with sst2/train.tsv and sst2/dev.tsv, as GLUE has them) and the hierarchy of
benchmarks/hbbert.py (mean F1 of its four settings). Kept: a model's value over dense's; the format's inventors claim 93.2, 97.1, 99.3 %.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hbbert
import hbbert_bench
import hbbert_head
import numpy as np
import torch
from harness import cpu_name, table
from torch import nn

import rbe_torch
from rbe_torch import models
from rbe_torch.hyperbolic import HbBertForSequenceClassification
from rbe_torch.hyperbolic.training import Options, optimiser_of

LAYOUT = "rbe8x2_g8"
FINE = 0.25  # rate of the fine-tuning after QAT
CLAIMED = {"PTQ": 93.2, "QAT": 97.1, "QAT + fine-tuning": 99.3}

Train = Callable[[nn.Module, int, float], list[float]]  # model, number of the stage, factor of the rate -> losses


def stages(
    start: nn.Module,
    learn: Train,
    judge: Callable[[nn.Module], float],
    calibration: list[dict[str, torch.Tensor]],
    name: str,
    controls: bool,
) -> dict[str, Any]:
    """Runs all stages from a pretrained model; the values are `judge`'s, and `name` says what they are."""
    result: dict[str, Any] = {}

    def note(stage: str, model: nn.Module, losses: list[float]) -> None:
        ends = [round(float(np.mean(part)), 4) for part in (losses[:10], losses[-10:])] if losses else None
        result[stage] = {"value": judge(model), "loss": ends}
        print(f"{name}, {stage}: {result[stage]}", flush=True)

    dense = start
    note("dense", dense, learn(dense, 0, 1.0))
    coded = copy.deepcopy(dense)
    linears = coded.encoder if isinstance(coded, hbbert_head.Projected) else coded  # not the head
    rbe_torch.compress(linears, LAYOUT, calibration=calibration, progress=False)
    note("PTQ", coded, [])
    for number, (stage, factor) in enumerate((("QAT", 1.0), ("QAT + fine-tuning", FINE)), 1):
        rbe_torch.prepare_training(coded)
        losses = learn(coded, number, factor)
        rbe_torch.finish_training(coded)
        note(stage, coded, losses)
        if controls:
            note(f"dense, steps of {stage}", dense, learn(dense, number, factor))
    return result


def rate_of(model: nn.Module, options: argparse.Namespace) -> float:
    coded = any(isinstance(module, rbe_torch.RBELinear) for module in model.modules())
    return options.code_lr[0] if coded else options.lr


# ---- SST-2 ------------------------------------------------------------------------------------------------------------------------
def read_sst2(file: Path) -> tuple[list[str], list[int]]:
    """Sentences and labels of label<TAB>sentence or sentence<TAB>label lines with a header."""
    if not file.is_file():
        raise SystemExit(f"--data: {file} is not there; it is GLUE's SST-2")
    lines = file.read_text(encoding="utf-8").splitlines()
    at = lines[0].split("\t").index("label")
    cells = [line.split("\t") for line in lines[1:] if line.strip()]
    return [row[1 - at] for row in cells], [int(row[at]) for row in cells]


def sst2(options: argparse.Namespace) -> dict[str, Any]:
    source = models.model_directory(options.model)
    tokenizer = models.load_tokenizer(source)
    sentences, labels = read_sst2(options.data / "sst2" / "train.tsv")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(options.seed))[: options.steps * options.batch].tolist()
    dev, dev_labels = read_sst2(options.data / "sst2" / "dev.tsv")
    torch.manual_seed(options.seed)
    bert = models.load_dense(source)
    model = HbBertForSequenceClassification.from_pretrained(bert, **hbbert_bench.arguments_of(options.space, bert)).to(options.device)

    def batches(texts: list[str], size: int) -> list[dict[str, torch.Tensor]]:
        return [dict(tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=48, return_tensors="pt").to(options.device))
                for i in range(0, len(texts), size)]

    def learn(model: nn.Module, number: int, factor: float) -> list[float]:
        """One pass over the same sentences in another order."""
        shuffled = torch.tensor(order)[torch.randperm(len(order), generator=torch.Generator().manual_seed(number))].tolist()
        optimiser = optimiser_of(model, Options(lr=rate_of(model, options) * factor))
        rates, losses = [group["lr"] for group in optimiser.param_groups], []
        model.train()
        for step, start in enumerate(range(0, len(shuffled), options.batch)):
            chosen = shuffled[start : start + options.batch]
            batch = batches([sentences[i] for i in chosen], options.batch)[0]
            wanted = torch.tensor([labels[i] for i in chosen], device=options.device)
            loss = model(batch["input_ids"], batch["attention_mask"], labels=wanted).loss
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * min((step + 1) / max(1, options.steps // 10), 1 - step / options.steps)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def judge(model: nn.Module) -> float:
        model.eval()
        found = torch.cat([model(batch["input_ids"], batch["attention_mask"]).logits.argmax(1) for batch in batches(dev, 64)]).cpu()
        return float((found == torch.tensor(dev_labels)).float().mean())

    calibration = batches([sentences[i] for i in order[:512]], 32)
    calibration = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in calibration]
    return stages(model, learn, judge, calibration, "SST-2 dev accuracy", options.controls)


# ---- the hierarchy ----------------------------------------------------------------------------------------------------------------
def hierarchy(options: argparse.Namespace) -> dict[str, Any]:
    bench = hbbert_bench.Bench(options)
    parts = bench.splits["mixed"]

    def learn(model: nn.Module, number: int, factor: float) -> list[float]:
        settings = replace(bench.settings, lr=rate_of(model, options) * factor, seed=options.seed + number)
        return bench.train(model, parts.train, settings)

    def judge(model: nn.Module) -> float:
        return float(np.mean([found["test"] for found in bench.f1_of_both_tasks(model, bench.points(model)).values()]))

    calibration = bench.names.batches(*hbbert_bench.CALIBRATION, options.seed, options.device)
    return stages(bench.model(options.space), learn, judge, calibration, "hierarchy, mean F1", options.controls)


def main() -> int:
    parser = hbbert.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sst2/train.tsv and sst2/dev.tsv")
    parser.add_argument("--space", choices=tuple(hbbert_bench.SPACES), default="hit", help="default hit; SST-2 wants one without a head")
    parser.add_argument("--controls", action="store_true", help="also train the dense model on for as many steps")
    parser.add_argument("--task", choices=("sst2", "hierarchy"), action="append", help="only this one")
    options = parser.parse_args()
    if hbbert_bench.SPACES[options.space].dims is not None and "sst2" in (options.task or ["sst2"]):
        raise SystemExit(f"--space: {options.space!r} has a head of its own, which SST-2's classifier cannot use; add --task hierarchy")
    torch.set_num_threads(options.threads)
    options.steps, options.batch = options.steps or 80, options.batch or 16
    rows, results = [], {}
    for name, run in (("sst2", sst2), ("hierarchy", hierarchy)):
        if options.task and name not in options.task:
            continue
        start = time.perf_counter()
        results[name] = {"stages": run(options), "seconds": 0.0}
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
        dense = results[name]["stages"]["dense"]["value"]
        for stage, entry in results[name]["stages"].items():
            rows.append({"task": name, "model": stage, "value": f"{entry['value']:.4f}", "kept": f"{100 * entry['value'] / dense:.1f} %",
                         "claimed": f"{CLAIMED[stage]} %" if stage in CLAIMED else "", "loss": entry["loss"] or ""})
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "hbbert_kept.json"
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": options.device, "torch": torch.__version__}
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("data", "out", "wordnet")}
    path.write_text(json.dumps({"machine": machine, "settings": settings, "layout": LAYOUT, "results": results}, indent=1) + "\n")
    print("\n" + table(rows, ("task", "model", "value", "kept", "claimed", "loss")) + f"\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
