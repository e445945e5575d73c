"""Training an encoder on a hierarchy: names are tokenised once, a step encodes the distinct entities of its triples, and a stop loses
nothing.

A step takes `batch` (child, parent) pairs with `wrong` wrong parents each and lowers HiT's loss (scoring.py). The order of pairs, the
wrong parents and with them the whole run follow from the seed. The learning rate rises over the first tenth of the steps and then falls
linearly to 0.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..rates import param_groups
from .families import FAMILY, Families
from .hierarchy import Hierarchy
from .packing import pack
from .scoring import ALPHA, BETA, hierarchy_loss
from .tasks import Pairs, negatives

AMPLITUDE_RATE = 100.0  # times lr * rbe_rate, the same in every layer: what docs/hb-bert.md was measured with
CURVATURE_RATE = 1e-2  # of log(c), a number of order 1; the weights' rates would not move it


@dataclass(frozen=True)
class Options:
    """steps of `batch` pairs. lr: of dense weights; amplitudes take 100 lr rbe_rate, a trained basis 50 lr rbe_rate. hard: share of
    hard negatives. bfloat16: products of the encoder in that type (autocast); points, distances and weights stay float32. shared: wrong
    parents are taken from the batch, in which up to `family` children of a parent come together, and names are encoded without padding:
    families.py, packing.py."""

    steps: int = 300
    batch: int = 32
    wrong: int = 4
    lr: float = 1e-4
    rbe_rate: float = 0.2
    hard: float = 0.5
    alpha: float = ALPHA
    beta: float = BETA
    seed: int = 0
    bfloat16: bool = False
    shared: bool = False
    family: int = FAMILY

    @property
    def kinds(self) -> dict[str, int]:
        """So many wrong parents of each kind a pair."""
        hard = round(self.hard * self.wrong)
        return {"hard": hard, "random": self.wrong - hard}


class Names:
    """Token ids of every entity, int64 [entities, longest], padded. ValueError: a name in which the tokenizer knows no word (the message
    lists some)."""

    def __init__(self, tokenizer: Any, names: Sequence[str], max_length: int = 16) -> None:
        rows = tokenizer(list(names), truncation=True, max_length=max_length, add_special_tokens=True)["input_ids"]
        unknown = [
            name for name, row in zip(names, rows, strict=True) if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in row
        ]
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (" ..." if len(unknown) > 5 else "")
            raise ValueError(
                f"data: {len(unknown)} names hold characters that the model's tokenizer does not know (it reads them "
                f"as {tokenizer.unk_token}): {shown}; spell them otherwise or use a model with another vocabulary"
            )
        self.lengths = torch.tensor([len(row) for row in rows])
        self.ids = torch.full((len(rows), int(self.lengths.max())), tokenizer.pad_token_id or 0)
        for i, row in enumerate(rows):
            self.ids[i, : len(row)] = torch.tensor(row)

    def batch(self, entities: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask) [len(entities), longest of them]."""
        lengths = self.lengths[entities]
        longest = int(lengths.max())
        return self.ids[entities, :longest].to(device), (torch.arange(longest) < lengths[:, None]).long().to(device)

    def batches(self, count: int = 16, size: int = 64, seed: int = 0, device: str = "cpu") -> list[dict[str, Tensor]]:
        """Random names as a model is called with them: what compression is calibrated on."""
        drawn = torch.randperm(len(self.lengths), generator=torch.Generator().manual_seed(seed))[: count * size]
        found = [self.batch(chunk, torch.device(device)) for chunk in drawn.split(size)]
        return [{"input_ids": ids, "attention_mask": mask} for ids, mask in found]


