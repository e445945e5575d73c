"""Which layout each layer gets under a budget of bytes: the mix that costs the model least, by measured loss.

Every layer is encoded in every candidate, put in place alone, and what the model's output loses by that on some calibration batches is
measured (without calibration: the relative squared error of its weights, times their number). Losses of layers add up nearly enough. For a
price L of a byte each layer takes the candidate with the least loss + L * bytes; the mixes of all prices are the frontier (the convex hull
of what mixes can reach). The largest that fits is filled up with the single changes that buy most loss for what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .codebook import fit_basis, round_count
from .encode import encode_layer
from .layout import Layout
from .progress import Progress
from .replace import Found, dense_weight, features, is_conv1d, stored_bytes

CANDIDATES = ("rbe8_g8", "rbe8x2_g8", "rbe8x2_g8+lr8", "rbe8x3_g8", "rbe8x4_g8", "rbe8x4_g8+int8")
_JUDGES = 2  # batches
_PROBED_ROWS = 256  # without calibration


@dataclass
class Choice:
    """layouts: name -> Layout. losses: name -> what that layer alone was measured to lose in it. frontier: dicts with bits_per_weight, bytes (of
    the converted layers), loss and how many layers take which layout. bases: the tables fitted on the way, by layout without residual."""

    layouts: dict[str, Layout]
    losses: dict[str, float]
    frontier: list[dict[str, Any]]
    bases: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    layout: Layout
    bytes: int
    loss: float


def choose(
    model: nn.Module,
    chosen: Sequence[Found],
    calls: list | None,
    bits: float | None,
    max_megabytes: float | None,
    seed: int = 0,
    progress: bool = True,
    candidates: Sequence[str] = CANDIDATES,
) -> Choice:
    """The layout of every layer. ValueError: a budget that even the smallest mix exceeds, or is not a positive number."""
    limit = byte_limit(model, chosen, bits, max_megabytes)
    layouts = [Layout.parse(text) for text in candidates]
    smallest = min(mix_bytes(chosen, {entry.name: layout for entry in chosen}) for layout in layouts)
    if smallest > limit:
        name, value = ("bits", bits) if bits is not None else ("max_megabytes", max_megabytes)
        least = 8 * smallest / _weights(chosen) if bits is not None else (smallest + rest_bytes(model, chosen)) / 1e6
        raise ValueError(
            f"{name}: is {value!r}, must be at least {least:.3f}, the least that the smallest layout takes with everything counted"
        )
    bases = _bases(chosen, layouts, seed, progress)
    measure = _weight_losses if calls is None else _model_losses
    with torch.no_grad():
        losses = measure(model, chosen, layouts, bases, calls, seed, progress)
    options = {
        entry.name: [
            Option(layout, layout.bytes(*reversed(features(entry.module)), basis=False), losses[entry.name][str(layout)])
            for layout in layouts
        ]
        for entry in chosen
    }
    mixes = frontier(options)
    # in small models the tables weigh as much as the layers, and one layout for all, with one table, may be the better start
    uniform = [{name: entries[index] for name, entries in options.items()} for index in range(len(layouts))]
    fitting = [mix for mix in (*mixes, *uniform) if _mix_bytes(mix) <= limit]
    starts = [min((mix for mix in mixes if mix in fitting), key=_mix_loss, default=fitting[0]), *(mix for mix in uniform if mix in fitting)]
    filled = [fill_up(options, mix, limit) for mix in starts]
    best = min((*filled, *fitting), key=lambda mix: (_mix_loss(mix), _mix_bytes(mix)))
    size = _mix_bytes(best)
    rows = undominated([_row(mix, chosen) for mix in (best, *mixes, *uniform)])
    for row in rows:
        row["chosen"] = row["bytes"] == size
    return Choice({name: option.layout for name, option in best.items()}, {name: option.loss for name, option in best.items()}, rows, bases)


def byte_limit(model: nn.Module, chosen: Sequence[Found], bits: float | None, max_megabytes: float | None) -> float:
    """Bytes that the converted layers may take, bases included."""
    name, value = ("bits", bits) if bits is not None else ("max_megabytes", max_megabytes)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{name}: is {value!r}, must be a positive number")
    return value * _weights(chosen) / 8 if bits is not None else value * 1e6 - rest_bytes(model, chosen)


def rest_bytes(model: nn.Module, chosen: Sequence[Found]) -> int:
    """Bytes of everything that is not converted."""
    return stored_bytes(model) - sum(weight.numel() * weight.element_size() for weight in (dense_weight(entry.module) for entry in chosen))


def _weights(chosen: Sequence[Found]) -> int:
    return sum(dense_weight(entry.module).numel() for entry in chosen)


def mix_bytes(chosen: Sequence[Found], layouts: dict[str, Layout]) -> int:
    """Codes, gains, residuals and each basis once."""
    own = sum(layouts[entry.name].bytes(*reversed(features(entry.module)), basis=False) for entry in chosen)
    return own + _basis_bytes(layouts.values())


def _basis_bytes(layouts: Iterable[Layout]) -> int:
    return sum({(layout.fields, layout.group, layout.stages): layout.basis_bytes for layout in layouts}.values())


# ---- frontier --------------------------------------------------------------------------------------------------------------------
Mix = dict[str, Option]


def _mix_bytes(mix: Mix) -> int:
    return sum(option.bytes for option in mix.values()) + _basis_bytes(option.layout for option in mix.values())


def _mix_loss(mix: Mix) -> float:
    return sum(option.loss for option in mix.values())


def frontier(options: dict[str, list[Option]]) -> list[Mix]:
    """The mixes that are best at some price of a byte, from the smallest to the largest.

    On a layer's convex hull of (bytes, loss) each step to a larger option has a price, loss saved a byte; taken from the dearest on, over
    all layers, the steps pass through exactly these mixes.
    """
    steps: list[tuple[float, str, Option]] = []
    mix: Mix = {}
    for name, entries in options.items():
        hull = convex_hull(entries)
        mix[name] = hull[0]
        steps += [((before.loss - after.loss) / (after.bytes - before.bytes), name, after) for before, after in zip(hull, hull[1:], strict=False)]
    mixes = [dict(mix)]
    for _, name, option in sorted(steps, key=lambda step: (-step[0], step[1])):
        mix[name] = option
        mixes.append(dict(mix))
    return mixes


def convex_hull(entries: list[Option]) -> list[Option]:
    """The options that some price of a byte makes best, by rising bytes: falling losses, prices falling too."""
    hull: list[Option] = []
    for option in sorted(entries, key=lambda option: (option.bytes, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and (hull[-2].loss - hull[-1].loss) * (option.bytes - hull[-1].bytes) <= (hull[-1].loss - option.loss) * (
            hull[-1].bytes - hull[-2].bytes
        ):
            hull.pop()
        hull.append(option)
    return hull


def fill_up(options: dict[str, list[Option]], mix: Mix, limit: float) -> Mix:
    """Single changes, the one that saves most loss a byte first, while the mix stays within the limit; one that costs no bytes comes
    before all."""
    mix = dict(mix)
    while True:
        now, best = _mix_bytes(mix), None
        for name, entries in options.items():
            for option in entries:
                saved = mix[name].loss - option.loss
                if saved <= 0:
                    continue
                more = _mix_bytes({**mix, name: option}) - now
                if now + more <= limit and (best is None or saved / max(more, 1) > best[0]):
                    best = (saved / max(more, 1), name, option)
        if best is None:
            return mix
        mix[best[1]] = best[2]


def _row(mix: Mix, chosen: Sequence[Found]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for option in mix.values():
        counts[str(option.layout)] = counts.get(str(option.layout), 0) + 1
    size = _mix_bytes(mix)
    return {
        "bits_per_weight": 8 * size / _weights(chosen),
        "bytes": size,
        "loss": sum(option.loss for option in mix.values()),
        "layers": counts,
    }


def undominated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By rising bytes, the rows that lose less than every row of as few bytes: a mix of several bases can take more and lose more."""
    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["loss"])):
        if not kept or row["loss"] < kept[-1]["loss"]:
            kept.append(row)
    return kept


