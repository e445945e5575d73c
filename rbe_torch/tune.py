"""Fine-tuning a compressed model to its dense original: basis, gains, biases and norms move, codes stay.

`tune_stretch` fits what one block does to the dense block's output, `tune_model` the whole model's output to the dense model's
(distillation). The forward pass multiplies by decoded weights, whose gradient is gathered into basis and gain: for a batch of hundreds of
tokens that is quicker on small layers than the product in codes, and the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .encode import fp16_gain, fp16_values
from .linear import RBELinear
from .progress import Progress
from .walk import Call, Visit, output_tensor

# Of Adam, in units of the basis's root mean square, for log gain, and for biases and norms. MiniLM, rbe8x2_g8, four minutes (80 to 100
# steps of 64
# sentences) from a cosine of 0.912 to the dense embeddings: these divided by 6, 0.933; divided by 2, 0.936; times 1.7, 0.938.
RATES = {"basis": 6e-3, "log_gain": 6e-3, "rest": 2e-3}
_WARM = 0.05  # of the time
_CACHED_BYTES = 1 << 28  # of the dense model's outputs
_CHECKED = 8  # batches that judge before and after, at most


class _Decoded(torch.autograd.Function):
    """W [m, n] of words [m, K, M] as a function of basis and gain; float32."""

    @staticmethod
    def forward(ctx: Any, basis: Tensor, gain: Tensor, words: Tensor, place: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(basis, gain, words)
        ctx.place = place
        return torch.ops.rbe.decode(words, basis, gain, **place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        basis, gain, words = ctx.saved_tensors
        return (*torch.ops.rbe.decode_backward(gradient, words, basis, gain, **ctx.place), None, None)


class _Student:
    """The trainable parameters of a module with RBELinears, and their forward passes by decoded weights while in `running()`."""

    def __init__(self, module: nn.Module, basis: bool) -> None:
        self.layers = [layer for layer in module.modules() if isinstance(layer, RBELinear) and not layer.layout.has_amplitude]
        self.log_gain = [nn.Parameter(layer.gain.detach().log()) for layer in self.layers]
        self.words = [torch.ops.rbe.unpack(layer.packed, **layer._options) for layer in self.layers]
        tables = {id(layer.basis): layer.basis for layer in self.layers} if basis else {}
        self.basis = list(tables.values())
        own = {id(layer.basis) for layer in module.modules() if isinstance(layer, RBELinear)}
        own |= {id(layer._parameters["gain"]) for layer in module.modules() if isinstance(layer, RBELinear)}
        self.rest = [p for p in module.parameters() if p.dim() == 1 and p.is_floating_point() and id(p) not in own]
        self._required = [(p, p.requires_grad) for p in module.parameters()]
        gains = [layer._parameters["gain"] for layer in self.layers]
        self._before = [(p, p.detach().clone()) for p in (*self.basis, *self.rest, *gains)]

    def groups(self) -> list[dict[str, Any]]:
        scale = [float(table.detach().square().mean().sqrt()) for table in self.basis]
        made = [{"params": [table], "lr": RATES["basis"] * max(size, 1e-8)} for table, size in zip(self.basis, scale, strict=True)]
        return made + [{"params": self.log_gain, "lr": RATES["log_gain"]}, {"params": self.rest, "lr": RATES["rest"]}]

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts nothing else of the module is trained and the layers multiply by decoded weights."""
        mine = {id(p) for p in (*self.basis, *self.rest)}
        for parameter, _ in self._required:
            parameter.requires_grad_(id(parameter) in mine)
        for layer, log_gain, words in zip(self.layers, self.log_gain, self.words, strict=True):
            layer.forward = _forward(layer, log_gain, words)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
            for parameter, required in self._required:
                parameter.requires_grad_(required)
                parameter.grad = None

    @torch.no_grad()
    def commit(self) -> None:
        """Rounds basis and gain to what fp16 holds and writes the gain into the layers."""
        for table in self.basis:
            table.copy_(fp16_values("basis", table))
        for layer, log_gain in zip(self.layers, self.log_gain, strict=True):
            layer._parameters["gain"].copy_(fp16_gain(log_gain.exp()))

    @torch.no_grad()
    def undo(self) -> None:
        for parameter, value in self._before:
            parameter.copy_(value)
        for layer, log_gain in zip(self.layers, self.log_gain, strict=True):
            log_gain.copy_(layer.gain.log())


def _forward(layer: RBELinear, log_gain: Tensor, words: Tensor) -> Callable[[Tensor], Tensor]:
    place, extra = {**layer._options, "layout": str(layer.layout).partition("+")[0]}, None
    if layer.layout.residual is not None:
        with torch.no_grad():
            extra = layer.weight.float() - torch.ops.rbe.decode(words, layer.basis, layer.gain, **place)

    def run(x: Tensor) -> Tensor:
        weight = _Decoded.apply(layer.basis, log_gain.exp(), words, place)
        weight = (weight if extra is None else weight + extra).to(x.dtype)
        return torch.nn.functional.linear(x, weight, layer.bias)

    return run


