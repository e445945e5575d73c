"""Training in codes: gradients that are right, a model that learns, and finishing, saving and resuming that change no bit."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear, reference

TRAINABLE = ["rbe22_g8", "rbe32x2_g5", "rbe9r_g7", "rbe4r_g3", "rbe2r_g2"]  # codes with amplitudes
LAYOUTS = [*TRAINABLE, "rbe8x2_g8", "rbe16s_g8"]
LEARNT = 0.5  # of the first loss; a model that learns nothing stays above 0.9
# relative to the largest value of a tensor
FLOAT64_SUM = 1e-6  # scales and the parameters' own gradients are float32
FLOAT32_SUM = 1e-4


def trained_layer(layout: str = "rbe22_g8", n: int = 32, m: int = 12) -> RBELinear:
    return rbe_torch.prepare_training(RBELinear(n, m, layout=layout, seed=1))


def network(layout: str = "rbe22_g8", seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 4))
    rbe_torch.convert(model, layout, seed=seed)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 16, generator=generator)
    return x, torch.sin(x @ torch.randn(16, 4, generator=generator))


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rbe_torch.param_groups(model, lr=1e-3), betas=(0.9, 0.98))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


# ---- gradients -------------------------------------------------------------------------------------------------------------------
def by_the_format(lin: RBELinear, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients from FORMAT's formulas, in float64 and without the project's operators: a dense weight, its gradient, then each parameter's."""
    words, (m, n), g = lin.codes.long(), (lin.out_features, lin.in_features), lin.layout.group
    stages, idx = torch.arange(lin.layout.stages), words >> 10 & 255
    vectors = lin.basis.detach().double()[stages, idx]  # [m, K, M, g]
    if lin.layout.fields == "rbe16s":
        signs = 1.0 - 2.0 * (words[..., None] >> torch.arange(8) & 1)
        vectors = vectors * signs
    scale, gain = reference.scale(lin.codes, lin.layout.fields).double(), lin.log_gain.detach().double().exp()
    unit = (scale[..., None] * vectors).sum(2).reshape(m, -1)[:, :n]
    dweight = nn.functional.pad(dy.t() @ x, (0, -n % g)).reshape(m, -1, 1, g)
    along = (dweight * vectors).sum(-1) * gain[:, None, None]  # dL/dscale
    ddirection = dweight * scale[..., None] * gain[:, None, None, None] * (signs if lin.layout.fields == "rbe16s" else 1)
    dbasis = torch.zeros(lin.layout.basis_shape, dtype=torch.float64).index_put_((stages.expand_as(idx), idx), ddirection, accumulate=True)
    gradients = {"x": dy @ (gain[:, None] * unit), "bias": dy.sum(0), "basis": dbasis, "log_gain": gain * ((dy.t() @ x) * unit).sum(1)}
    if lin.layout.has_amplitude:
        row, amp = (words >> 18 & 15) * 2 + (words >> 8 & 1), words & 255
        table = reference.curve_table().double()
        gradients["amplitude"] = along * 256 * (table[row, amp + 1] - table[row, amp])
    return gradients


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_format(layout: str, dtype: torch.dtype) -> None:
    lin = trained_layer(layout).to(dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 32, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(6, 12, generator=generator).to(dtype)
    lin(x).backward(dy)
    got = {"x": x.grad, **{name: p.grad for name, p in lin.named_parameters()}}
    want = by_the_format(lin, x.detach().double(), dy.double())
    assert set(got) == set(want)
    for name, tensor in want.items():
        largest = float(tensor.abs().max())
        assert largest > 0 and got[name].dtype == (x if name == "x" else getattr(lin, name)).dtype
        error = float((got[name].double() - tensor).abs().max()) / largest
        assert error < (FLOAT64_SUM if dtype == torch.float64 else FLOAT32_SUM), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_training_computes_the_same_gradients(layout: str) -> None:
    lin = trained_layer(layout)
    compiled = torch.compile(lin, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 32)
    gradients = []
    for run in (lin, compiled):
        lin.zero_grad()
        run(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lin.named_parameters()})
    torch._dynamo.reset()
    assert set(gradients[0]) == set(gradients[1])
    for name, tensor in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], tensor, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    lin = trained_layer()
    x = torch.randn(5, 32, requires_grad=True)
    lin(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in lin.named_parameters()}
    lin.zero_grad()
    checkpoint(lin, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, plain[name]) for name, p in lin.named_parameters())


def test_autocast_trains_the_formats_numbers_in_float32() -> None:
    lin = trained_layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lin(torch.randn(5, 32))
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for name, p in lin.named_parameters():
        assert p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) and float(p.grad.abs().max()) > 0, name


# ---- learning --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiny_model_learns_and_no_dense_weight_is_kept(layout: str) -> None:
    model = network(layout)
    losses = train(model, optimiser_of(model), 60)
    assert losses[-1] < LEARNT * losses[0]
    for lin in model:
        if isinstance(lin, RBELinear):
            shapes = {tuple(t.shape) for t in (*lin.parameters(), *lin.buffers())}
            assert (lin.out_features, lin.in_features) not in shapes


def test_a_frozen_parameter_stays_what_it_was() -> None:
    model = network()
    model[0].basis.requires_grad_(False)  # all three layers share it
    before = model[0].basis.clone()
    train(model, optimiser_of(model), 3)
    assert torch.equal(model[2].basis, before)


