"""compress: replaces the linear layers of a trained model, in place, by RBELinears that hold its weights in codes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .codebook import cannot_encode, fit_basis, round_count
from .encode import encode_layer
from .layout import Layout
from .linear import RBELinear
from .progress import Progress
from .replace import Found, Patterns, dense_weight, find_linears, note_for_transformers, replace, stored_bytes
from .report import Report
from .state import guard_loading

__all__ = ["compress", "fit_basis"]

# From this group size on, codes with a gain of their own hold next to nothing of a trained weight: it has no direction to share.
_HOPELESS_GROUP = 32
_BLOCK_SHARE = 0.25  # of the time for fine-tuning
_PROBED_VALUES = 1 << 18


def compress(
    model: nn.Module,
    layout: str | Layout = "rbe8x2_g8",
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Iterable[Any] | None = None,
    bits: float | None = None,
    max_megabytes: float | None = None,
    seed: int = 0,
    progress: bool = True,
    basis: str = "model",
    tune: float | None = None,
) -> Report:
    """Encodes every linear layer of `model` (nn.Linear, transformers' Conv1D), and returns the report.

    Embeddings, output heads, tied weights and layers that cannot be converted are left alone and listed in the report with the reason.
    Either all layers are replaced or, on an error, none.

    layout: one layout for all layers. include, exclude: regular expressions searched for in the layers' names; a head that `include` names
    is converted. basis: "model", one basis table for all layers of a layout, or "layer", one for each. seed: the result is the same for
    the same seed, but for `tune`, whose number of steps depends on the machine. progress: report on stderr.

    calibration: batches that the model is called with (dicts of tensors, tuples or a tensor), a few hundred sequences of the kind it is
    made for. The layers are then encoded for what they do to these inputs instead of from their weights alone, which is far more accurate
    (docs/compression.md). tune: minutes to spend after that on fitting basis, gains, biases and norms to the dense model's outputs; needs
    calibration. bits, max_megabytes: a budget instead of `layout`, bits a weight of the converted layers or megabytes (1e6 bytes) of the
    whole model with everything counted; each layer gets the layout that costs the model least (rbe_torch/budget.py), and the report holds
    the frontier it was chosen from.

    ValueError: a layer's weight is not finite (names the layer), nothing to convert, an unknown layout, a budget that no layout meets, or
    an argument that cannot be honoured. UserWarning: the layout cannot hold trained weights (codes with a gain of their own and g >= 32),
    before the run.
    """
    layout = Layout.parse(layout)
    if basis not in ("model", "layer"):
        raise ValueError(f"basis: is {basis!r}, must be 'model' (one table for all layers) or 'layer' (one for each)")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: is {seed!r}, must be an int 0 .. 2^32 - 1")
    if bits is not None and max_megabytes is not None:
        raise ValueError(f"bits, max_megabytes: are {bits!r} and {max_megabytes!r}; give one of them")
    if tune is not None and (isinstance(tune, bool) or not isinstance(tune, (int, float)) or not 0 < tune < 1e6):
        raise ValueError(f"tune: is {tune!r}, must be a number of minutes above 0")
    if tune is not None and calibration is None:
        raise ValueError(f"tune: is {tune!r}, which needs calibration= batches to fit the model to")
    start = time.monotonic()
    found = find_linears(model, include, exclude)
    chosen = [entry for entry in found if entry.convertible]
    _preflight(chosen)
    calls = None
    if calibration is not None:
        from .walk import calls_of, try_call

        calls = calls_of(calibration, chosen[0].module.weight.device)
        try_call(model, calls[0])
    report = Report()
    layouts, tables = {entry.name: layout for entry in chosen}, {}
    if bits is not None or max_megabytes is not None:
        from .budget import choose

        choice = choose(model, chosen, calls, bits, max_megabytes, seed, progress)
        layouts, tables, report.frontier = choice.layouts, choice.bases, choice.frontier
    else:
        _warn_hopeless(layout, chosen, report, seed)
    run = _Run(model, chosen, layouts, seed, basis, progress, tables)
    teacher = copy.deepcopy(model).eval() if tune is not None else None
    was_training = [module for module in model.modules() if module.training]
    try:
        run.fit_bases()
        if calls is None:
            run.encode()
        else:
            model.eval()
            if tune is None:
                run.calibrate(calls, 0.0)
            else:
                from .tune import tune_model
                from .walk import find_chain

                blocks = len(find_chain(model, calls[0], list(layouts)))
                fitted = run.calibrate(calls, 60.0 * tune * _BLOCK_SHARE / blocks if blocks else 0.0)
                report.tuning = tune_model(model, teacher, calls, 60.0 * tune * (1 - _BLOCK_SHARE if blocks else 1.0), seed, progress)
                report.tuning["blocks"] = fitted
        run.check()
    except BaseException:
        run.undo()
        if teacher is not None:  # norms and biases were moved in place
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), teacher.parameters(), strict=True):
                    parameter.copy_(value)
        raise
    finally:
        for module in was_training:
            module.training = True

    for entry in found:
        if not entry.convertible:
            report.add_skipped(entry.name, entry.module, entry.reason)
            continue
        made, weight = run.rows[entry.name], run.weights[entry.name]
        layer = run.layers[entry.name].train(entry.module.training)
        error = relative_error(weight, layer)
        note = made.note if error is not None else "weight is all zero"
        report.add_converted(entry.name, layer, type(entry.module).__name__, error, made.seconds, note, made.output_error, made.damping)
    report.other_bytes = stored_bytes(model)
    guard_loading(model)
    note_for_transformers(model, True)
    report.seconds = time.monotonic() - start
    return report


@dataclass(frozen=True)
class _Made:
    """What the report says of a layer beside its sizes."""

    seconds: float
    output_error: float | None = None
    damping: float | None = None
    note: str = ""


class _Run:
    """The layers of one compress call on their way from dense to encoded."""

    def __init__(
        self,
        model: nn.Module,
        chosen: list[Found],
        layouts: dict[str, Layout],
        seed: int,
        basis: str,
        progress: bool,
        tables: dict[str, torch.Tensor],
    ) -> None:
        self.tables = {} if basis == "layer" else tables  # fitted already, by layout
        self.model, self.chosen, self.layouts, self.seed, self.progress = model, chosen, layouts, seed, progress
        self.per_layer = basis == "layer"
        self.weights = {entry.name: dense_weight(entry.module) for entry in chosen}
        self.layers: dict[str, RBELinear] = {}
        self.rows: dict[str, _Made] = {}
        self.bases: dict[tuple, nn.Parameter] = {}
        draws = torch.randint(0, 2**32, (len(chosen),), generator=torch.Generator().manual_seed(seed)).tolist()
        self.seeds = dict(zip(self.weights, draws, strict=True))
        self.title = f"compress to {'/'.join(sorted({str(layout) for layout in layouts.values()}))}"

    def _key(self, entry: Found) -> tuple:
        layout = self.layouts[entry.name]
        shape = (layout.fields, layout.group, layout.stages, self.weights[entry.name].device)
        return (*shape, entry.name) if self.per_layer else shape

    def fit_bases(self) -> None:
        """One table for each layout, or one for each layer."""
        sharing: dict[tuple, list[Found]] = {}
        for entry in self.chosen:
            sharing.setdefault(self._key(entry)[:3] + self._key(entry)[4:], []).append(entry)
        total = sum(round_count(self.layouts[entries[0].name]) for entries in sharing.values())
        with Progress(f"{self.title}: basis", total, self.progress) as bar, torch.no_grad():
            for entries in sharing.values():
                layout = self.layouts[entries[0].name]
                values = self.tables.get(str(layout).partition("+")[0])
                if values is None:
                    values = fit_basis([self.weights[entry.name] for entry in entries], layout, self.seed, lambda what: bar.step(1, what))
                for entry in entries:
                    device = self.weights[entry.name].device
                    self.bases.setdefault(self._key(entry), nn.Parameter(values.to(device), requires_grad=False))

    def basis_of(self, entry: Found) -> nn.Parameter:
        return self.bases[self._key(entry)]

    def encode(self) -> None:
        """From the weights alone."""
        with Progress(self.title, sum(weight.numel() for weight in self.weights.values()), self.progress) as bar, torch.no_grad():
            made = {}
            for entry in self.chosen:
                began = time.monotonic()
                try:
                    layer = RBELinear.from_linear(entry.module, self.layouts[entry.name], self.basis_of(entry), seed=self.seeds[entry.name])
                except (ValueError, TypeError, RuntimeError) as error:
                    raise type(error)(f"{entry.name}: {error}") from error
                made[entry.name] = layer
                self.rows[entry.name] = _Made(time.monotonic() - began)
                bar.step(self.weights[entry.name].numel(), entry.name)
            for entry in self.chosen:
                self.put(entry, made[entry.name])

    def calibrate(self, calls: list, block_seconds: float) -> list[dict[str, Any]]:
        from .calibrate import calibrate_model

        last = [time.monotonic()]
        with Progress(f"{self.title}: calibrate", sum(weight.numel() for weight in self.weights.values()), self.progress) as bar:

            def tick(entry: Found, made: Any) -> None:
                now = time.monotonic()
                self.rows[entry.name] = _Made(now - last[0], made.loss, made.damping, made.note)
                last[0] = now
                bar.step(self.weights[entry.name].numel(), entry.name)

            return calibrate_model(
                self.model,
                calls,
                self.chosen,
                self.basis_of,
                lambda entry: self.layouts[entry.name],
                self.seeds,
                self.put,
                tick,
                block_seconds,
            )

    def check(self) -> None:
        """ValueError where fitting gave values that are not finite: batches can be finite and their squares not."""
        for entry in self.chosen:
            layer, before = self.layers[entry.name], entry.module.bias
            problem = layer.problem()
            if not problem and before is not None and bool((torch.isfinite(before) & ~torch.isfinite(layer.bias)).any()):
                problem = "bias: has values that are not finite"
            if problem:
                raise ValueError(f"{entry.name}: {problem} after it was fitted; are the values that reach it too large?")

    def put(self, entry: Found, layer: RBELinear) -> None:
        self.layers[entry.name] = layer
        replace(entry, layer)

    def undo(self) -> None:
        for entry in self.chosen:
            for parent, child_name in entry.places:
                parent._modules[child_name] = entry.module


def relative_error(weight: torch.Tensor, layer: RBELinear) -> float | None:
    """|W - reconstruction|^2 / |W|^2 in float64, residual included; None for a weight that is all zero."""
    norm = float(weight.double().square().sum())
    if norm == 0:
        return None
    options = {"layout": str(layer.layout), "in_features": layer.in_features, "seed": int(layer.seed) if layer.layout.seeded else 0}
    with torch.no_grad():
        dense = torch.ops.rbe.decode(
            layer.packed,
            layer.basis,
            layer.gain,
            None,
            layer.residual,
            layer.residual_scale,
            layer.residual_right,
            layer.residual_right_scale,
            **options,
        )
        return float((weight.double() - dense.double()).square().sum()) / norm


def _preflight(chosen: list[Found]) -> None:
    problems = [f"{entry.name}: weight {problem}" for entry in chosen if (problem := cannot_encode(dense_weight(entry.module)))]
    if problems:
        more = f" (and {len(problems) - 3} more layers)" if len(problems) > 3 else ""
        raise ValueError(f"model: cannot be compressed and is unchanged: {'; '.join(problems[:3])}{more}; exclude= leaves a layer alone")


def _warn_hopeless(layout: Layout, chosen: list[Found], report: Report, seed: int) -> None:
    """Before anything is run: what a layout that cannot hold a trained weight loses of the largest layer's first rows."""
    if not layout.has_amplitude or (layout.group < _HOPELESS_GROUP and not layout.seeded):
        return
    weight = max((dense_weight(entry.module) for entry in chosen), key=torch.Tensor.numel)
    weight = weight[: max(1, _PROBED_VALUES // weight.shape[1])].float().cpu()
    norm = float(weight.double().square().sum())
    if norm == 0:
        return
    plain = Layout(layout.fields, layout.group, layout.stages)
    made = encode_layer(weight, plain, None, None, seed)
    decoded = torch.ops.rbe.decode(
        made.codes, made.basis, made.gain, layout=str(plain), in_features=weight.shape[1], seed=seed if plain.seeded else 0
    )
    error = float((weight.double() - decoded.double()).square().sum()) / norm
    text = (
        f"{layout} loses {100 * error:.0f} % of a trained weight's energy (relative squared error {error:.3f} without residual, measured on {len(weight)} "
        f"rows): one scaled vector for {layout.group} weights cannot hold it. It is a layout for training and fine-tuning; to compress a trained "
        "model use 'rbe8x2_g8' (2 bits) or 'rbe8x4_g8' (4 bits), with calibration= if you can"
    )
    report.notes.append(text)
    warnings.warn(text, UserWarning, stacklevel=3)