# ---- losses ----------------------------------------------------------------------------------------------------------------------
def _bases(chosen: Sequence[Found], layouts: Sequence[Layout], seed: int, progress: bool) -> dict[str, Tensor]:
    plain = {_plain(layout): layout for layout in layouts}
    weights = [dense_weight(entry.module) for entry in chosen]
    with Progress("budget: bases", sum(round_count(layout) for layout in plain.values()), progress) as bar:
        return {text: fit_basis(weights, text, seed, lambda what: bar.step(1, what)) for text in plain}


def _plain(layout: Layout) -> str:
    return str(layout).partition("+")[0]


def _weight_losses(
    model: nn.Module, chosen: Sequence[Found], layouts: Sequence[Layout], bases: dict[str, Tensor], calls: None, seed: int, progress: bool
) -> dict[str, dict[str, float]]:
    losses: dict[str, dict[str, float]] = {}
    with Progress("budget: measure layers", len(chosen) * len(layouts), progress) as bar:
        for entry in chosen:
            weight = dense_weight(entry.module).float().cpu()
            some = weight[:: -(-len(weight) // _PROBED_ROWS)]
            norm = float(some.square().sum())
            losses[entry.name] = {}
            for layout in layouts:
                made = encode_layer(some, layout, bases[_plain(layout)])
                decoded = torch.ops.rbe.decode(
                    made.codes, made.basis, made.gain, None, **made.residual, layout=str(layout), in_features=some.shape[1]
                )
                losses[entry.name][str(layout)] = float((some - decoded).square().sum()) / norm * weight.numel() if norm > 0 else 0.0
                bar.step(1, entry.name)
    return losses


def _model_losses(
    model: nn.Module, chosen: Sequence[Found], layouts: Sequence[Layout], bases: dict[str, Tensor], calls: list, seed: int, progress: bool
) -> dict[str, dict[str, float]]:
    """What the model's output loses when one layer alone is encoded, calibrated without sweeps, in a layout."""
    from .calibrate import decode_quickly, gather
    from .tune import distance
    from .walk import output_tensor, walk

    entries = {entry.name: entry for entry in chosen}
    judges = calls[:: -(-len(calls) // _JUDGES)][:_JUDGES]
    training = [module for module in model.modules() if module.training]
    model.eval()
    losses: dict[str, dict[str, float]] = {}
    try:
        wanted = [output_tensor(call.run(model)).float() for call in judges]
        with Progress("budget: measure layers", len(chosen) * len(layouts), progress) as bar:
            for visit in walk(model, calls, list(entries)):
                for phase in visit.stretch.phases:
                    first = entries[visit.stretch.full(phase[0])].module
                    fit, held = gather(visit, phase[0], features(first)[0], first.weight.device)
                    moments = fit if held is None else fit.plus(held)
                    for layer in phase:
                        entry = entries[visit.stretch.full(layer)]
                        losses[entry.name] = {}
                        for layout, weight, shift in decode_quickly(entry.module, layouts, bases, moments):
                            with _changed(entry.module, weight, shift):
                                parts = [
                                    float(distance(call.run(model), want, call.mask)) for call, want in zip(judges, wanted, strict=True)
                                ]
                            losses[entry.name][str(layout)] = max(0.0, sum(parts) / len(parts))  # of a layer that the output does not use
                            bar.step(1, entry.name)
    finally:
        for module in training:
            module.training = True
    for entry in chosen:  # no batch reached it
        losses.setdefault(entry.name, {str(layout): 0.0 for layout in layouts})
    return losses


@contextmanager
def _changed(module: nn.Module, weight: Tensor, shift: Tensor | None) -> Iterator[None]:
    """While it lasts the module multiplies by another weight [m, n] and adds `shift` [m] to its bias."""
    old = [(parameter, parameter.data) for parameter in (module.weight, module.bias) if parameter is not None]
    module.weight.data = (weight.t() if is_conv1d(module) else weight).to(module.weight)
    if shift is not None:
        module.bias.data = module.bias.data + shift.to(module.bias)
    try:
        yield
    finally:
        for parameter, values in old:
            parameter.data = values