@torch.no_grad()
def encode_all(model: nn.Module, names: Names, batch: int = 256, entities: Tensor | None = None) -> Tensor:
    """Points float32 [entities, d], of all or of those given, in eval mode; entities of equal length together."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    entities = torch.arange(len(names.lengths)) if entities is None else entities
    order = names.lengths[entities].argsort(stable=True)
    parts = [model(*names.batch(entities[chunk], device)).embedding.float() for chunk in order.split(batch)]
    model.train(training)
    points = torch.cat(parts)
    return torch.empty_like(points).index_copy_(0, order.to(device), points)


def encode(model: nn.Module, names: Names, entities: Tensor, device: torch.device) -> Tensor:
    """Points [len(entities), d] for a training step, in two lots, short names and long ones: half of the padding of one."""
    order = names.lengths[entities].argsort(stable=True)
    lots = [lot for lot in order.tensor_split(2) if len(lot)]
    points = torch.cat([model(*names.batch(entities[lot], device)).embedding for lot in lots])
    return points[order.argsort().to(device)]


def encode_packed(model: nn.Module, names: Names, entities: Tensor, device: torch.device) -> Tensor:
    """The same, without padding, for models that take packed rows."""
    lengths = names.lengths[entities]
    packed = pack(names.ids[entities, : int(lengths.max())], lengths)
    return model(**{key: value.to(device) for key, value in packed.items()}).embedding


def draw(hierarchy: Hierarchy, pairs: Pairs, options: Options, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one step: the distinct entities [E], and each triple child, parent, wrong ones as places in them, [batch, 2 + wrong]."""
    generator = random.Random(options.seed * 1_000_003 + step)  # of the step alone: a resumed run draws the same
    chosen = generator.choices(pairs, k=options.batch)
    wrong = [negatives(hierarchy, chosen, kind, count, generator.randrange(2**31)) for kind, count in options.kinds.items() if count]
    triples = np.concatenate([np.array(chosen, dtype=np.int64), *wrong], 1)
    entities, place = np.unique(triples, return_inverse=True)
    return entities, place.reshape(triples.shape)


def optimiser_of(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """AdamW without decay: dense weights at lr, the format's parameters at their own rates, log(c) at CURVATURE_RATE."""
    curvature = [p for name, p in model.named_parameters() if name.endswith("log_c") and p.requires_grad]
    own = {id(p) for p in curvature}
    groups = param_groups(model, options.lr)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
        if group["name"] == "amplitude":
            group["lr"] = options.lr * AMPLITUDE_RATE * options.rbe_rate
        elif group["name"] == "basis":
            group["lr"] *= options.rbe_rate
    if curvature:
        groups.append({"name": "curvature", "params": curvature, "lr": CURVATURE_RATE})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def train(
    model: nn.Module,
    names: Names,
    hierarchy: Hierarchy,
    pairs: Pairs,
    options: Options,
    checkpoint: str | os.PathLike | None = None,
    every: float = 60.0,
    report: Callable[[int, float], None] | None = None,
    stop_at: int | None = None,
    optimiser_for: Callable[[nn.Module, Options], torch.optim.Optimizer] | None = None,
) -> list[float]:
    """Trains `model` in place and returns the loss of every step.

    checkpoint: a file written every `every` seconds and after the last step; if it is there the run goes on where it stopped, to the same
    end. stop_at: leave after this step, as an interruption would. optimiser_for: makes another optimiser than optimiser_of. ValueError: the
    checkpoint is of a run with other options or pairs, or the loss is not finite.
    """
    device = next(model.parameters()).device
    optimiser = (optimiser_for or optimiser_of)(model, options)
    rates = [group["lr"] for group in optimiser.param_groups]
    identity = {**asdict(options), "pairs": len(pairs), "entities": len(hierarchy.names)}
    losses: list[float] = []
    if checkpoint is not None and Path(checkpoint).is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["identity"] != identity:
            differing = {key: (state["identity"].get(key), value) for key, value in identity.items() if state["identity"].get(key) != value}
            raise ValueError(
                f"checkpoint: {checkpoint} is of a run with other settings ({differing}: there, here); delete it to start again"
            )
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
        torch.set_rng_state(state["rng"].cpu())
    families = Families(hierarchy, pairs, options.batch, options.seed, options.family) if options.shared else None
    saved = time.monotonic()
    model.train()
    for step in range(len(losses), options.steps if stop_at is None else min(stop_at, options.steps)):
        drawn = draw(hierarchy, pairs, options, step) if families is None else families.batch(step, *options.kinds.values())
        entities, place = (torch.from_numpy(part) for part in drawn)
        factor = min((step + 1) / max(1, options.steps // 10), (options.steps - step) / max(1, options.steps - options.steps // 10))
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
            points = encode(model, names, entities, device) if families is None else encode_packed(model, names, entities, device)
        points = points.float()[place.to(device)]
        loss = hierarchy_loss(model.manifold, points[:, 0], points[:, 1], points[:, 2:], options.alpha, options.beta)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"lr: the loss of step {step + 1} is {losses[-1]}; the run diverged at lr={options.lr}, use a smaller one")
        if report is not None:
            report(step + 1, losses[-1])
        if checkpoint is not None and (time.monotonic() - saved > every or step + 1 == options.steps or step + 1 == stop_at):
            _save(
                Path(checkpoint),
                {
                    "identity": identity,
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "losses": losses,
                    "rng": torch.get_rng_state(),
                },
            )
            saved = time.monotonic()
    model.eval()
    return losses


def _save(path: Path, state: dict[str, Any]) -> None:
    """Written beside `path` and renamed over it: a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
