"""Which basis vector a code uses: fixed random ones against ways of choosing them while the model trains. Validation loss of a small character GPT.

2 blocks, d = 128, rbe22_g16 (idx stored, so that no choice costs bytes), seeded basis, small start; otherwise as benchmarks/train/gpt.py, in 300 steps.

    fixed random      idx as convert draws it
    spread evenly     in each group every basis vector serves equally many rows, in random order
    exchange          Reindexer: codes of least amplitude, kept where the loss falls           a tenth of them every 25 steps, on a cosine to 0 at 3/4 of the steps
    gradient          Reindexer: RigL's rule                                                   the same
    soft choice       two random candidates a code, mixed by p = sigmoid(theta / temperature), |p, 1 - p| = 1; the temperature falls from 1 to 0.05 at 3/4 of the
                      steps, then the likelier one stays. A dense weight is built for it while it mixes; theta at two rates

    python benchmarks/train/choice.py --data DIR        # DIR/tinyshakespeare/input.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402
from gpt import GPT, LAST, START, WARM_UP, Text, validation_loss  # noqa: E402
from runs import Runs, cosine  # noqa: E402

import rbe_torch  # noqa: E402
from rbe_torch.codes import IDX_SHIFT  # noqa: E402
from rbe_torch.reindex import layer_idx  # noqa: E402

LAYOUT, WIDTH, UNTIL, COLDEST = "rbe22_g16", 128, 0.75, 0.05
METHODS = {"fixed random": 0.0, "spread evenly": 0.0, "exchange": 0.0, "gradient": 0.0, "soft choice, theta 0.01": 0.01, "soft choice, theta 0.05": 0.05}


def set_idx(layer: rbe_torch.RBELinear, idx: Tensor) -> None:
    words = torch.ops.rbe.unpack(layer.packed, **layer._options) & ~(255 << IDX_SHIFT)
    layer.packed = torch.ops.rbe.pack(words | idx.to(torch.int32) << IDX_SHIFT, **layer._options)


def spread(layer: rbe_torch.RBELinear, generator: torch.Generator) -> None:
    rows, groups, _ = layer_idx(layer).shape
    columns = [(torch.randperm(rows, generator=generator) + torch.randint(256, (), generator=generator)) % 256 for _ in range(groups)]
    set_idx(layer, torch.stack(columns, 1)[..., None])


class SoftChoice(nn.Module):
    """An RBELinear of one stage whose codes have two candidates until `settle`."""

    def __init__(self, layer: rbe_torch.RBELinear, generator: torch.Generator) -> None:
        super().__init__()
        self.layer, self.temperature = layer, 1.0
        self.first = layer_idx(layer)[..., 0]
        self.second = torch.randint(256, self.first.shape, generator=generator)
        self.theta = nn.Parameter(torch.zeros(self.first.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.temperature:
            return self.layer(x)
        p, amplitude, basis = (self.theta / self.temperature).sigmoid()[..., None], self.layer.amplitude, self.layer.basis[0]
        vector = (p * basis[self.first] + (1 - p) * basis[self.second]) / (p * p + (1 - p) ** 2).sqrt()
        scale = amplitude.sign() * (2 * amplitude.abs().clamp(max=1)).expm1()
        weight = (self.layer.gain[:, None, None] * scale * vector).flatten(1)[:, : self.layer.in_features]
        return F.linear(x, weight, self.layer.bias)

    @torch.no_grad()
    def settle(self) -> None:
        self.temperature = 0.0
        set_idx(self.layer, torch.where(self.theta > 0, self.first, self.second)[..., None])


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def train(method: str, text: Text, steps: int, seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    model, generator = GPT(text.characters, nn.Linear, WIDTH), torch.Generator().manual_seed(1000 + seed)
    rbe_torch.convert(model, LAYOUT, seed=seed, basis="seeded", include=r"^blocks\.", nonlinearity="linear", init_scale=START)
    drawing, until = torch.Generator().manual_seed(seed), round(UNTIL * steps)
    if method == "spread evenly":
        for layer in (m for m in model.modules() if isinstance(m, rbe_torch.RBELinear)):
            spread(layer, drawing)
    if METHODS[method]:
        for block in model.blocks:
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, SoftChoice(getattr(block, name), drawing))
    choices = [m for m in model.modules() if isinstance(m, SoftChoice)]
    thetas = {id(choice.theta) for choice in choices}
    groups = rbe_torch.param_groups(model, lr=1.2e-3, rest=1e-2)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in thetas]
    if choices:
        groups.append({"params": [choice.theta for choice in choices], "lr": METHODS[method]})
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = cosine(optimiser, steps, WARM_UP, LAST)
    batch = [text.batch(generator)]
    reindexer = None
    if method in ("exchange", "gradient"):
        reindexer = rbe_torch.Reindexer(model, optimiser, until=until, interval=25, method=method, closure=lambda: loss_of(model, *batch[0]))
    for step in range(steps):
        for choice in choices:
            if step == until:
                choice.settle()
            elif step < until:
                choice.temperature = COLDEST ** (step / until)
        loss = loss_of(model, *batch[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if reindexer is not None:
            reindexer.step()
        batch[0] = text.batch(generator)
    rbe_torch.finish_training(model)
    moved = {} if reindexer is None else {"moved": reindexer.moved, "accepted": reindexer.accepted, "refused": reindexer.refused}
    return {"method": method, "steps": steps, "seed": seed, "loss": round(validation_loss(model, text), 4), **moved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text, runs = Text(options.data), Runs(options.out / "train_choice.json")
    for seed in range(options.seeds):
        for method in METHODS:
            if not runs.holds(method=method, steps=options.steps, seed=seed):
                runs.add(train(method, text, options.steps, seed))
    mine = [row for row in runs.rows if row["steps"] == options.steps]
    table = [{"method": method, **{f"seed {row['seed']}": f"{row['loss']:.3f}" for row in mine if row["method"] == method}} for method in METHODS]
    print(harness.table(table, list(table[0])))


if __name__ == "__main__":
    main()
