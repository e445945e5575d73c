"""Learning rates of the format's parameters: optimiser groups, and what an amplitude's rate is to a dense weight's.

An optimiser like Adam moves every parameter by about its rate a step, all in the direction that helps. With weights of variance 1/n in a
row, K M codes of a row, group size g and slope = d scale / d amplitude, one step moves the output of a row by up to

    dense    lr n |x|
    codes    rate gain slope K M |P|  =  rate slope sqrt(K M) |x|        gain = 1 / sqrt(n M), |P| = sqrt(g) |x|, n = K g

so the two move alike at rate = lr n / (slope sqrt(K M)), which is lr sqrt(n g) / slope for one stage. slope is its mean over the scales that
codes start with (normal, second moment 1): sqrt(4 + s^2) on the curve 2 sinh(u) of rbe4r and rbe2r, 2 (1 + |s|) on exp(2 u) - 1. The bits
of an amplitude do not come in: the cosine's small last rates settle it in a cell. Character GPT, d = 256: docs/training-experiments.md, "Learning rates".
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from .layout import Layout
from .linear import RBELinear

SLOPE_SINH = 2.22  # mean of sqrt(4 + s^2), s normal
SLOPE_EXP = 3.60  # mean of 2 (1 + |s|)
# Of a trained basis, times lr. Character GPT (d = 128, rbe22_g16, lr 1e-3, amplitudes 0.1, 800 steps): 2.124 with 50, 2.160 with 150.
BASIS_RATE = 50.0
_GROUPS = {"amplitude": "amplitude", "basis": "basis", "log_gain": "gain", "gain": "gain",
           "lowrank_left": "weight", "lowrank_right": "weight", "latent": "weight"}


def amplitude_multiple(layout: str | Layout, in_features: int) -> float:
    """Rate of amplitudes over the rate of a dense weight that moves outputs as far; above. ValueError: a layout without amplitudes."""
    layout = Layout.parse(layout)
    if not layout.has_amplitude:
        raise ValueError(f"layout: {layout} has no amplitude to train")
    slope = SLOPE_SINH if layout.amp_unstored else SLOPE_EXP
    return in_features / (slope * math.sqrt(layout.groups(in_features) * layout.stages))


def param_groups(model: nn.Module, lr: float = 1e-3, rest: float | None = None) -> list[dict[str, Any]]:
    """Optimiser groups over the trainable parameters of `model`, each once: amplitudes, basis, gains, weights and the rest.

    torch.optim.AdamW(rbe_torch.param_groups(model, lr=1e-3), betas=(0.9, 0.98)).

    lr: the rate that the converted layers would have if they were dense. Amplitudes get the rate that moves the outputs of their layer as
    far (this file's first lines): lr times 20 in a layer of 256 inputs at g = 9, 140 in one of 4096 at g = 64, one group for each such
    multiple, all named "amplitude". A trained basis, whose entries are of size 1, gets 50 lr. Low-rank factors (add_lowrank) and latent weights get lr.
    rest: the rate of gains (as their logarithm, so relative) and of everything that is not in codes: biases, norms, embeddings, heads. None: lr.
    Training from scratch, embeddings that start small want more than linear layers do: 8 lr in the character GPT of docs/training-experiments.md.

    No weight decay on amplitudes, basis and gains: it would pull amplitudes to 0, where a code is lost, and on gain and basis it acts on
    the same product twice.

    TypeError, ValueError: a rate is no number, or not positive and finite. A model trained with an optimiser whose groups ignore this warns once (rbe_torch/watch.py).
    """
    for name, value in (("lr", lr), ("rest", lr if rest is None else rest)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name}: is a {type(value).__name__}, must be a number")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: is {value}, must be positive and finite")
    rest = lr if rest is None else rest
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind, rate = (_GROUPS.get(key, "rest") if isinstance(module, RBELinear) else "rest"), rest
            if kind == "amplitude":
                rate = lr * amplitude_multiple(module.layout, module.in_features)
            elif kind == "basis":
                rate = lr * BASIS_RATE
            elif kind == "weight":
                rate = lr
            groups.setdefault((kind, rate), []).append(parameter)
    order = list(dict.fromkeys(_GROUPS.values())) + ["rest"]
    return [
        {"name": kind, "params": parameters, "lr": rate, **({} if kind in ("weight", "rest") else {"weight_decay": 0.0})}
        for (kind, rate), parameters in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    ]
