"""A character GPT trained from scratch, every linear layer of its blocks replaced: validation loss against bytes, for RBE and its rivals.

2 blocks, d = 256, 4 heads, context 64, batch 16, tinyshakespeare (the first 90 % trains, the last 10 % validates, all of it). Same steps, same batches,
AdamW (betas 0.9, 0.98), cosine to 3 % after 60 steps of warm-up, bfloat16 autocast for all; all but dense layers start with small weights. Bytes are those
of the blocks' linear weights: codes, gains and the basis unless a seed gives it; weights and scales for the rivals. "smaller dense" has a smaller d, and so
smaller embeddings too, which no column counts.

    python benchmarks/train/gpt.py --data DIR --seeds 3           # DIR/tinyshakespeare/input.txt; every contestant at its best rate
    python benchmarks/train/gpt.py --data DIR --tune --steps 400  # every contestant at each of its rates

A run that is in the JSON already is not repeated, so that a table can be made in pieces.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
from runs import Panel, Runs, at_best_rate, cosine, picture, spread  # noqa: E402
from small_layers import BlockSparse, CodesAndLowRank, LittleBit, LowRank, Quantised, Simulated  # noqa: E402

import rbe_torch  # noqa: E402

CONTEXT, BATCH, WARM_UP, LAST = 64, 16, 60, 0.03
START = 0.4  # of the size that keeps the variance of activations; whole weights do better without it (docs/training-experiments.md, "A small start")


class Block(nn.Module):
    def __init__(self, d: int, hidden: int, heads: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out, self.up, self.down = linear(d, 3 * d), linear(d, d), linear(d, hidden), linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        scores = (q * (d // self.heads) ** -0.5 @ k.transpose(-1, -2)).masked_fill(later, -math.inf)  # the fused CPU kernel takes 17 ms a step longer
        y = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).reshape(batch, tokens, d)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """tokens [batch, context] -> logits [batch, context, characters]"""

    def __init__(self, characters: int, linear: Callable[[int, int], nn.Module], d: int = 256, hidden: int | None = None, heads: int = 4,
                 blocks: int = 2, context: int = CONTEXT) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(characters, d), nn.Embedding(context, d)
        for embedding in (self.token, self.place):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(d, hidden or 4 * d, heads, linear) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Contestant:
    """rates: learning rates of the blocks' linear weights to try, the best first after tuning; rest: that of everything else for each. RBE's rates are those of a dense weight that moves as far (rbe_torch.param_groups)."""

    name: str
    kind: str
    options: tuple[tuple[str, object], ...]
    rates: tuple[float, ...]
    rest: tuple[float, ...]
    d: int = 256
    hidden: int | None = None
    start: float = START


def contestant(name: str, kind: str, rates: tuple[float, ...], rest: tuple[float, ...], d: int = 256, hidden: int | None = None,
               start: float = START, **options) -> Contestant:
    return Contestant(name, kind, tuple(sorted(options.items())), rates, rest, d, hidden, start)


CONTESTANTS = [
    contestant("RBE rbe4r_g9, seeded basis", "rbe", (1.7e-3, 1.2e-3, 2.4e-3, 8.5e-4), (1e-2, 1e-2, 1e-2, 1e-2), layout="rbe4r_g9", basis="seeded"),
    contestant("block sparse int4", "sparse", (1.2e-2, 1.7e-2, 2.4e-2, 8.5e-3), (1.2e-2, 1.2e-2, 1.2e-2, 1.2e-2), bits=4, kept=0.115),
    contestant("block sparse int8", "sparse", (1.2e-2, 6e-3, 2.4e-2), (1.2e-2, 1.2e-2, 1.2e-2), bits=8, kept=0.0575),
    contestant("smaller dense int4", "dense", (2e-3, 4e-3, 8e-3), (1e-2, 1e-2, 1e-2), d=88, hidden=384, start=1.0, bits=4),
    contestant("smaller dense int8", "dense", (8e-3, 4e-3, 2e-3), (1e-2, 1e-2, 1e-2), d=64, start=1.0, bits=8),
    contestant("low rank int4", "lowrank", (1e-3, 2e-3, 4e-3, 1e-3), (1e-2, 1e-2, 1e-2, 3e-3), bits=4, rank=22),
    contestant("low rank int8", "lowrank", (2e-3, 1e-3, 4e-3, 1e-3), (1e-2, 1e-2, 1e-2, 3e-3), bits=8, rank=11),
    contestant("LittleBit", "littlebit", (1e-2, 3e-2, 3e-3), (1e-2, 1e-2, 1e-2), rank=80),
    contestant("RBE rbe9r_g18, seeded basis", "rbe", (1.2e-3, 2e-3, 6e-4), (1e-2, 1e-2, 1e-2), layout="rbe9r_g18", basis="seeded"),
    contestant("RBE rbe22_g64", "rbe", (1.2e-3, 2e-3, 6e-4), (1e-2, 1e-2, 1e-2), layout="rbe22_g64", basis="trained"),
    contestant("RBE rbe4r_g3, seeded basis", "rbe", (1.2e-3, 2e-3, 6e-4), (1e-2, 1e-2, 1e-2), layout="rbe4r_g3", basis="seeded"),
    *(contestant(f"simulated {bits} bits, g = {group}", "simulated", (1.7e-3,), (1e-2,), bits=bits, group=group) for bits, group in ((3, 7), (4, 9), (5, 11), (6, 14))),
    *(contestant(f"simulated 4 bits, g = {group}, low rank {rank} int{bits}", "residual", (1.7e-3, 1.2e-3, 2.4e-3), (1e-2, 1e-2, 1e-2), bits=4, group=group, rank=rank, factor_bits=bits)
      for group, rank, bits in ((10, 3, 4), (11, 2, 8), (14, 8, 4))),
    contestant("whole dense int8", "dense", (2e-3, 2e-3, 4e-3), (1e-2, 2e-3, 4e-3), start=1.0, bits=8),
]
MADE: dict[str, Callable[..., nn.Module]] = {"dense": Quantised, "sparse": BlockSparse, "lowrank": LowRank, "littlebit": LittleBit, "simulated": Simulated, "residual": CodesAndLowRank}


def build(c: Contestant, characters: int, seed: int) -> tuple[GPT, float]:
    """The model and the bytes of its blocks' linear weights."""
    torch.manual_seed(seed)
    options = dict(c.options)
    if c.kind != "rbe":
        model = GPT(characters, lambda n, m: MADE[c.kind](n, m, **options), c.d, c.hidden)
        layers = [layer for block in model.blocks for layer in (block.qkv, block.out, block.up, block.down)]
        for layer in layers:
            layer.shrink(c.start)
        return model, sum(layer.bytes for layer in layers)
    model = GPT(characters, nn.Linear, c.d, c.hidden)  # with nonlinearity="linear" weights get variance 1 / n before they shrink, as the rivals' do
    report = rbe_torch.convert(model, options["layout"], seed=seed, basis=str(options["basis"]), include=r"^blocks\.", nonlinearity="linear", init_scale=c.start)
    for layer in model.modules():
        if isinstance(layer, rbe_torch.RBELinear):
            layer.bias.data.zero_()
    return model, report.compressed_bytes


