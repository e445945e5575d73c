"""Watching a run: values that are not finite and losses that leave for good are named by layer and step; learning-rate groups that ignore
the format warn.

`TrainingWatch.step(loss)` goes after loss.backward() and before optimiser.step(), so that what it names has not been written into the
parameters yet. `guard_rates` is called by whatever puts a layer in training form: a hook in torch's optimisers then looks once at each
optimiser that trains amplitudes.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

_EARLY = 10  # times `rise` above the first loss, and by more than 1: that is far off before there is a usual loss
# Layers whose amplitudes want at least so many times a dense weight's rate (rbe_torch/rates.py) are looked at.
LARGE_MULTIPLE = 2.0
_USUAL = 50  # losses that say what is usual
_FIRST = 20  # before that many, none is


class TrainingDiverged(FloatingPointError):
    """A loss, gradient or parameter that is not finite, or a loss far above what it was. `step` counts from 1; `layer` is a module's name
    or ''."""

    def __init__(self, message: str, step: int, layer: str = "") -> None:
        super().__init__(message)
        self.step, self.layer = step, layer


class TrainingWatch:
    """Names the layer and step at which a run breaks.

    Call `step(loss)` after loss.backward() and before optimiser.step(). Raises TrainingDiverged where the loss, a gradient or a parameter
    of the model is not finite (a parameter before a gradient, then the first in the model's order), or where the loss is above `rise` times
    the median of the 50 usual losses before (of the first 20: above 10 times `rise` of the first), `patience` steps in a row. interval: gradients and
    parameters are looked at every so many steps; a loss that is not finite makes it look at once. Looking costs one reduction a tensor, and on a GPU one
    synchronisation. With an interval above 1 a gradient may spoil the parameters before it is looked at. With sharded parameters all processes call step together,
    with interval 1 or a loss that is the same in all of them.
    """

    def __init__(self, model: nn.Module, interval: int = 1, rise: float = 2.0, patience: int = 20) -> None:
        for name, value in (("interval", interval), ("patience", patience)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: is {value!r}, must be an int of at least 1")
        if not 1 < rise < math.inf:
            raise ValueError(f"rise: is {rise}, must be above 1 and finite")
        self.model, self.interval, self.rise, self.patience = model, interval, rise, patience
        self.count, self._above = 0, 0
        self._losses: deque[float] = deque(maxlen=_USUAL)

    def step(self, loss: Tensor | float | None = None) -> None:
        """One training step. loss: a scalar, or None to look at gradients and parameters alone."""
        self.count += 1
        value = None if loss is None else float(loss.detach() if isinstance(loss, Tensor) else loss)
        broken = value is not None and not math.isfinite(value)
        if broken or self.count % self.interval == 0:
            if not all_finite(self.model):
                layer, what = first_not_finite(self.model)
                cause = f"; the loss is {value}" if broken else ""
                raise TrainingDiverged(f"step {self.count}: {what} of layer {layer!r} is not finite{cause}", self.count, layer)
        if broken:
            raise TrainingDiverged(f"step {self.count}: the loss is {value}, and every gradient and parameter is finite: it broke in the loss "
                                   "itself", self.count)
        if value is not None:
            self._compare(value)

    def _compare(self, value: float) -> None:
        if self._losses:
            early = len(self._losses) < _FIRST
            usual, rise = (self._losses[0], _EARLY * self.rise) if early else (sorted(self._losses)[len(self._losses) // 2], self.rise)
            if value > usual + (rise - 1) * abs(usual) + early:
                self._above += 1
                if self._above >= self.patience:
                    layer = largest_gradient(self.model)
                    raise TrainingDiverged(
                        f"step {self.count}: the loss is {value:.4g} and has been more than {rise:g} times its usual {usual:.4g} for "
                        f"{self._above} steps; the largest gradient for its parameters' size is in layer {layer!r}. Lower its learning rate",
                        self.count, layer,
                    )  # fmt: skip
                return  # an unusual loss does not make itself usual
        self._above = 0
        self._losses.append(value)


def all_finite(model: nn.Module) -> bool:
    """Whether every parameter and gradient is, with sharded ones in all processes: one pass over each, one wait for the device, at most one message."""
    found, sharded = [], False
    for parameter in model.parameters():
        for tensor in (parameter.detach(), parameter.grad):
            if _watched(tensor):
                sharded |= hasattr(tensor, "to_local")
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                local = local.coalesce().values() if local.is_sparse else local
                found.append(torch.isfinite(torch.linalg.vector_norm(local, math.inf) if local.numel() else local.sum()))
    if not found:
        return True
    good = torch.stack([one.to(found[0].device) for one in found]).all()
    if sharded:  # processes that did not hear of it together would wait for each other
        torch.distributed.all_reduce(good := good.int(), op=torch.distributed.ReduceOp.MIN)
    return bool(good)


def _watched(tensor: Tensor | None) -> bool:
    return tensor is not None and not tensor.is_meta and tensor.numel() > 0 and tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def first_not_finite(model: nn.Module) -> tuple[str, str]:
    """(module, tensor) of the first parameter in the model's order with a value that is not finite, else of the first gradient; two empty strings
    without one."""
    for kind in ("the parameter", "the gradient of"):
        for name, module in model.named_modules():
            for key, parameter in module._parameters.items():
                tensor = parameter if kind == "the parameter" or parameter is None else parameter.grad
                if _watched(tensor) and not bool(_whole(torch.isfinite(tensor.coalesce().values() if tensor.is_sparse else tensor).all())):
                    return name, f"{kind} {key}"
    return "", ""


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def largest_gradient(model: nn.Module) -> str:
    """The module with the largest |gradient| / |parameter|; '' where nothing has a gradient."""
    best, where = -1.0, ""
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.grad is not None and not parameter.is_meta:
                ratio = float(_whole(parameter.grad.norm())) / max(float(_whole(parameter.detach().norm())), 1e-12)
                if ratio > best:
                    best, where = ratio, name
    return where


# ---- learning-rate groups --------------------------------------------------------------------------------------------------------
_guard: Any = None
_looked_at: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_amplitudes: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def guard_rates(layer: nn.Module | None = None) -> None:
    """From now on the first step of each optimiser that trains amplitudes is checked, once; a UserWarning where their rate is too small."""
    global _guard
    if layer is not None:
        _amplitudes.add(layer)
    if _guard is None:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        _guard = register_optimizer_step_pre_hook(_look)


def _look(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    if optimiser in _looked_at:
        return
    _looked_at.add(optimiser)
    complaint = rates_problem(optimiser)
    if complaint:
        warnings.warn(complaint, UserWarning, stacklevel=4)


def rates_problem(optimiser: torch.optim.Optimizer) -> str:
    """What is wrong with the groups of an Adam-like optimiser, in a sentence; empty if nothing is. Others (SGD) have no rate that is right
    everywhere."""
    from .rates import amplitude_multiple

    if "betas" not in optimiser.param_groups[0]:
        return ""
    ours, tables = {}, set()
    for layer in list(_amplitudes):
        ours[id(layer._parameters.get("amplitude"))] = layer
        tables.add(id(layer._parameters.get("basis")))
    amplitude, others, decayed = [], [], False
    for group in optimiser.param_groups:
        mine = [ours[id(parameter)] for parameter in group["params"] if id(parameter) in ours]
        base = float(group.get("initial_lr", group["lr"]))  # warm-up starts near 0
        decayed |= bool(mine and group.get("weight_decay"))
        amplitude += [base for layer in mine if amplitude_multiple(layer.layout, layer.in_features) >= LARGE_MULTIPLE]
        if len(mine) + sum(id(parameter) in tables for parameter in group["params"]) < len(group["params"]):
            others.append(base)
    advice = "use torch.optim.AdamW(rbe_torch.param_groups(model, lr=...)), whose docstring says why"
    if amplitude and others and min(amplitude) <= min(others):
        return (f"learning rates: the amplitudes of RBELinear layers have {min(amplitude):.3g}, the other parameters {min(others):.3g}; "
                f"amplitudes span -1 .. 1 and learn too slowly at the rate of dense weights; {advice}")
    if decayed:
        return f"weight_decay: acts on the amplitudes of RBELinear layers, pulls them to 0 and loses their codes; {advice}"
    return ""
