"""Calibrated encoding: a layer's codes, gain, residual and bias chosen for what the layer does to the inputs that reach it.

The layer must turn z, its input behind the compressed layers before it, into what the dense layer makes of x. With moments of x and z
(moments.py) that is least squares, min tr((T - Q) H (T - Q)^T), and codes are found by feedback and sweeps (rbe::encode_calibrated) in
turn with the gain that fits them best. Sources: GPTQ (Frantar et al. 2022), LDLQ of QuIP (Chee et al. 2023), targets moved by the prefix's
error as in GPTAQ (Li et al. 2025), alternation of codes and scales as in AQLM (Egiazarian et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .encode import encode_layer, fit_residual, fp16_gain, start_gain
from .layout import Layout
from .linear import RBELinear
from .moments import Moments, Problem, problem_of
from .replace import Found, dense_weight, features
from .walk import Around, Call, Visit, inputs, walk

DAMPINGS = (0.01, 0.1, 1.0)
_HOLD_EVERY = 8  # one sequence in eight judges
_PROBED_ROWS = 48
_GAIN_ROUNDS = 2
_SWEEPS = 1
_LAST_SWEEPS = 2
_FAR_MORE = 3.0
_LARGER_GAINS = (1.4, 2.0, 3.0)


@dataclass
class Calibrated:
    """A layer and how it was made. loss: mean |W x - Q z - shift|^2 over that of |W x|^2 on held-out sequences (None: too few to hold any
    out)."""

    layer: RBELinear
    loss: float | None
    damping: float | None
    note: str = ""


def calibrate_layer(
    module: nn.Module, layout: Layout, basis: nn.Parameter, fit: Moments, held: Moments | None, seed: int = 0
) -> Calibrated:
    """Encodes an nn.Linear or Conv1D for the moments of its input; damping and bias correction are those that lose least on `held`."""
    weight = dense_weight(module).float()
    bias = module.bias
    centred = bias is not None
    judged = held is not None and float(held.weight) > 0
    damping = DAMPINGS[1]
    if judged:
        some = slice(None, None, -(-weight.shape[0] // _PROBED_ROWS))
        losses = {}
        for tried in DAMPINGS:
            problem = problem_of(weight[some], fit, tried, centred)
            gain, codes = _first_codes(problem, layout, basis, seed)
            decoded = _decode(codes, basis, gain, layout, weight.shape[1], seed).to(weight.device)
            losses[tried] = held.loss(weight[some], decoded, problem.shift_of(decoded).to(weight.device) if centred else None)
        damping = min(losses, key=losses.__getitem__)
    problem = problem_of(weight, fit.plus(held) if judged else fit, damping, centred)
    gain, codes, residual = solve(problem, layout, basis, seed)
    decoded = _decode(codes, basis, gain, layout, weight.shape[1], seed, residual).to(weight.device)
    shift = problem.shift_of(decoded).to(weight.device) if centred else None
    loss = held.loss(weight, decoded, shift) if judged else None
    if judged and centred:
        plain = held.loss(weight, decoded, None)
        if plain < loss:
            loss, shift = plain, None
    if shift is not None:
        bias = nn.Parameter((bias.detach().float() + shift).to(bias.dtype), requires_grad=bias.requires_grad)
    layer = RBELinear.from_codes(
        codes.to(weight.device),
        basis,
        gain.to(weight.device),
        bias,
        layout=layout,
        in_features=weight.shape[1],
        seed=seed if layout.seeded else None,
        residual={k: v.to(weight.device) for k, v in residual.items()},
        dtype=module.weight.dtype,
    )
    return Calibrated(layer, loss, problem.damping)


def solve(problem: Problem, layout: Layout, basis: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(gain [m], codes int32 [m, K, M], residual) of the problem, all on the CPU."""
    table = basis.detach().float().cpu()
    if layout.residual in ("int8", "fp8"):  # a residual that fine leaves nothing to weigh
        made = encode_layer(problem.target, layout, table, None, seed)
        return made.gain, made.codes, made.residual
    gain, codes = _first_codes(problem, layout, table, seed)
    if not layout.has_amplitude:
        gain, codes = _alternate(problem, layout, table, gain, codes, seed)
        _with_larger_gain(problem, layout, table, gain, codes, seed)
    codes = _sweep(problem, problem.target, codes, table, gain, layout, seed, _LAST_SWEEPS)
    if layout.residual is None:
        return gain, codes, {}
    n = problem.target.shape[1]
    residual = fit_residual(problem.target - _decode(codes, table, gain, layout, n, seed), layout, problem.hessian, problem.factor)
    if layout.rank or layout.fraction:  # both see the other's work once more
        rest = _decode(codes, table, gain, layout, n, seed, residual) - _decode(codes, table, gain, layout, n, seed)
        codes = _sweep(problem, problem.target - rest, codes, table, gain, layout, seed, _SWEEPS)
        residual = fit_residual(problem.target - _decode(codes, table, gain, layout, n, seed), layout, problem.hessian, problem.factor)
    return gain, codes, residual


