"""The size of initial weights: gains that keep the variance of activations or of gradients through depth, and a smaller start.

nn.Linear, and with it a fresh RBELinear, draws weights of variance 1/(3 n): each linear layer makes activations three times smaller in
variance, which LayerNorm repairs and a plain deep network does not. Here the gain of every row is set so that the row's squared norm is
exactly

    mode "fan_in"    f^2          the output of a row has f^2 times the variance of the input       (activations)
    mode "fan_out"   f^2 n / m    the same for what goes back                                        (gradients)

(at most 4 times the median gain), with f = nn.init.calculate_gain(nonlinearity): 1 for linear, sqrt 2 for relu, 5/3 for tanh. Exactly,
because a row of few codes would differ much from its mean.

A smaller start (scale_weights) makes amplitudes smaller and leaves gains alone, so that an optimiser's step is a larger part of a weight.

Layouts whose codes have no sign (rbe8) do not keep it through relu: their rows share the mean of the basis, and inputs that are all
positive add it up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .codes import scaled_amplitude
from .encode import fp16_gain
from .linear import RBELinear

_ROWS = 64  # decoded at a time
# Times the median: a row of one or two codes can be drawn with almost nothing in it, and a gain that makes up for it explodes when they
# grow.
LARGEST_GAIN = 4.0
SMALLEST_SCALE = 0.01  # below it eight bits of amplitude round to 0


def row_squares(layer: RBELinear) -> Tensor:
    """float32 [m]: sum over a row of W^2 at gain 1, without an m x n tensor."""
    codes, out = layer.codes, []
    for first in range(0, layer.out_features, _ROWS):
        part = codes[first:first + _ROWS]
        ones = layer.basis.detach().new_ones(len(part))
        options = {**layer._options, "layout": str(layer.layout).partition("+")[0], "row0": first}
        out.append(torch.ops.rbe.decode(part, layer.basis.detach(), ones, **options).square().sum(1))
    return torch.cat(out)


def calculated_gain(nonlinearity: str, param: float | None = None) -> float:
    """torch's factor; ValueError naming the argument where torch has none."""
    try:
        return nn.init.calculate_gain(nonlinearity, param)
    except ValueError as error:
        raise ValueError(f"nonlinearity: is {nonlinearity!r}, which torch.nn.init.calculate_gain does not know") from error


@torch.no_grad()
def keep_variance(layer: RBELinear, nonlinearity: str = "linear", mode: str = "fan_in", param: float | None = None) -> None:
    """Sets the gain of a layer as above. nonlinearity, param: of torch.nn.init.calculate_gain. ValueError: a mode or nonlinearity that is
    none, a residual."""
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode: is {mode!r}, must be 'fan_in' or 'fan_out'")
    if layer.layout.residual is not None:
        raise ValueError(f"layer: is of {layer.layout}, whose residual no gain multiplies")
    factor = calculated_gain(nonlinearity, param)
    if mode == "fan_out":
        factor *= math.sqrt(layer.in_features / layer.out_features)
    squares = row_squares(layer)
    floor = squares.median() / LARGEST_GAIN**2
    gain = fp16_gain(factor / squares.clamp(min=float(floor) or 1.0).sqrt())
    if layer.log_gain is not None:
        layer.log_gain.copy_(gain.log())
    else:
        layer._parameters["gain"].copy_(gain)


@torch.no_grad()
def scale_weights(layer: RBELinear, factor: float) -> None:
    """Makes the weights of a layer in training form `factor` times as large, in the mean of its squares exactly: by its amplitudes as far as their rounding
    allows, the rest, and all of it in a layout without amplitudes, by its gains."""
    before = row_squares(layer) @ layer.gain.square()
    if layer.amplitude is not None:
        layer.amplitude.copy_(scaled_amplitude(layer.amplitude, factor, layer.layout))
    after = row_squares(layer) @ layer.gain.square()
    if after > 0:
        layer.log_gain.add_((factor * (before / after).sqrt()).log())
