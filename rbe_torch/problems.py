"""What makes the tensors of an RBELinear invalid, in one sentence: of a layer as it is, or as it would be after entries of a state_dict."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .linear import RBELinear

RESIDUALS = ("residual", "residual_scale", "residual_right", "residual_right_scale")


def find_problem(layer: RBELinear, entries: dict[str, Tensor] | None = None) -> str:
    """The first problem, or "". entries: tensors by name that take the place of the layer's own, `packed` as uint8 [m, row bytes]; a `gain` among
    them takes that of log_gain, and with `packed` that of amplitude. Tensors on the meta device pass."""
    entries = entries or {}
    values: dict[str, Tensor | None] = {**layer._parameters, **layer._buffers, **entries}
    if "gain" in entries:
        values["log_gain"] = None
        if "packed" in entries and "amplitude" not in entries:
            values["amplitude"] = None
    known = {name: tensor for name, tensor in values.items() if tensor is not None and not tensor.is_meta}
    for name in ("basis", "gain", "log_gain", "amplitude"):
        if name in known and not bool(torch.isfinite(known[name]).all()):
            return f"{name}: has {int((~torch.isfinite(known[name])).sum())} values that are not finite, must have none"
    gain = known.get("gain")
    if gain is not None and not bool((gain > 0).all()):
        return f"gain: has {int((gain <= 0).sum())} values that are not positive, the first in row {int((gain <= 0).nonzero()[0])}"
    for name in ("residual", "residual_scale", "residual_right_scale"):
        tensor = known.get(name)
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            return f"{name}: has values that are not finite, must have none"
    columns = known.get("residual_right")
    if layer.layout.fraction and columns is not None and columns.numel():
        if int(columns.min()) < 0 or int(columns.max()) >= layer.in_features or not bool((columns[:, 1:] > columns[:, :-1]).all()):
            return f"residual_right: its columns must rise within each row and lie in 0 .. {layer.in_features - 1}"
    seed = known.get("seed")
    if layer.layout.seeded and seed is not None and not 0 <= int(seed) < 2**32:
        return f"seed: is {int(seed)}, must be 0 .. 2^32 - 1"
    if "packed" in known:
        packed = entries["packed"] if "packed" in entries else layer.packed
        options = layer._options if seed is None else {**layer._options, "seed": int(seed)}
        try:
            torch.ops.rbe.unpack(packed, **options)
        except RuntimeError as error:
            return without_operator(error)
    return ""


def without_operator(error: RuntimeError) -> str:
    """The sentence of an operator's error without the operator's name in front."""
    return str(error).removeprefix("rbe::pack: ").removeprefix("rbe::unpack: ")
