"""compress: replaces the linear layers of a trained model, in place, by RBELinears that hold its weights in codes."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn

from .codebook import cannot_encode, fit_basis, round_count
from .layout import Layout
from .linear import RBELinear
from .progress import Progress
from .replace import Found, Patterns, dense_weight, find_linears, note_for_transformers, replace, stored_bytes
from .report import Report

__all__ = ["compress", "fit_basis"]

# From this group size on, codes with a gain of their own hold next to nothing of a trained weight: it has no direction to share.
_HOPELESS_GROUP = 32
_FIT_SHARE = 0.5  # of the progress bar


def compress(model: nn.Module, layout: str | Layout = "rbe8x2_g8", include: Patterns = None, exclude: Patterns = None, calibration: Any = None,
             bits: float | None = None, max_megabytes: float | None = None, seed: int = 0, progress: bool = True,
             basis: str = "model") -> Report:
    """Encodes every linear layer of `model` (nn.Linear, transformers' Conv1D) from its weights alone, and returns the report.

    Embeddings, output heads, tied weights and layers that cannot be converted are left alone and listed in the report with the reason.
    Either all layers are replaced or, on an error, none.

    layout: one layout for all layers. include, exclude: regular expressions searched for in the layers' names; a head that `include` names
    is converted. basis: "model", one basis table for all layers, or "layer", one for each. seed: the result is the same for the same seed.
    progress: report on stderr. calibration, bits, max_megabytes: must be None, this version compresses from the weights alone.

    ValueError: a layer's weight is not finite (names the layer), nothing to convert, an unknown layout, or an argument that must be None.
    UserWarning: the layout cannot hold trained weights (codes with a gain of their own and g >= 32).
    """
    layout = Layout.parse(layout)
    _not_available(calibration, bits, max_megabytes)
    if basis not in ("model", "layer"):
        raise ValueError(f"basis: is {basis!r}, must be 'model' (one table for all layers) or 'layer' (one for each)")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: is {seed!r}, must be an int 0 .. 2^32 - 1")
    start = time.monotonic()
    found = find_linears(model, include, exclude)
    chosen = [entry for entry in found if entry.convertible]
    _preflight(chosen)

    weights = {entry.name: dense_weight(entry.module) for entry in chosen}
    encoding = sum(weight.numel() for weight in weights.values())
    fits = len(chosen) if basis == "layer" else 1
    round_units = max(1, int(encoding * _FIT_SHARE / (1 - _FIT_SHARE) / (round_count(layout) * fits)))
    seeds = torch.randint(0, 2**32, (len(chosen),), generator=torch.Generator().manual_seed(seed)).tolist()
    new: dict[str, tuple[RBELinear, float, float | None]] = {}
    with Progress(f"compress to {layout}", encoding + round_units * round_count(layout) * fits, progress) as bar, torch.no_grad():
        shared: dict[torch.device, nn.Parameter] = {}
        if basis == "model":
            table = fit_basis(list(weights.values()), layout, seed, lambda what: bar.step(round_units, f"basis: {what}"))
            for weight in weights.values():
                shared.setdefault(weight.device, nn.Parameter(table.to(weight.device), requires_grad=False))
        for entry, layer_seed in zip(chosen, seeds, strict=True):
            began = time.monotonic()
            weight = weights[entry.name]
            table = shared.get(weight.device)
            if table is None:
                values = fit_basis([weight], layout, seed, lambda what: bar.step(round_units, f"{entry.name}: {what}"))
                table = nn.Parameter(values.to(weight.device), requires_grad=False)
            try:
                layer = RBELinear.from_linear(entry.module, layout, table, seed=layer_seed)
            except (ValueError, TypeError, RuntimeError) as error:
                raise type(error)(f"{entry.name}: {error}") from error
            new[entry.name] = (layer, time.monotonic() - began, relative_error(weight, layer))
            bar.step(weight.numel(), entry.name)

    report = Report()
    for entry in found:
        if entry.convertible:
            layer, seconds, error = new[entry.name]
            replace(entry, layer)
            report.add_converted(entry.name, layer, type(entry.module).__name__, error, seconds, "" if error is not None else "weight is all zero")
        else:
            report.add_skipped(entry.name, entry.module, entry.reason)
    report.other_bytes = stored_bytes(model)
    note_for_transformers(model, True)
    _warn_hopeless(layout, report)
    report.seconds = time.monotonic() - start
    return report


def relative_error(weight: torch.Tensor, layer: RBELinear) -> float | None:
    """|W - reconstruction|^2 / |W|^2 in float64, residual included; None for a weight that is all zero."""
    norm = float(weight.double().square().sum())
    if norm == 0:
        return None
    options = {"layout": str(layer.layout), "in_features": layer.in_features, "seed": int(layer.seed) if layer.layout.seeded else 0}
    dense = torch.ops.rbe.decode(layer.packed, layer.basis, layer.gain, None, layer.residual, layer.residual_scale, layer.residual_right,
                                 layer.residual_right_scale, **options)
    return float((weight.double() - dense.double()).square().sum()) / norm


def _not_available(calibration: Any, bits: float | None, max_megabytes: float | None) -> None:
    if calibration is not None:
        raise ValueError("calibration: this version compresses from the weights alone; leave it out, or fine-tune the compressed model on your data")
    if bits is not None:
        raise ValueError(f"bits: is {bits!r}, but this version takes one layout for the whole model; pass layout=, such as 'rbe8x2_g8' for about "
                         "2 bits or 'rbe8x4_g8' for about 4")
    if max_megabytes is not None:
        raise ValueError(f"max_megabytes: is {max_megabytes!r}, but this version takes one layout for the whole model; `rbe plan` lists the "
                         "megabytes of each layout, pass the one that fits as layout=")


def _preflight(chosen: list[Found]) -> None:
    problems = [f"{entry.name}: weight {problem}" for entry in chosen if (problem := cannot_encode(dense_weight(entry.module)))]
    if problems:
        more = f" (and {len(problems) - 3} more layers)" if len(problems) > 3 else ""
        raise ValueError(f"model: cannot be compressed and is unchanged: {'; '.join(problems[:3])}{more}; exclude= leaves a layer alone")


def _warn_hopeless(layout: Layout, report: Report) -> None:
    if layout.has_amplitude and (layout.group >= _HOPELESS_GROUP or layout.seeded) and report.relative_error is not None:
        text = (f"{layout} loses {100 * report.relative_error:.0f} % of the weights' energy (relative squared error {report.relative_error:.3f}): one "
                f"scaled vector for {layout.group} weights cannot hold a trained weight. It is a layout for training and fine-tuning; to compress a "
                "trained model use 'rbe8x2_g8'")
        report.notes.append(text)
        warnings.warn(text, UserWarning, stacklevel=3)