def groups_of(model: nn.Module, c: Contestant, which: int) -> list[dict]:
    rate, rest = c.rates[which], c.rest[which]
    if c.kind == "rbe":
        return [{**group, "weight_decay": 0.0} for group in rbe_torch.param_groups(model, lr=rate, rest=rest)]
    rates: dict[int, float] = {}
    for layer in model.modules():
        if isinstance(layer, Simulated):
            rates[id(layer.amplitude)] = rate * layer.rate
        elif isinstance(layer, (Quantised, LittleBit)):
            rates |= {id(p): rate for name, p in layer.named_parameters(recurse=False) if name in ("weight", "u", "v")}
    by_rate: dict[float, list[nn.Parameter]] = {}
    for p in model.parameters():
        by_rate.setdefault(rates.get(id(p), rest), []).append(p)
    return [{"params": parameters, "lr": lr, "weight_decay": 0.0} for lr, parameters in by_rate.items()]


class Text:
    def __init__(self, data: Path) -> None:
        path = data / "tinyshakespeare" / "input.txt"
        if not path.is_file():
            raise SystemExit(f"--data: {path} is missing; it is karpathy/char-rnn's data/tinyshakespeare/input.txt")
        text = path.read_text()
        places = {character: place for place, character in enumerate(sorted(set(text)))}
        values = torch.tensor([places[character] for character in text])
        self.characters, cut = len(places), int(0.9 * len(values))
        self.train, self.valid = values[:cut], values[cut:]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(self.train, torch.randint(0, len(self.train) - CONTEXT - 1, (BATCH,), generator=generator))


