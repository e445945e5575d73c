"""Distillation: a compressed model learns to give what the dense one gave.

    logits       T^2 * KL(softmax(teacher / T) || softmax(student / T)), a mean over everything but the last dimension    Hinton et al.,
    arXiv 1503.02531 embeddings   mean of 1 - cosine(student, teacher) plus mean of (student - teacher)^2 / mean of teacher^2
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation(nn.Module):
    """Holds the teacher, and gives the loss of a student's output on the same input.

        teacher = Distillation.of(model)                       # before rbe_torch.compress(model): keeps a copy
        rbe_torch.compress(model, layout="rbe22_g64"); rbe_torch.prepare_training(model)
        loss = teacher(model(**batch), **batch)

    kind: "logits" or "embeddings". output: picks the tensor of a model's output; by default the output itself if it is a tensor, else its
    `logits` or `last_hidden_state`, whichever kind asks for. mask: where the call has an `attention_mask` [batch, tokens] and the tensor is
    [batch, tokens, features], padded tokens do not count. The teacher is put in eval mode, gets no gradient and is not among this module's
    parameters.
    """

    def __init__(self, teacher: nn.Module, kind: str = "logits", temperature: float = 2.0,
                 output: Callable[[Any], Tensor] | None = None) -> None:
        super().__init__()
        if kind not in ("logits", "embeddings"):
            raise ValueError(f"kind: is {kind!r}, must be 'logits' or 'embeddings'")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature: is {temperature}, must be positive and finite")
        self._teacher = [teacher.eval()]  # in a list: no child module, so that its parameters are neither trained nor saved
        self.kind, self.temperature, self.output = kind, temperature, output or self._pick

    @classmethod
    def of(cls, model: nn.Module, kind: str = "logits", **options: Any) -> Distillation:
        """A Distillation from a copy of `model` as it is now."""
        return cls(copy.deepcopy(model), kind, **options)

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, student: Any, *args: Any, **keywords: Any) -> Tensor:
        """The loss, a scalar. student: the student's output; args, keywords: what the teacher is called with."""
        with torch.no_grad():
            wanted = self.output(self.teacher(*args, **keywords)).float()
        got = self.output(student).float()
        if got.shape != wanted.shape:
            raise ValueError(f"student: gives {tuple(got.shape)}, must give {tuple(wanted.shape)} as the teacher does")
        mask = keywords.get("attention_mask")
        if mask is not None and mask.dim() == 2 and got.shape[:2] == mask.shape:
            got, wanted = got[mask.bool()], wanted[mask.bool()]
        if self.kind == "logits":
            t = self.temperature
            classes = got.shape[-1]
            ours, theirs = (F.log_softmax(logits.reshape(-1, classes) / t, -1) for logits in (got, wanted))
            return t * t * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        angle = 1 - F.cosine_similarity(got, wanted, dim=-1).mean()
        return angle + (got - wanted).square().mean() / wanted.square().mean().clamp(min=1e-20)

    def _pick(self, out: Any) -> Tensor:
        if isinstance(out, Tensor):
            return out
        name = "logits" if self.kind == "logits" else "last_hidden_state"
        found = out.get(name) if isinstance(out, dict) else getattr(out, name, None)
        if not isinstance(found, Tensor):
            raise ValueError(f"output: the model gives a {type(out).__name__} without a tensor {name!r}; pass output=, a function that picks "
                             "the tensor")
        return found