def _alternate(problem: Problem, layout: Layout, basis: Tensor, gain: Tensor, codes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    for _ in range(_GAIN_ROUNDS):
        gain = _refit_gain(problem, codes, basis, gain, layout, seed)
        codes = _sweep(problem, problem.target, codes, basis, gain, layout, seed, _SWEEPS)
    return gain, codes


def _with_larger_gain(problem: Problem, layout: Layout, basis: Tensor, gain: Tensor, codes: Tensor, seed: int) -> None:
    """Encodes rows that lose far more than the others, in units of their gain, again with larger gains, which bring large weights into the
    basis's reach; changes gain and codes, in place, where that loses less."""
    lost = _row_losses(problem, codes, basis, gain, layout, seed)
    relative = lost / gain.square()
    rows = (relative > _FAR_MORE * relative.median()).nonzero()[:, 0]
    if len(rows) == 0:
        return
    some = dataclasses.replace(problem, target=problem.target[rows].contiguous(), weight=problem.weight[rows])
    start, least = gain[rows], lost[rows]
    for factor in _LARGER_GAINS:
        tried = fp16_gain(start * factor)
        words = torch.ops.rbe.encode_calibrated(
            some.target, basis, tried, some.hessian, some.factor, **_place(layout, some.target.shape[1], seed), sweeps=0
        )
        tried, words = _alternate(some, layout, basis, tried, words, seed)
        now = _row_losses(some, words, basis, tried, layout, seed)
        better = now < least
        least[better] = now[better]
        gain[rows[better]], codes[rows[better]] = tried[better], words[better]


def _row_losses(problem: Problem, codes: Tensor, basis: Tensor, gain: Tensor, layout: Layout, seed: int) -> Tensor:
    """(t - q) H (t - q)^T of each row [m]."""
    rest = problem.target - _decode(codes, basis, gain, layout, problem.target.shape[1], seed)
    return ((rest @ problem.hessian) * rest).sum(1)


def _place(layout: Layout, n: int, seed: int) -> dict[str, Any]:
    return {"layout": str(layout).partition("+")[0], "in_features": n, "seed": seed if layout.seeded else 0}


def _first_codes(problem: Problem, layout: Layout, basis: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    table = basis.detach().float().cpu()
    place = _place(layout, problem.target.shape[1], seed)
    gain = start_gain(problem.target, table, layout, place)
    return gain, torch.ops.rbe.encode_calibrated(problem.target, table, gain, problem.hessian, problem.factor, **place, sweeps=0)


def _sweep(problem: Problem, target: Tensor, codes: Tensor, basis: Tensor, gain: Tensor, layout: Layout, seed: int, count: int) -> Tensor:
    return torch.ops.rbe.encode_calibrated(
        target, basis, gain, problem.hessian, None, codes, **_place(layout, target.shape[1], seed), sweeps=count
    )


def _refit_gain(problem: Problem, codes: Tensor, basis: Tensor, gain: Tensor, layout: Layout, seed: int) -> Tensor:
    """The gain that minimises the loss for given codes; the old one where that would not be positive."""
    unscaled = _decode(codes, basis, torch.ones_like(gain), layout, problem.target.shape[1], seed)
    turned = unscaled @ problem.hessian
    fitted = (turned * problem.target).sum(1) / (turned * unscaled).sum(1).clamp(min=1e-30)
    return torch.where((fitted > 0) & torch.isfinite(fitted), fp16_gain(fitted), gain)


def _decode(
    codes: Tensor, basis: Tensor, gain: Tensor, layout: Layout, n: int, seed: int, residual: dict[str, Tensor] | None = None
) -> Tensor:
    place = _place(layout, n, seed)
    if not residual:
        return torch.ops.rbe.decode(codes, basis.detach().float().cpu(), gain, **place)
    return torch.ops.rbe.decode(codes, basis.detach().float().cpu(), gain, **{**place, "layout": str(layout)}, **residual)


# ---- a whole model ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def calibrate_model(
    model: nn.Module,
    calls: list[Call],
    chosen: Sequence[Found],
    basis_of: Callable[[Found], nn.Parameter],
    layout_of: Callable[[Found], Layout],
    seeds: dict[str, int],
    put: Callable[[Found, RBELinear], None],
    tick: Callable[[Found, Calibrated], None],
    block_seconds: float = 0.0,
    ready: Callable[[Found], RBELinear | None] = lambda entry: None,
    around: Around = lambda name, block: nullcontext(),
) -> list[dict[str, Any]]:
    """Encodes the layers in order of execution and puts each in place with `put`, so that later ones see what the earlier ones lose.

    A layer that no call reaches is encoded from its weight alone, with a note. block_seconds: for fitting each block of a chain to the
    dense block's outputs when its layers are encoded; returns what that did (tune.py). ready: gives a layer that was encoded before, so that
    it is not encoded again; around: of walk.
    """
    fitted: list[dict[str, Any]] = []
    entries = {entry.name: entry for entry in chosen}
    left = dict(entries)
    for visit in walk(model, calls, list(entries), around):
        for phase in visit.stretch.phases:
            todo = []
            for layer in phase:
                entry = left.pop(visit.stretch.full(layer))
                before = ready(entry)
                if before is None:
                    todo.append(entry)
                else:
                    put(entry, before)
                    tick(entry, Calibrated(before, None, None, "encoded by an earlier run"))
            if not todo:
                continue
            n, device = features(todo[0].module)[0], todo[0].module.weight.device
            fit, held = gather(visit, phase[0], n, device)
            for entry in todo:
                made = calibrate_layer(entry.module, layout_of(entry), basis_of(entry), fit, held, seeds[entry.name])
                put(entry, made.layer)
                tick(entry, made)
        if block_seconds > 0 and visit.stretch.name:
            from .tune import tune_stretch

            fitted.append({"block": visit.stretch.name, **tune_stretch(visit, block_seconds)})
    for name, entry in left.items():
        layer = RBELinear.from_linear(entry.module, layout_of(entry), basis_of(entry), seed=seeds[name])
        put(entry, layer)
        tick(entry, Calibrated(layer, None, None, "no calibration batch reached it: encoded from its weight alone"))
    return fitted


def gather(visit: Visit, layer: str, n: int, device: torch.device) -> tuple[Moments, Moments | None]:
    """Moments of what reaches the layer: of most sequences, and of every eighth, or None where there are fewer than eight."""
    fit, held, count = Moments.empty(n, device, judging=False), Moments.empty(n, device, judging=True), 0
    for dense_call, call in zip(visit.dense_calls, visit.calls, strict=True):
        there, here = inputs(visit.dense, dense_call, [layer])[layer], inputs(visit.stretch.module, call, [layer])[layer]
        if [x.shape for x in there] != [
            z.shape for z in here
        ]:  # routed by what it computes, such as an expert: the dense model sent it other tokens
            there = here
        for x, z in zip(there, here, strict=True):
            sequences = x.shape[0] if x.dim() > 1 else 1
            out = (torch.arange(count, count + sequences, device=x.device) % _HOLD_EVERY) == _HOLD_EVERY - 1
            count += sequences
            tokens = x.numel() // n // sequences
            out = out.repeat_interleave(tokens)
            x, z = x.reshape(-1, n), z.reshape(-1, n)
            if call.mask is not None and call.mask.numel() == len(x):
                real = call.mask.reshape(-1)
                x, z, out = x[real], z[real], out[real]
            fit.add(x[~out], z[~out])
            held.add(x[out], z[out])
    return fit, held if float(held.weight) > 0 else None


def decode_quickly(
    module: nn.Module, layouts: Sequence[Layout], bases: dict[str, Tensor], moments: Moments
) -> Iterator[tuple[Layout, Tensor, Tensor | None]]:
    """To compare layouts: each with the weight [m, n] and what the bias gains [m], on the CPU, that a layer would get without sweeps and
    gain rounds. bases: by the layout without its residual."""
    centred, n = module.bias is not None, features(module)[0]
    problem = problem_of(dense_weight(module), moments, DAMPINGS[1], centred)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for layout in layouts:
        plain = str(layout).partition("+")[0]
        if plain not in found:
            found[plain] = _first_codes(problem, layout, bases[plain], 0)
        gain, codes = found[plain]
        decoded = _decode(codes, bases[plain], gain, layout, n, 0)
        if layout.residual is not None:
            residual = fit_residual(problem.target - decoded, layout, problem.hessian, problem.factor)
            decoded = _decode(codes, bases[plain], gain, layout, n, 0, residual)
        yield layout, decoded, problem.shift_of(decoded) if centred else None