def distance(output: Any, wanted: Tensor, mask: Tensor | None) -> Tensor:
    """How far a model's output is from the dense model's.

    Logits [..., V]: mean over tokens of KL(dense || compressed). Hidden states [B, T, d]: 1 - cosine of the mean over a sequence's tokens,
    plus a fifth of the tokens' own relative squared error; other tensors: the relative squared error of their last dimension.
    """
    got = output_tensor(output).float()
    if isinstance(getattr(output, "logits", None), Tensor):
        lost = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        return lost[mask].mean() if mask is not None and mask.shape == lost.shape else lost.mean()
    lost = (got - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
    if got.dim() != 3:
        return lost.mean()
    real = torch.ones_like(lost) if mask is None or mask.shape != lost.shape else mask.to(lost.dtype)
    mean_got, mean_wanted = ((t * real[..., None]).sum(1) for t in (got, wanted))
    whole = 1 - torch.nn.functional.cosine_similarity(mean_got, mean_wanted, dim=-1)
    return whole.mean() + 0.2 * (lost * real).sum() / real.sum()


def tune_model(
    model: nn.Module, teacher: nn.Module, calls: Sequence[Call], seconds: float, seed: int = 0, progress: bool = True
) -> dict[str, Any]:
    """Distils the dense model into the compressed one for `seconds`; returns losses before and after on batches that it did not train on.

    teacher: the dense model in eval mode, which shares no parameter with `model`. The model is changed in place, basis and gain end as
    fp16 values; where the held-out loss did not fall everything is put back.
    """
    cache: dict[int, Tensor] = {}

    def wanted(index: int) -> Tensor:
        if index in cache:
            return cache[index]
        with torch.no_grad():
            value = output_tensor(calls[index].run(teacher)).float()
        if sum(t.numel() for t in cache.values()) * 4 < _CACHED_BYTES:
            cache[index] = value
        return value

    def loss(index: int) -> Tensor:
        return distance(calls[index].run(model), wanted(index), calls[index].mask)

    return _fit(_Student(model, basis=True), loss, len(calls), seconds, seed, progress, "tune")


def tune_stretch(visit: Visit, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Fits gains, biases and norms of a block whose layers are compressed to the dense block's outputs, for `seconds`; the basis is shared
    and stays."""
    with torch.no_grad():
        wanted = [output_tensor(call.run(visit.dense)).float() for call in visit.dense_calls]

    def loss(index: int) -> Tensor:
        got, want, mask = output_tensor(visit.calls[index].run(visit.stretch.module)).float(), wanted[index], visit.calls[index].mask
        lost = (got - want).square().sum(-1) / want.square().sum(-1).clamp(min=1e-12)
        return lost[mask].mean() if mask is not None and mask.shape == lost.shape else lost.mean()

    return _fit(_Student(visit.stretch.module, basis=False), loss, len(visit.calls), seconds, seed, False, visit.stretch.name)


def _fit(
    student: _Student, loss: Callable[[int], Tensor], count: int, seconds: float, seed: int, progress: bool, title: str
) -> dict[str, Any]:
    """Adam on loss(batch) with a warm-up and a cosine over the time given."""
    held = list(range(_CHECKED - 1, count, _CHECKED))[:_CHECKED] if count >= _CHECKED else []
    trained = [index for index in range(count) if index not in held]
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def judge() -> float:
        return sum(float(loss(index)) for index in (held or trained[:_CHECKED])) / len(held or trained[:_CHECKED])

    start, steps, bar_seconds = time.monotonic(), 0, 0
    with student.running(), Progress(title, max(1, int(seconds)), progress) as bar, torch.enable_grad():
        before = judge()
        groups = student.groups()
        rates = [group["lr"] for group in groups]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
        order: list[int] = []
        while True:
            spent = (time.monotonic() - start) / seconds
            if spent >= 1:
                break
            if not order:
                order = [trained[i] for i in torch.randperm(len(trained), generator=generator).tolist()]
            factor = min(1.0, spent / _WARM) if spent < _WARM else 0.5 * (1 + math.cos(math.pi * (spent - _WARM) / (1 - _WARM)))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * max(factor, 0.02)
            value = loss(order.pop())
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            steps += 1
            done = int(time.monotonic() - start) - bar_seconds
            bar_seconds += done
            bar.step(done, f"loss {float(value.detach()):.4f}")
    student.commit()
    with torch.no_grad():
        for layer, log_gain in zip(student.layers, student.log_gain, strict=True):
            log_gain.copy_(layer.gain.log())
    after = judge()
    kept = after <= before
    if not kept:
        student.undo()
    return {"before": before, "after": after, "kept": kept, "steps": steps, "seconds": time.monotonic() - start, "held_out": bool(held)}
