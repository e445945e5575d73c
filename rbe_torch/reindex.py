"""Moves the idx of codes while a model trains: the codes that do least are taken from their basis vector and given another.

    W[i, group k] = gain[i] * scale(a[i,k,s]) * basis[s, idx[i,k,s]]          which vector is `idx`; how much of it is trained, `a`

A code is judged by |a|. For those that are moved the loss gradient along every basis vector, gain[i] * sum over tokens of dy[i] * (x[group
k] . basis[s, j]), is computed from batches that hooks caught: [moved, 256] numbers, in chunks, and never an m x n tensor.

method "exchange" (default): a moved code gets, at once, the vector, sign and size that the gradient says lowers the loss most, and each
layer's exchange is kept only if the loss of `closure` really falls; method "gradient" (RigL's rule, arXiv 1911.11134): it gets the vector
of largest gradient at amplitude 0. docs/training-experiments.md has what each brought.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .codes import IDX_SHIFT
from .linear import RBELinear

METHODS = ("exchange", "gradient")
_CHUNK = 1 << 22  # numbers of a gradient table [moved, 256] or [moved, g] at a time
_TRIES = 3  # an exchange that raises the loss is tried again with a quarter of its codes


class Reindexer:
    """Moves idx during training; call `.step()` after each optimiser.step().

    model: in training form; layers whose layout has an amplitude and stores idx take part (those ending in r draw idx from a seed and
    cannot). optimiser: the one that trains the amplitudes; its state (Adam's moments) of moved codes is set to 0. None: there is no such
    state. interval: optimiser steps from one move to the next. fraction: of a layer's codes that the first move takes; it falls on a half
    cosine to 0 at `until` steps, after which nothing moves. batches: how many of the last forward/backward passes before a move the
    gradient is summed over. closure: for "exchange", a function without arguments that returns the loss of a batch (a scalar tensor or
    float); called without gradients, before and after a layer's exchange. Without one the "exchange" of a layer cannot be judged, and
    ValueError says so.

    `moved` counts codes, `accepted` and `refused` layer exchanges. For transformers' Trainer:
    Trainer(callbacks=[reindexer.transformers_callback()]); Lightning's Trainer(callbacks=[reindexer.lightning_callback()]). torch.compile: hooks are on the layers for
    `batches` steps before a move, for which compiled models are traced once more.
    """

    def __init__(self, model: nn.Module, optimiser: torch.optim.Optimizer | None = None, *, until: int, interval: int = 50,
                 fraction: float = 0.1, batches: int = 1, method: str = "exchange",
                 closure: Callable[[], Tensor | float] | None = None) -> None:
        for name, value in (("until", until), ("interval", interval), ("batches", batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: is {value!r}, must be an int of at least 1")
        if batches > interval:
            raise ValueError(f"batches: is {batches}, must be at most interval={interval}")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: is {fraction}, must be above 0 and at most 1")
        if method not in METHODS:
            raise ValueError(f"method: is {method!r}, must be one of {', '.join(map(repr, METHODS))}")
        if method == "exchange" and closure is None:
            raise ValueError("closure: is None, but method 'exchange' keeps what lowers its loss; pass a function that returns the loss of a "
                             "batch, or method='gradient'")
        layers = [layer for layer in model.modules() if isinstance(layer, RBELinear)]
        self.layers = [layer for layer in layers if layer.amplitude is not None and not layer.layout.seeded]
        if not self.layers:
            raise ValueError("model: has no layer whose codes can be moved: in training form, with an amplitude and a stored idx (rbe22, "
                             "rbe32)")
        self.model, self.optimiser, self.closure, self.method = model, optimiser, closure, method
        self.until, self.interval, self.fraction, self.batches = until, interval, fraction, batches
        self.count = self.moved = self.accepted = self.refused = 0
        self._caught: dict[RBELinear, list[tuple[Tensor, Tensor]]] = {}
        self._hooks: list[Any] = []
        self._arm()

    def fraction_now(self) -> float:
        """The fraction that a move at this step takes."""
        return self.fraction * 0.5 * (1 + math.cos(math.pi * min(1.0, self.count / self.until)))

    def step(self) -> None:
        """One optimiser step has been made."""
        self.count += 1
        if self.count < self.until and self.count % self.interval == 0:
            with torch.no_grad():
                for layer in self.layers:
                    if self._caught.get(layer):
                        self._move(layer, self._caught[layer])
            self._disarm()
        if self.count < self.until:
            self._arm()
        else:
            self._disarm()

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """The hook of that name of Lightning and its kind, for a loop that calls hooks itself; Lightning's Trainer wants lightning_callback()."""
        self.step()

    def transformers_callback(self) -> Any:
        """A transformers.TrainerCallback that calls step after each optimiser step."""
        from .callbacks import for_transformers

        return for_transformers(self.step)

    def lightning_callback(self) -> Any:
        """A callback for Lightning's Trainer that calls step after each optimiser step."""
        from .callbacks import for_lightning

        return for_lightning(self.step)

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs beside the model's and the optimiser's state."""
        return {"count": self.count, "moved": self.moved, "accepted": self.accepted, "refused": self.refused}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count, self.moved, self.accepted, self.refused = (state[key] for key in ("count", "moved", "accepted", "refused"))
        self._disarm()
        self._arm()

    # ---- catching x and dy -------------------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        """Hooks the layers if the passes that come now count for the next move."""
        left = self.interval - self.count % self.interval
        if self._hooks or left > self.batches:
            return
        self._hooks = [layer.register_forward_hook(self._catch) for layer in self.layers]

    def _disarm(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._caught = [], {}

    def _catch(self, layer: RBELinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = inputs[0].detach()

        def keep(dy: Tensor) -> None:
            self._caught.setdefault(layer, []).append((x.reshape(-1, x.shape[-1]), dy.detach().reshape(-1, dy.shape[-1])))

        output.register_hook(keep)

    # ---- moving ------------------------------------------------------------------------------------------------------------------

    def _move(self, layer: RBELinear, caught: list[tuple[Tensor, Tensor]]) -> None:
        amplitude = layer.amplitude.detach()
        count = round(self.fraction_now() * amplitude.numel())
        if not count:
            return
        least = amplitude.abs().view(-1).topk(count, largest=False).indices
        gradient = vector_gradients(layer, caught, least)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError("gradient: a layer's caught gradients are not finite; rbe_torch.TrainingWatch names the layer and step")
        if self.method == "gradient":
            self._write(layer, least, gradient.abs().argmax(1), torch.zeros_like(least, dtype=amplitude.dtype))
            self.moved += count
            return
        self._exchange(layer, least, gradient)

    def _exchange(self, layer: RBELinear, codes: Tensor, gradient: Tensor) -> None:
        """Gives each code the vector of steepest descent, with the size of a middling code, and keeps it where the loss of the closure
        falls."""
        flat = layer.amplitude.detach().view(-1)
        size = flat.abs().median()
        steepest = gradient.abs().argmax(1)
        slope = gradient.gather(1, steepest[:, None])[:, 0]
        order = slope.abs().argsort(descending=True)
        before = float(self.closure())
        for attempt in range(_TRIES):
            chosen = order[: max(1, len(order) >> 2 * attempt)]
            idx, old = layer_idx(layer).view(-1)[codes[chosen]], flat[codes[chosen]].clone()
            self._write(layer, codes[chosen], steepest[chosen], -slope[chosen].sign() * size, reset=False)
            if float(self.closure()) < before:
                self._reset(layer, codes[chosen])
                self.accepted, self.moved = self.accepted + 1, self.moved + len(chosen)
                return
            self._write(layer, codes[chosen], idx, old, reset=False)
        self.refused += 1

    def _write(self, layer: RBELinear, codes: Tensor, idx: Tensor, amplitude: Tensor, reset: bool = True) -> None:
        words = torch.ops.rbe.unpack(layer.packed, **layer._options)
        flat = words.view(-1)
        flat[codes] = (flat[codes] & ~(255 << IDX_SHIFT)) | (idx.to(torch.int32) << IDX_SHIFT)
        layer.packed = torch.ops.rbe.pack(words, **layer._options)
        layer.amplitude.detach().view(-1)[codes] = amplitude.to(layer.amplitude.dtype)
        if reset:
            self._reset(layer, codes)

    def _reset(self, layer: RBELinear, codes: Tensor) -> None:
        state = {} if self.optimiser is None else self.optimiser.state.get(layer.amplitude, {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == layer.amplitude.shape:
                value.view(-1)[codes] = 0


def layer_idx(layer: RBELinear) -> Tensor:
    """int64 [m, K, M]: which basis vector each code uses."""
    return (torch.ops.rbe.unpack(layer.packed, **layer._options) >> IDX_SHIFT & 255).long()


def vector_gradients(layer: RBELinear, caught: list[tuple[Tensor, Tensor]], codes: Tensor) -> Tensor:
    """dL/dscale of `codes` (flat indices into [m, K, M], int64 [L]) had each of them the vector j: float32 [L, 256].

    gain[i] * sum over tokens of dy[i] * (x[group k] . basis[s, j]); caught: pairs x [tokens, n], dy [tokens, m]. Works group by group; the
    largest temporary has as many numbers as one group's moved codes times max(g, 256).
    """
    m, groups, stages = layer.amplitude.shape
    g, n = layer.layout.group, layer.in_features
    basis, gain = layer.basis.detach(), layer.gain.detach()
    row, group, stage = codes // (groups * stages), codes // stages % groups, codes % stages
    out = torch.empty(len(codes), 256, dtype=torch.float32, device=codes.device)
    order = group.argsort()
    starts = torch.searchsorted(group[order].contiguous(), torch.arange(groups + 1, device=codes.device)).tolist()
    pairs = [(x.float(), dy.float()) for x, dy in caught]
    for k in range(groups):
        mine = order[starts[k]:starts[k + 1]]
        for part in mine.split(max(1, _CHUNK // max(g, 256))):
            columns = slice(k * g, min((k + 1) * g, n))
            dw = sum(dy[:, row[part]].t() @ x[:, columns] for x, dy in pairs)
            dw = dw * gain[row[part], None]
            vectors = basis[:, :, : dw.shape[1]]
            for s in range(stages):
                here = (stage[part] == s).nonzero()[:, 0]
                if len(here):
                    out[part[here]] = dw[here] @ vectors[s].t()
    return out
