"""Digits told apart by a small network whose hidden layers are in codes: MNIST's t10k (8,000 train, 2,000 test) and scikit-learn's digits (1,437 and 360).

pixels -> 512 -> 512 -> 10, relu; the two hidden layers are replaced, the head stays dense. AdamW, cosine, batch 128, every contestant at each of its rates with one seed,
the best rate with three. Bytes are those of the two hidden layers' weights: codes, gains and the basis unless a seed gives it. "by codes" is 32 bits over the codes'
bits a weight, what the format is known for; "ratio" is float32 over everything counted.

    python benchmarks/train/classifier.py --data DIR        # DIR/mnist/t10k-images-idx3-ubyte.gz and its labels; pip install scikit-learn for the second set
"""

from __future__ import annotations

import argparse
import gzip
import math
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
from runs import Panel, Runs, at_best_rate, picture, spread  # noqa: E402
from small_layers import BlockSparse  # noqa: E402

import rbe_torch  # noqa: E402

HIDDEN, BATCH, CLASSES = 512, 128, 10
KEPT = 0.986  # of the dense accuracy
Split = tuple[Tensor, Tensor, Tensor, Tensor]

# name -> (what it is, its options, rates)
CONTESTANTS: dict[str, tuple[str, dict, tuple[float, ...]]] = {
    "dense float32": ("dense", {}, (1e-3, 3e-3, 3e-4)),
    "RBE rbe22_g128": ("rbe", {"layout": "rbe22_g128", "basis": "trained"}, (1e-3, 3e-3, 3e-4)),
    "RBE rbe22_g128, seeded basis": ("rbe", {"layout": "rbe22_g128", "basis": "seeded"}, (1e-3, 3e-3, 3e-4)),
    "RBE rbe4r_g24, seeded basis": ("rbe", {"layout": "rbe4r_g24", "basis": "seeded"}, (1e-3, 3e-3, 3e-4)),
    "block sparse int4": ("sparse", {"bits": 4, "kept": 0.08}, (3e-3, 1e-3, 1e-2)),
}


class Network(nn.Module):
    def __init__(self, pixels: int, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = first or nn.Linear(pixels, HIDDEN), second or nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def build(name: str, pixels: int, rate: float, seed: int) -> tuple[Network, list, float]:
    """The network, its optimiser's groups and the bytes of its hidden layers."""
    kind, options, _ = CONTESTANTS[name]
    torch.manual_seed(seed)
    if kind == "dense":
        return (model := Network(pixels)), list(model.parameters()), 4.0 * (pixels + HIDDEN) * HIDDEN
    if kind == "sparse":
        layers = [BlockSparse(n, HIDDEN, options["bits"], options["kept"]) for n in (pixels, HIDDEN)]
        return (model := Network(pixels, *layers)), list(model.parameters()), sum(layer.bytes for layer in layers)
    model = Network(pixels)
    report = rbe_torch.convert(model, options["layout"], seed=seed, basis=options["basis"], nonlinearity="relu")
    return model, rbe_torch.param_groups(model, lr=rate), report.compressed_bytes


def train(name: str, split: Split, rate: float, seed: int, epochs: int) -> dict[str, object]:
    x, y, test_x, test_y = split
    model, groups, size = build(name, x.shape[1], rate, seed)
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    steps = epochs * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, [group["lr"] for group in optimiser.param_groups], total_steps=steps, cycle_momentum=False)
    generator, began = torch.Generator().manual_seed(seed), time.thread_time()
    watch = rbe_torch.TrainingWatch(model, interval=50, rise=20)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            loss.backward()
            watch.step(loss)
            optimiser.step()
            schedule.step()
    seconds = (time.thread_time() - began) / steps
    if CONTESTANTS[name][0] == "rbe":
        rbe_torch.finish_training(model)
    with torch.no_grad():
        logits = model(test_x)
    weights = (x.shape[1] + HIDDEN) * HIDDEN
    layout = CONTESTANTS[name][1].get("layout")
    by_codes = 32 * rbe_torch.Layout.parse(layout).group / rbe_torch.Layout.parse(layout).bits if layout else 4 * weights / size
    return {
        "name": name, "lr": rate, "seed": seed, "kB": round(size / 1e3, 2), "by codes": f"{by_codes:.0f}x", "ratio": f"{4 * weights / size:.1f}x",
        "accuracy": round(float((logits.argmax(1) == test_y).float().mean()), 4), "test loss": round(float(F.cross_entropy(logits, test_y)), 4),
        "s/step": round(seconds, 5), "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def mnist(data: Path) -> Split:
    def read(name: str, header: int) -> Tensor:
        path = data / "mnist" / name
        if not path.is_file():
            raise SystemExit(f"--data: {path} is missing; it is part of MNIST's test set")
        return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8)

    images, labels = read("t10k-images-idx3-ubyte.gz", 16).view(-1, 784).float() / 255, read("t10k-labels-idx1-ubyte.gz", 8).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # t10k's second half is easier than its first
    return _split(images[order], labels[order], 8000)


