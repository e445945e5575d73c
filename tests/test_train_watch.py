"""A run that breaks is named by layer and step, and an optimiser that ignores the format's rates is warned of once."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import TrainingDiverged, TrainingWatch


def network() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    rbe_torch.convert(model, "rbe22_g4")
    return model


def backward(model: nn.Module) -> torch.Tensor:
    loss = model(torch.ones(3, 8)).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize("key, what", [("amplitude", "gradient of amplitude"), ("log_gain", "gradient of log_gain")])
def test_a_gradient_that_is_not_finite_is_named_by_layer_and_step(key: str, what: str) -> None:
    model = network()
    watch = TrainingWatch(model, interval=2)
    watch.step(backward(model))
    getattr(model[2], key).grad.view(-1)[1] = float("inf")
    with pytest.raises(TrainingDiverged, match=f"step 2: the {what} of layer '2'") as caught:
        watch.step(1.0)
    assert caught.value.step == 2 and caught.value.layer == "2"


def test_a_loss_that_is_nan_is_traced_to_the_parameter_at_once() -> None:
    model = network()
    watch = TrainingWatch(model, interval=1000)
    model[0].amplitude.data.view(-1)[3] = float("nan")
    with pytest.raises(TrainingDiverged, match="step 1: the parameter amplitude of layer '0' is not finite; the loss is nan"):
        watch.step(backward(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_value_is_found_wherever_it_is(dtype: torch.dtype, value: str) -> None:
    for place in (0, 5, 31, 32, 98):
        model = nn.Linear(33, 3, bias=False, dtype=dtype)
        model.weight.grad = torch.zeros_like(model.weight)
        TrainingWatch(model).step(1.0)
        model.weight.grad.view(-1)[place] = float(value)
        with pytest.raises(TrainingDiverged, match="step 1: the gradient of weight"):
            TrainingWatch(model).step(1.0)


def test_gradients_of_any_kind_can_be_watched() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(8, 4, sparse=True), "rest": nn.Linear(4, 2)})
    model.register_parameter("none", nn.Parameter(torch.zeros(0)))
    model["rest"](model["table"](torch.tensor([1, 1, 3]))).square().sum().backward()
    watch = TrainingWatch(model)
    watch.step(1.0)
    model["table"].weight.grad = model["table"].weight.grad * float("inf")
    with pytest.raises(TrainingDiverged, match="gradient of weight of layer 'table'"):
        watch.step(1.0)


def test_a_loss_that_breaks_by_itself_says_so() -> None:
    with pytest.raises(TrainingDiverged, match="it broke in the loss itself") as caught:
        TrainingWatch(network()).step(float("inf"))
    assert caught.value.layer == ""


def test_a_loss_that_leaves_for_good_is_named_and_a_spike_is_not() -> None:
    model = network()
    backward(model)
    model[2].amplitude.grad *= 1e6
    watch = TrainingWatch(model, patience=5)
    for step in range(60):
        watch.step(50.0 if step == 30 else 1.0)
    with pytest.raises(TrainingDiverged, match="step 65: the loss is 3 .* for 5 steps.*layer '2'"):
        for _ in range(10):
            watch.step(3.0)


def test_a_run_that_leaves_at_once_is_named_and_a_restless_start_is_not() -> None:
    watch = TrainingWatch(network())
    for step in range(60):
        watch.step((0.01, 0.2, 0.4)[step % 3])
    model = network()
    backward(model)
    watch = TrainingWatch(model)
    watch.step(2.3)
    with pytest.raises(TrainingDiverged, match="step 21: the loss is 500 and has been more than 20 times its usual 2.3"):
        for _ in range(30):
            watch.step(500.0)


def test_a_falling_loss_is_left_alone() -> None:
    watch = TrainingWatch(network())
    for step in range(300):
        watch.step(5.0 / (1 + step))


@pytest.mark.parametrize("options, text", [({"interval": 0}, "interval: is 0"), ({"rise": 1.0}, "rise: is 1.0"), ({"patience": True}, "patience: is True")])
def test_bad_arguments_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TrainingWatch(network(), **options)


# ---- learning rates --------------------------------------------------------------------------------------------------------------
def complaints(optimiser: torch.optim.Optimizer, model: nn.Module, steps: int = 2) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            backward(model)
            optimiser.step()
    return [str(warning.message) for warning in caught]


def test_one_rate_for_all_warns_once() -> None:
    model = network()
    found = complaints(torch.optim.AdamW(model.parameters(), weight_decay=0.0), model)
    assert len(found) == 1 and found[0].startswith("learning rates: the amplitudes") and "param_groups" in found[0]


def test_weight_decay_on_amplitudes_warns() -> None:
    model = network()
    groups = rbe_torch.param_groups(model)
    groups[0]["weight_decay"] = 0.1
    assert [text.partition(":")[0] for text in complaints(torch.optim.AdamW(groups), model)] == ["weight_decay"]


@pytest.mark.parametrize("make", [
    lambda model: torch.optim.AdamW(rbe_torch.param_groups(model)),
    lambda model: torch.optim.AdamW(rbe_torch.param_groups(model, rest=2e-3)),
    lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),  # SGD's rates follow the gradients' size: no ratio is right
    lambda model: torch.optim.AdamW([model[0].amplitude, model[2].amplitude, model[0].basis], weight_decay=0.0),
])  # fmt: skip
def test_what_may_be_right_is_left_alone(make) -> None:
    model = network()
    assert complaints(make(model), model) == []


def test_warm_up_is_not_a_wrong_rate() -> None:
    model = network()
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model))
    torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: step / 100)
    assert complaints(optimiser, model) == []
