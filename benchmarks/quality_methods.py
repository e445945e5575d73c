"""The methods of quality.py and quality_decoder.py: rbe_torch's own, and rivals.py's quantisers put through a whole model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import rivals
import torch
from quality_rows import Methods, Result, Rows, Task
from torch import Tensor, nn

import rbe_torch
from rbe_torch import calibrate, models, moments, replace, tune, walk

CPU = torch.device("cpu")
Quantised = tuple[Tensor, float]  # what a weight [m, n] decodes to, bits a weight


# ---- rbe_torch ---------------------------------------------------------------------------------------------------------------------
def ours(task: Task, layout: str = "rbe8x2_g8", **options: Any) -> Result:
    """compress(model, layout, ...). The notes have the mean relative squared error of weights, the largest |W - Q| / |W| of a layer, and the
    layers' mean output error; with bits= how many layers got which layout, of how many mixes."""
    model = models.load_dense(task.source)
    report = rbe_torch.compress(model, layout, **options)
    notes: dict[str, Any] = {"relative_error": report.relative_error, "worst_norm": max(row.relative_error for row in report.converted) ** 0.5}
    lost = [row.output_error for row in report.converted if row.output_error is not None]
    if lost:
        notes["output_error"] = sum(lost) / len(lost)
    if report.frontier:
        layouts = [row.layout for row in report.converted]
        notes |= {"layers": {layout: layouts.count(layout) for layout in sorted(set(layouts))}, "mixes": len(report.frontier)}
    return model, report.bits_per_weight, notes


def tuned(task: Task, rows: Rows, name: str, minutes: float, layout: str = "rbe8x2_g8", **options: Any) -> Result:
    """The calibrated model, which is kept as a row of its own, distilled for some minutes on the sentences `more`."""
    start = time.monotonic()
    model, bits, notes = ours(task, layout, calibration=task.calibration, **options)
    rows.keep(f"{name} calibrated", {"bits": bits, "seconds": time.monotonic() - start, **task.score(model), **notes})
    return model, bits, {"tuning": tune.tune_model(model, models.load_dense(task.source), walk.calls_of(task.more, CPU), 60 * minutes)}


# ---- rivals ------------------------------------------------------------------------------------------------------------------------
def from_weights(task: Task, quantise: Callable[[Tensor], Quantised]) -> Result:
    model, weights, stored = models.load_dense(task.source), 0, 0.0
    for entry in replace.find_linears(model):
        if entry.convertible:
            weight = replace.dense_weight(entry.module).float().contiguous()
            decoded, bits = quantise(weight)
            set_weight(entry.module, decoded)
            weights, stored = weights + weight.numel(), stored + bits * weight.numel()
    return model, stored / weights, {}


@torch.no_grad()
def from_inputs(task: Task, quantise: Callable[[Tensor, Tensor], Quantised]) -> Result:
    """quantise(W [m, n], X^T X [n, n]), as published for GPTQ and AQLM. The notes have `lost` of every layer."""
    model, weights, stored = models.load_dense(task.source), 0, 0.0
    lost: dict[str, float] = {}
    for name, module, hessian in behind_the_prefix(task, model):
        weight = replace.dense_weight(module).float().contiguous()
        decoded, bits = quantise(weight, hessian)
        set_weight(module, decoded)
        weights, stored = weights + weight.numel(), stored + bits * weight.numel()
        lost[name] = lost_under(weight, decoded, hessian)
    return model, stored / weights, {"lost": lost}


@torch.no_grad()
def behind_the_prefix(task: Task, model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Each layer's name and module, in order of execution, with X^T X [n, n] of what reaches it behind the layers that the caller has
    changed so far."""
    for visit, layer, members in phases(task, model):
        n = replace.features(members[0][1])[0]
        hessian = torch.zeros(n, n)
        for call in visit.calls:
            for z in walk.inputs(visit.stretch.module, call, [layer])[layer]:
                z = z[call.mask] if call.mask is not None and z.shape[:-1] == call.mask.shape else z.flatten(0, -2)
                hessian.addmm_(z.t(), z)
        for name, module in members:
            yield name, module, hessian


def phases(task: Task, model: nn.Module) -> Iterator[tuple[walk.Visit, str, list[tuple[str, nn.Module]]]]:
    """The visits of the walk, and what shares an input in them: the first layer's name below the visit's module, all layers' names and
    modules."""
    entries = {entry.name: entry for entry in replace.find_linears(model) if entry.convertible}
    for visit in walk.walk(model, walk.calls_of(task.calibration, CPU), list(entries)):
        for phase in visit.stretch.phases:
            yield visit, phase[0], [(name, entries[name].module) for name in map(visit.stretch.full, phase)]


def lost_under(weight: Tensor, decoded: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) over tr(W H W^T): the relative squared error of the layer's outputs."""
    return energy(weight - decoded, hessian) / energy(weight, hessian)


def energy(weight: Tensor, hessian: Tensor) -> float:
    return float(((weight @ hessian) * weight).sum())


@torch.no_grad()
def gptq_with_our_moments(task: Task, bits: int) -> Result:
    """GPTQ with tokens of equal size, targets that undo the prefix's error, the damping that held-out sequences choose, bias correction."""
    model = models.load_dense(task.source)
    for visit, layer, members in phases(task, model):
        fit, held = calibrate.gather(visit, layer, replace.features(members[0][1])[0], CPU)
        for _, module in members:
            weight, centred = replace.dense_weight(module), module.bias is not None
            tries = []
            for damping in calibrate.DAMPINGS:
                problem = moments.problem_of(weight, fit, damping, centred)
                decoded = rivals.gptq(problem.target, problem.factor, bits)
                tries.append((held.loss(weight, decoded, problem.shift_of(decoded) if centred else None), damping))
            problem = moments.problem_of(weight, fit.plus(held), min(tries)[1], centred)
            decoded = rivals.gptq(problem.target, problem.factor, bits)
            set_weight(module, decoded)
            shift = problem.shift_of(decoded)
            if centred and held.loss(weight, decoded, shift) < held.loss(weight, decoded, None):
                module.bias.data += shift
    return model, rivals.integer_bits(bits), {}


def dynamic_int8(task: Task) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this will move to another package
        model = torch.ao.quantization.quantize_dynamic(models.load_dense(task.source), {nn.Linear}, dtype=torch.qint8)
    return model, 8.0, {"note": "activations are int8 too"}


def integers(task: Task, widths: tuple[int, ...]) -> Methods:
    """Rounding, GPTQ and GPTQ with our moments."""
    rows: Methods = {}
    for bits in widths:
        rows[f"round int{bits} g64"] = lambda bits=bits: from_weights(task, lambda w: (rivals.rounded(w, bits), rivals.integer_bits(bits)))
        rows[f"GPTQ int{bits} g64"] = lambda bits=bits: from_inputs(
            task, lambda w, h: (rivals.gptq_published(w, h, bits), rivals.integer_bits(bits))
        )
        rows[f"GPTQ int{bits} g64, our moments"] = lambda bits=bits: gptq_with_our_moments(task, bits)
    return rows


def set_weight(module: nn.Module, weight: Tensor) -> None:
    module.weight.data = weight.t() if replace.is_conv1d(module) else weight