# ---- finishing -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_evaluated_is_what_is_saved_and_loaded(layout: str, tmp_path: Path) -> None:
    model = network(layout)
    train(model, optimiser_of(model), 5)
    codes = [lin.codes for lin in model if isinstance(lin, RBELinear)]
    rbe_torch.finish_training(model)
    x, _ = data()
    want = model(x)
    assert all(torch.equal(lin.codes, kept) for lin, kept in zip((model[0], model[2], model[4]), codes, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as: stored as float32 because fp16 does not hold it
        rbe_torch.save_pretrained(model, tmp_path)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 4))
    loaded = rbe_torch.load_pretrained(tmp_path, dense)
    assert torch.equal(loaded(x), want)
    same_state(loaded, model)
    assert loaded[0].basis is loaded[2].basis is loaded[4].basis


def test_a_loaded_model_can_be_trained_further(tmp_path: Path) -> None:
    model = rbe_torch.finish_training(network())
    rbe_torch.save_pretrained(model, tmp_path)
    dense = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24, bias=False), nn.Tanh(), nn.Linear(24, 4))
    loaded = rbe_torch.prepare_training(rbe_torch.load_pretrained(tmp_path, dense))
    assert loaded[0].basis is loaded[4].basis and loaded[0].basis.requires_grad
    losses = train(loaded, optimiser_of(loaded), 60)
    assert losses[-1] < LEARNT * losses[0]


@pytest.mark.parametrize("verb", [rbe_torch.prepare_training, rbe_torch.finish_training])
def test_doing_it_twice_changes_nothing(verb) -> None:
    model = verb(network())
    before = copy.deepcopy(model.state_dict())
    verb(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("amplitude", float("nan"), "amplitude: has 1 values that are not finite"),  # the codes would hold any number
        ("amplitude", float("inf"), "amplitude: has 1 values that are not finite"),
        ("basis", float("nan"), "basis: has 1 values that are not finite"),
        ("basis", 1e6, "basis: holds 1e.06"),
        ("log_gain", float("nan"), "log_gain: has 1 values that are not finite"),
        ("log_gain", 20.0, "gain: holds 4.85e.08"),  # more than fp16 holds
        ("log_gain", 200.0, "gain: holds inf"),
    ],
)
def test_values_that_cannot_be_finished_are_refused_and_nothing_is_changed(name: str, value: float, text: str) -> None:
    model = network()
    getattr(model[4], name).data.view(-1)[1] = value
    before = copy.deepcopy(dict(model.named_parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=text):
            rbe_torch.finish_training(model)
    now = dict(model.named_parameters())
    assert set(now) == set(before) and all(lin.training_form for lin in (model[0], model[2], model[4]))
    assert all(torch.equal(value, before[key]) or bool(value.isnan().any()) for key, value in now.items())


def test_the_gain_of_a_layer_in_training_form_cannot_be_assigned() -> None:
    lin = trained_layer()
    with pytest.raises(AttributeError, match="log_gain"):
        lin.gain = nn.Parameter(torch.ones(12))
    rbe_torch.finish_training(lin)
    lin.gain = nn.Parameter(torch.ones(12))
    assert torch.equal(lin.gain, torch.ones(12))


def test_parameters_keep_their_order() -> None:
    """States of optimisers go by it: a layer that was trained must take those of one that was loaded."""
    lin = RBELinear(16, 8, layout="rbe22_g8")
    before = [name for name, _ in lin.named_parameters()]
    rbe_torch.finish_training(rbe_torch.prepare_training(lin))
    assert [name for name, _ in lin.named_parameters()] == before


def test_a_tiny_gain_stays_positive() -> None:
    lin = trained_layer()
    lin.log_gain.data[0] = -40.0
    rbe_torch.finish_training(lin)
    assert float(lin.gain[0]) == 2.0**-24 and lin.problem() == ""


def test_a_model_on_the_meta_device_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8, device="meta"))
    rbe_torch.convert(model, "rbe22_g8")
    with pytest.raises(ValueError, match="meta device"):
        rbe_torch.finish_training(model)


# ---- resuming --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_run_resumes_on_the_same_bits(layout: str, tmp_path: Path) -> None:
    model = network(layout)
    optimiser = optimiser_of(model)
    train(model, optimiser, 4)
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict()}, tmp_path / "state.pt")
    rest = train(model, optimiser, 4)

    again = network(layout, seed=9)  # other random codes and another seed
    resumed = optimiser_of(again)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimiser"])
    assert train(again, resumed, 4) == rest
    same_state(again, model)


def test_a_state_with_values_that_are_not_finite_is_not_resumed() -> None:
    model = network()
    state = copy.deepcopy(model.state_dict())
    state["2.amplitude"].view(-1)[0] = float("nan")
    with pytest.raises(RuntimeError, match="2: amplitude: has 1 values that are not finite"):
        model.load_state_dict(state)


# ---- refusals --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lr", [0, -1e-3, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(lr: float) -> None:
    with pytest.raises(ValueError, match="lr: is"):
        rbe_torch.param_groups(trained_layer(), lr=lr)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "3", True])
def test_a_seed_that_is_none_is_refused_and_nothing_is_replaced(seed: object) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises((ValueError, TypeError), match="seed: is"):
        rbe_torch.convert(model, seed=seed)
    assert type(model[0]) is nn.Linear
