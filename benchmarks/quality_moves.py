"""Codes that move while a compressed model is distilled: PV-tuning (Malinovskii et al. 2024) without optimiser state of a weight's size.

For each group of a row the change of one stage's vector from b to b' is worth, by the gradient G of the weights and a curvature that is the
product of the group's input moment H and the row's squared output gradients s,

    fall = -gain G (b' - b) - mu / 2 gain^2 s (b' - b) H (b' - b)

The groups worth most take it, together, if the loss of batches that are not trained on falls; else fewer of them, else none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rbe_torch import tune
from rbe_torch.codes import IDX_SHIFT

INTERVAL = 8  # steps between two sets of moves
SHARE = 0.003  # of a layer's groups, at most
PARTS = (1, 4, 16)  # all moves, a quarter of them, a sixteenth
SENTENCES = 64  # a batch: the loss is a mean over so many
STIFFER = 8.0  # what a refused set of moves makes of the curvature


class Moving(tune._Student):
    """Call `step` before each training step. log: what became of each set of moves."""

    def __init__(self, module: nn.Module, judge: Callable[[], float]) -> None:
        super().__init__(module, basis=True)
        self.judge, self.passes, self.stiffness = judge, 0, 1.0
        self.first = [words.clone() for words in self.words]
        self.log: list[dict[str, Any]] = []
        self._forget()

    def step(self) -> None:
        if self.passes == INTERVAL:
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
        before = self.judge()
        curvature = self.stiffness * SENTENCES / (2 * before)
        moves = []
        for layer, words, log_gain, sums in zip(self.layers, self.words, self.log_gain, self.sums, strict=True):
            places, chosen = sums.best_moves(words, layer.basis, log_gain.exp(), self.passes, curvature)
            moves.append((words.view(-1), places, chosen))
        proposed, tried, kept = sum(len(places) for _, places, _ in moves), [], 0
        for part in PARTS if proposed else ():
            some = [(words, places[: -(-len(places) // part)], chosen[: -(-len(places) // part)]) for words, places, chosen in moves]
            old = [words[places] for words, places, _ in some]
            for words, places, chosen in some:
                words[places] = words[places] & ~(255 << IDX_SHIFT) | (chosen << IDX_SHIFT).to(words.dtype)
            tried.append(self.judge())
            if tried[-1] < before:
                kept = sum(len(places) for _, places, _ in some)
                break
            for (words, places, _), values in zip(some, old, strict=True):
                words[places] = values
        self.log.append({"stiffness": self.stiffness, "before": before, "proposed": proposed, "tried": tried, "kept": kept})
        self.stiffness *= 1 / 2 if kept else STIFFER if proposed else 1 / STIFFER


class Sums:
    """Over tokens: gradient dy^T x [m, n] of a weight, x x^T of each group [K, g, g], dy^2 [m]."""

    def __init__(self, m: int, n: int, group: int) -> None:
        self.group, self.tokens = group, 0
        self.gradient, self.moment, self.square = torch.zeros(m, n), torch.zeros(n // group, group, group), torch.zeros(m)

    def add(self, x: Tensor, dy: Tensor) -> None:
        real = dy.abs().amax(1) > 0  # padding has no gradient
        x, dy = x[real].float(), dy[real].float()
        groups = x.view(len(x), -1, self.group).transpose(0, 1)
        self.gradient.addmm_(dy.t(), x)
        self.moment.baddbmm_(groups.transpose(1, 2), groups)
        self.square += dy.square().sum(0)
        self.tokens += len(x)

    def best_moves(self, words: Tensor, basis: Tensor, gain: Tensor, passes: int, curvature: float) -> tuple[Tensor, Tensor]:
        """Places in words.view(-1) and the vector that each shall take, those that promise most first: one stage of a group at most."""
        m, groups, stages = words.shape
        fall, vector = torch.zeros(m, groups, stages), torch.zeros(m, groups, stages, dtype=torch.int64)
        stiff = 0.5 * curvature * gain.square() * self.square / passes
        for k in range(groups):
            gradient = gain[:, None] * self.gradient[:, k * self.group : (k + 1) * self.group] / passes
            for stage in range(stages):
                table, old = basis[stage], (words[:, k, stage] >> IDX_SHIFT & 255).long()
                product = table @ (self.moment[k] / self.tokens) @ table.t()
                size = product.diagonal()
                distance = size - 2 * product[old] + size[old][:, None]
                linear = gradient @ table.t()
                promised = linear.gather(1, old[:, None]) - linear - stiff[:, None] * distance
                fall[:, k, stage], vector[:, k, stage] = promised.max(1)
        best, stage = fall.max(2)
        best = best.view(-1)
        chosen = best.topk(max(1, int(SHARE * best.numel()))).indices
        chosen = chosen[best[chosen] > 0]
        places = chosen * stages + stage.view(-1)[chosen]
        return places, vector.view(-1)[places]
