"""Models and calibration that compress was not made for: each is taken, left alone with a reason, or refused by name with the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))


def with_value(value: float) -> torch.Tensor:
    x = torch.randn(50, 32)
    x[3, 4] = value
    return x


@pytest.mark.parametrize(("options", "kind", "text"), [
    ({"calibration": [with_value(float("nan"))]}, ValueError, "layer '0' gets values that are not finite"),
    ({"calibration": [torch.randn(4, 32), with_value(float("inf"))]}, ValueError, "layer '0' gets values that are not finite"),
    ({"calibration": [with_value(float("nan"))], "bits": 30}, ValueError, "gets values that are not finite"),
    ({"calibration": [torch.randn(4, 32), torch.zeros(0, 32)]}, ValueError, r"batch 1 holds an empty tensor \(0, 32\)"),
    ({"include": 5}, TypeError, "include: is a int"),
    ({"exclude": 5}, TypeError, "exclude: is a int"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_and_the_model_stays(options: dict, kind: type, text: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=text):
        rbe_torch.compress(model, "rbe8x2_g8", progress=False, **options)
    assert not any(isinstance(module, RBELinear) for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_padding_may_hold_anything() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    x, mask = torch.randn(4, 6, 32), torch.ones(4, 6, dtype=torch.int64)
    x[1, 4:], mask[1, 4:] = float("nan"), 0
    model = Embed()
    rbe_torch.compress(model, "rbe8x2_g8", progress=False, calibration=[{"x": x, "attention_mask": mask}])
    assert bool(torch.isfinite(model(torch.randn(2, 32), mask)).all())


def test_a_bias_of_minus_infinity_stays_one() -> None:
    """Routers mask experts with it; it is no value that was fitted."""
    model = net()
    model[2].bias.data[3] = -float("inf")
    rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    assert model(torch.randn(2, 32))[:, 3].tolist() == [-float("inf")] * 2


@pytest.mark.parametrize("verb", [rbe_torch.compress, rbe_torch.convert])
def test_a_lazy_layer_is_named_before_anything_is_replaced(verb) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match="model: '0.weight' is lazy"):
        verb(model, "rbe8x2_g8")
    assert type(model[1]) is nn.Linear
    model(torch.randn(2, 3))
    verb(model, "rbe8x2_g8")
    assert isinstance(model[1], RBELinear)


@pytest.mark.parametrize(("options", "text"), [
    ({"gain": torch.tensor([1.0, 0.0, 1.0])}, "gain: has 1 values that are not finite and positive, the first in row 1"),
    ({"gain": torch.ones(4)}, r"gain: has shape \(4,\), must be \(3,\)"), ({"seed": -1}, "seed: is -1"),
])  # fmt: skip
def test_a_wrong_argument_of_from_linear_is_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RBELinear.from_linear(nn.Linear(8, 3), "rbe8_g8", **options)


def test_a_basis_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="basis: has 2048 values that are not finite"):
        RBELinear(8, 4, layout="rbe22_g8", basis=nn.Parameter(torch.full((1, 256, 8), float("nan"))))
