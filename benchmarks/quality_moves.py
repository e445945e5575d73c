"""Codes that move while a compressed model is distilled: PV-tuning (Malinovskii et al. 2024) without optimiser state of a weight's size.

Where one stage's vector b of a group of a row becomes b', the loss should fall, by the weights' gradient G and a curvature made of the row's
squared output gradients s and the group's input moment H (of tokens, each weighted by its squared output gradients), by

    fall = -gain G (b' - b) - mu / 2 gain^2 s (b' - b) H (b' - b)

Layer by layer each row's best change is made where that promises a fall, and all of a layer's are put back if the loss of batches that are
not trained on does not fall. Then mu was too small: it is each layer's own, larger after a refusal and smaller after a success. The gradient
is right for small changes alone: at first, mu is 4,096 times what the gradients' squares say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rbe_torch import tune
from rbe_torch.codes import IDX_SHIFT

INTERVAL = 16  # steps between two rounds of moves
SENTENCES = 64  # a batch: the loss is a mean over so many
STIFFNESS, REFUSED, KEPT = 4096.0, 8.0, 0.5  # of the curvature: at first, and what moves that were refused or kept multiply it by


class Moving(tune._Student):
    """Call `step` before each training step; from `until` on, seconds of the process's time, no round starts. judge(round): the loss on batches that
    are not trained on. log: what each round of moves did."""

    def __init__(self, module: nn.Module, judge: Callable[[int], float], until: float) -> None:
        super().__init__(module, basis=True)
        self.judge, self.until, self.stiffness = judge, until, [STIFFNESS] * len(self.layers)
        self.first = [words.clone() for words in self.words]
        self.log: list[dict[str, Any]] = []
        self._forget()

    def step(self) -> None:
        if self.passes >= INTERVAL and time.process_time() < self.until:
            self._move()
            self._forget()
        self.passes += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        with super().running():
            for index, layer in enumerate(self.layers):
                layer.forward = self._watched(index, layer.forward)
            yield

    def commit(self) -> None:
        super().commit()
        self._pack(self.words)

    def undo(self) -> None:
        super().undo()
        self._pack(self.first)

    def _pack(self, all_words: list[Tensor]) -> None:
        for layer, words in zip(self.layers, all_words, strict=True):
            layer.packed = torch.ops.rbe.pack(words, **layer._options)

    # ---- sums over the passes since the last moves ------------------------------------------------------------------------------------
    def _forget(self) -> None:
        self.passes = 0
        self.sums = [Sums(layer.out_features, layer.in_features, layer.layout.group) for layer in self.layers]

    def _watched(self, index: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y = forward(x)
            if y.requires_grad:
                y.register_hook(lambda dy: self.sums[index].add(x.detach().flatten(0, -2), dy.flatten(0, -2)))
            return y

        return run

    # ---- moves ------------------------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _move(self) -> None:
        number = len(self.log)
        before = loss = self.judge(number)
        layers = codes = 0
        for index, (layer, words, sums) in enumerate(zip(self.layers, self.words, self.sums, strict=True)):
            curvature = self.stiffness[index] * SENTENCES / (2 * loss)
            places, chosen = sums.best_moves(words, layer.basis, self.log_gain[index].exp(), self.passes, curvature)
            flat = words.view(-1)
            old = flat[places]
            flat[places] = old & ~(255 << IDX_SHIFT) | (chosen << IDX_SHIFT).to(old.dtype)
            now = self.judge(number) if len(places) else loss
            if now < loss:
                loss, layers, codes = now, layers + 1, codes + len(places)
            else:
                flat[places] = old
            self.stiffness[index] *= REFUSED if now > loss else KEPT
        self.log.append({"judges": before, "fallen": before - loss, "layers": layers, "codes": codes})


class Sums:
    """Over tokens: gradient dy^T x [m, n] of a weight, |dy|^2 x x^T of each group [K, g, g], dy^2 [m]."""

    def __init__(self, m: int, n: int, group: int) -> None:
        self.group = group
        self.gradient, self.moment, self.square = torch.zeros(m, n), torch.zeros(n // group, group, group), torch.zeros(m)

    def add(self, x: Tensor, dy: Tensor) -> None:
        x, dy = x.float(), dy.float()
        groups = x.view(len(x), -1, self.group).transpose(0, 1)
        self.gradient.addmm_(dy.t(), x)
        self.moment.baddbmm_((groups * dy.square().sum(1)[:, None]).transpose(1, 2), groups)
        self.square += dy.square().sum(0)

    def best_moves(self, words: Tensor, basis: Tensor, gain: Tensor, passes: int, curvature: float) -> tuple[Tensor, Tensor]:
        """Places in words.view(-1), one a row, and the vectors that they shall take."""
        m, groups, stages = words.shape
        fall, vector = torch.zeros(m, groups, stages), torch.zeros(m, groups, stages, dtype=torch.int64)
        stiff = 0.5 * curvature * gain.square() * self.square / passes
        for k in range(groups):
            gradient = gain[:, None] * self.gradient[:, k * self.group : (k + 1) * self.group] / passes
            for stage in range(stages):
                table, old = basis[stage], (words[:, k, stage] >> IDX_SHIFT & 255).long()
                product = table @ (self.moment[k] / self.square.sum()) @ table.t()
                size = product.diagonal()
                distance = size - 2 * product[old] + size[old][:, None]
                linear = gradient @ table.t()
                promised = linear.gather(1, old[:, None]) - linear - stiff[:, None] * distance
                fall[:, k, stage], vector[:, k, stage] = promised.max(1)
        best, place = fall.view(m, -1).max(1)
        rows = (best > 0).nonzero()[:, 0]
        places = rows * groups * stages + place[rows]
        return places, vector.view(-1)[places]
