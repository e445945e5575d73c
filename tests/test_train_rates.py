"""Learning rates: amplitudes move a layer's output as far as the dense rate would, whatever the layout; groups hold every parameter once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch.rates import BASIS_RATE, amplitude_multiple

ALIKE = 0.15  # relative, of the movement of 64 rows


@pytest.mark.parametrize("basis", ["trained", "seeded"])
@pytest.mark.parametrize("layout, n", [("rbe4r_g3", 96), ("rbe4r_g9", 1024), ("rbe2r_g5", 256), ("rbe9r_g18", 256), ("rbe22_g64", 512), ("rbe22x2_g32", 256), ("rbe32_g16", 200)])
def test_a_step_moves_outputs_as_far_as_a_dense_one(layout: str, n: int, basis: str) -> None:
    """Adam's first step is its rate times the gradient's sign, so an output y moves by rate * sum |dy / dparameter|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, 64))
    rbe_torch.convert(model, layout, seed=1, basis=basis, nonlinearity="linear", include=".*")
    x = torch.randn(n)
    moved = []
    for row in model(x[None])[0]:
        (gradient,) = torch.autograd.grad(row, model[0].amplitude, retain_graph=True)
        moved.append(float(gradient.abs().sum()))
    by_codes, by_weights = amplitude_multiple(layout, n) * sum(moved) / len(moved), float(x.abs().sum())
    assert abs(by_codes / by_weights - 1) < ALIKE


def test_each_layer_has_the_rate_of_its_size() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64), nn.Linear(64, 64))
    rbe_torch.convert(model, "rbe22_g16", include=".*")
    groups = rbe_torch.param_groups(model, lr=2e-3, rest=5e-3)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for layer in (model[0], model[2], model[3]):
        assert rate[id(layer.amplitude)] == pytest.approx(2e-3 * amplitude_multiple("rbe22_g16", layer.in_features))
        assert rate[id(layer.log_gain)] == rate[id(layer.bias)] == 5e-3
    assert rate[id(model[1].weight)] == 5e-3 and rate[id(model[0].basis)] == pytest.approx(BASIS_RATE * 2e-3)
    assert [group["name"] for group in groups] == ["amplitude", "amplitude", "basis", "gain", "rest"]
    assert all(group["weight_decay"] == 0 for group in groups if group["name"] != "rest") and "weight_decay" not in groups[-1]
    four = amplitude_multiple("rbe22_g16", 256) / amplitude_multiple("rbe22_g16", 64)
    assert four == pytest.approx(math.sqrt(4))


@pytest.mark.parametrize("rest", [0, -1e-3, float("nan"), float("inf")])
def test_a_rate_of_the_rest_that_is_none_is_refused(rest: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    rbe_torch.convert(model, "rbe22_g8", include=".*")
    with pytest.raises(ValueError, match="rest: is"):
        rbe_torch.param_groups(model, rest=rest)


def test_a_layout_without_amplitudes_has_no_multiple() -> None:
    with pytest.raises(ValueError, match="layout: rbe8x2_g8 has no amplitude"):
        amplitude_multiple("rbe8x2_g8", 64)


@pytest.mark.parametrize(("given", "error", "says"), [
    ({"lr": "1e-3"}, TypeError, "lr: is a str, must be a number"), ({"lr": 0.0}, ValueError, "lr: is 0.0, must be positive"),
    ({"rest": float("nan")}, ValueError, "rest: is nan, must be positive"),
])  # fmt: skip
def test_rates_that_are_none_are_refused(given, error, says) -> None:
    with pytest.raises(error, match=says):
        rbe_torch.param_groups(torch.nn.Linear(2, 2), **given)