def digits() -> Split | None:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("scikit-learn's digits are left out: pip install scikit-learn")
        return None
    found = load_digits()
    order = torch.randperm(len(found.data), generator=torch.Generator().manual_seed(0))
    return _split(torch.tensor(found.data).float()[order] / 16, torch.tensor(found.target).long()[order], 1437)


def _split(x: Tensor, y: Tensor, train_rows: int) -> Split:
    mean, deviation = x[:train_rows].mean(), x[:train_rows].std()
    x = (x - mean) / deviation
    return x[:train_rows], y[:train_rows], x[train_rows:], y[train_rows:]


def badness(row: dict) -> float:
    """Orders by accuracy, what is equally accurate by loss."""
    return 1e-6 * row["test loss"] - row["accuracy"]


def summary(rows: list[dict]) -> list[dict[str, object]]:
    table, dense = [], 0.0
    for name in CONTESTANTS:
        best, _ = at_best_rate([row for row in rows if row["name"] == name], ("lr",), badness)
        accuracy = sum(row["accuracy"] for row in best) / len(best)
        dense = dense or accuracy
        first = {key: best[0][key] for key in ("kB", "by codes", "ratio", "lr", "s/step", "peak MB")}
        table.append({"name": name, **spread(best, "accuracy"), "kept": f"{accuracy / dense:.2%}", f"at least {KEPT:.1%}": "yes" if accuracy >= KEPT * dense else "no",
                      "seeds": len(best), **first})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=8, help="of MNIST; of the digits three times as many")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs, tables = Runs(options.out / "train_classifier.json"), {}
    for title, split in {"MNIST t10k": mnist(options.data), "scikit-learn digits": digits()}.items():
        if split is None:
            continue
        epochs = options.epochs * (1 if len(split[0]) > 5000 else 3)
        for name, (_, _, rates) in CONTESTANTS.items():
            mine = {"set": title, "epochs": epochs, "name": name}
            for seed in range(options.seeds):
                for rate in rates if seed == 0 else [min((row for row in runs.rows if row["seed"] == 0 and row.items() >= mine.items()), key=badness)["lr"]]:
                    if not runs.holds(**mine, lr=rate, seed=seed):
                        runs.add({**mine, **train(name, split, rate, seed, epochs)})
        tables[title] = summary([row for row in runs.rows if row["set"] == title and row["epochs"] == epochs])
        print(f"\n{title}\n" + harness.table(tables[title], list(tables[title][0])) + "\n", flush=True)
    picture([Panel(title, table, "kB", "accuracy", "bytes of the hidden layers, kB", "test accuracy", line=KEPT * float(table[0]["accuracy"])) for title, table in tables.items()],
            options.out / "train_classifier.png")


if __name__ == "__main__":
    main()