def windows(values: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    at = starts[:, None] + torch.arange(CONTEXT)
    return values[at], values[at + 1]


@torch.no_grad()
def validation_loss(model: nn.Module, text: Text) -> float:
    """Nats a character over every window of the validation text."""
    total, count = 0.0, 0
    for starts in torch.arange(0, len(text.valid) - CONTEXT - 1, CONTEXT).split(64):
        x, y = windows(text.valid, starts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        total += float(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum"))
        count += y.numel()
    return total / count


def train(c: Contestant, which: int, text: Text, steps: int, seed: int) -> dict[str, object]:
    model, size = build(c, text.characters, seed)
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimiser = torch.optim.AdamW(groups_of(model, c, which), betas=(0.9, 0.98), fused=True)
    schedule = cosine(optimiser, steps, WARM_UP, LAST)
    watch = rbe_torch.TrainingWatch(model, interval=100)
    generator, clock = torch.Generator().manual_seed(1000 + seed), time.thread_time
    began = clock()
    for _ in range(steps):
        x, y = text.batch(generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimiser.zero_grad()
        loss.backward()
        watch.step(loss)
        optimiser.step()
        schedule.step()
    seconds = (clock() - began) / steps
    if c.kind == "rbe":
        rbe_torch.finish_training(model)  # what is evaluated is what would be saved
    state = sum(value.numel() * value.element_size() for entry in optimiser.state.values() for value in entry.values() if isinstance(value, Tensor))
    return {
        "name": c.name, "kB": round(size / 1e3, 1), "steps": steps, "lr": c.rates[which], "rest": c.rest[which],
        "start": c.start, "seed": seed, "loss": round(validation_loss(model, text), 4), "s/step": round(seconds, 4),
        "trained values": values, "optimiser MB": round(state / 1e6, 2),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def summary(rows: list[dict], steps: int) -> list[dict[str, object]]:
    """One row a contestant."""
    table = []
    for name in (c.name for c in CONTESTANTS):
        mine = [row for row in rows if row["name"] == name and row["steps"] == steps]
        if mine:
            best, tried = at_best_rate(mine, ("lr", "rest", "start"), lambda row: row["loss"])
            first = {key: best[0].get(key, "") for key in ("kB", "lr", "rest", "start", "optimiser MB")}
            table.append({"name": name, **spread(best, "loss"), "seeds": len(best), "rates tried": tried, **first, "s/step": min(row["s/step"] for row in best)})
    return sorted(table, key=lambda row: (row["kB"] > 150, row["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tune", action="store_true", help="every rate, one seed")
    parser.add_argument("--rate", type=int, default=0, help="which of the rates, from 0")
    parser.add_argument("--only", default="", help="contestants whose name contains one of these, separated by |")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = Text(options.data)
    runs = Runs(options.out / "train_gpt.json", start=1.0)
    chosen = [c for c in CONTESTANTS if any(part in c.name for part in options.only.split("|"))]
    for seed in range(1 if options.tune else options.seeds):
        for c in chosen:
            for which in range(len(c.rates)) if options.tune else [options.rate]:
                if not runs.holds(name=c.name, steps=options.steps, lr=c.rates[which], rest=c.rest[which], start=c.start, seed=seed):
                    runs.add(train(c, which, text, options.steps, seed))
    table = summary(runs.rows, options.steps)
    print(harness.table(table, list(table[0])))
    panel = Panel(f"character GPT, {options.steps} steps", table, "kB", "loss", "bytes of the linear weights, kB", "validation loss, nats a character")
    picture([panel], options.out / "train_gpt.png")


if __name__ == "__main__":
    main()
