"""RBELinear: what it computes, what it accepts, what casting, copying, saving and training it keeps."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from operator_cases import random_codes
from torch import nn

import rbe_torch
from rbe_torch import Layout, RBELinear
from rbe_torch.codes import amplitude_of, with_amplitude

LAYOUTS = ["rbe22_g8", "rbe32x2_g5", "rbe8x2_g8", "rbe16s_g8", "rbe9r_g7", "rbe4r_g3", "rbe2r_g5"]
TRAINABLE = ["rbe22_g8", "rbe32_g5", "rbe9r_g7", "rbe4r_g3", "rbe2r_g5"]
FLOAT32_SUM = 2e-5  # absolute, sums of some tens of products of values near 1
VARIANCE = 0.03  # relative, of a sample of 2^17 weights


def made(layout: str = "rbe22_g8", n: int = 37, m: int = 11, **options) -> RBELinear:
    return RBELinear(n, m, layout=layout, seed=1, **options)


def parts(layout: str, m: int = 6, n: int = 21, seed: int = 77) -> dict:
    """Random arguments of from_codes."""
    generator = torch.Generator().manual_seed(5)
    parsed = Layout.parse(layout)
    return {
        "codes": random_codes(layout, m, n, generator, seed if parsed.seeded else 0),
        "basis": torch.randn(parsed.basis_shape, generator=generator), "gain": torch.rand(m, generator=generator) + 0.1,
        "bias": torch.randn(m, generator=generator), "layout": layout, "in_features": n, "seed": seed if parsed.seeded else None,
    }  # fmt: skip


# ---- values ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_the_product_with_weight(layout: str) -> None:
    lin = RBELinear.from_codes(**parts(layout))
    x = torch.randn(3, 5, lin.in_features)
    want = nn.functional.linear(x, lin.weight, lin.bias)
    with torch.no_grad():
        fast = lin(x)
    torch.testing.assert_close(fast, want, atol=FLOAT32_SUM * float(lin.weight.abs().max()), rtol=1e-5)
    torch.testing.assert_close(lin(x), fast, atol=0, rtol=0)  # the differentiable way computes the same


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_codes_keeps_what_it_is_given(layout: str) -> None:
    given = parts(layout)
    lin = RBELinear.from_codes(**given)
    for name in ("codes", "basis", "gain", "bias"):
        assert torch.equal(getattr(lin, name), given[name]), name
    again = RBELinear.from_codes(lin.packed, **{k: v for k, v in given.items() if k != "codes"})
    assert torch.equal(again.packed, lin.packed)


def test_a_basis_parameter_is_shared_and_a_tensor_is_copied() -> None:
    given = parts("rbe22_g8")
    table = nn.Parameter(given["basis"], requires_grad=False)
    assert RBELinear.from_codes(**{**given, "basis": table}).basis is table
    lin = RBELinear.from_codes(**given)
    given["basis"].zero_()
    given["gain"].zero_()
    assert lin.basis.abs().max() > 0 and lin.gain.min() > 0


@pytest.mark.parametrize("layout", [*LAYOUTS, "rbe8x3_g16"])
def test_random_weights_have_the_variance_of_nn_linear(layout: str) -> None:
    n, m = 512, 256
    torch.manual_seed(0)
    lin = RBELinear(n, m, layout=layout)
    # a table of 256 vectors is shared by all the rows, so weights are correlated; its mean square is 1 exactly and that of the used codes nearly
    assert float(lin.weight.square().mean()) == pytest.approx(1 / (3 * n), rel=VARIANCE * 3)
    x = torch.randn(64, n)
    with torch.no_grad():
        out, reference = float((lin(x) - lin.bias).var()), float(nn.Linear(n, m, bias=False)(x).var())
    assert out == pytest.approx(reference, rel=0.25)
    assert float(lin.bias.detach().abs().max()) <= n**-0.5


def test_torchs_seed_decides_the_random_codes() -> None:
    torch.manual_seed(3)
    first = RBELinear(16, 4, layout="rbe9r_g4")
    second = RBELinear(16, 4, layout="rbe9r_g4")
    torch.manual_seed(3)
    again = RBELinear(16, 4, layout="rbe9r_g4")
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, second.weight)
    assert int(first.seed) == int(again.seed) != int(second.seed)


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe8x2_g8", "rbe16s_g8", "rbe9r_g4", "rbe8x2_g8+int8", "rbe8_g8+fp8", "rbe8_g8+lr4", "rbe8_g8+sp0.1"])
def test_from_linear_encodes_the_weight(layout: str) -> None:
    torch.manual_seed(0)
    source = nn.Linear(40, 24).to(torch.bfloat16)
    basis = torch.randn(Layout.parse(layout).basis_shape)
    lin = RBELinear.from_linear(source, layout, basis=basis, seed=9)
    error = (lin.weight.float() - source.weight.float()).square().sum() / source.weight.float().square().sum()
    assert error < (0.01 if layout.endswith(("int8", "fp8")) else 0.95)  # random vectors hold little, but never less than nothing
    assert lin.bias is source.bias and lin.dtype == torch.bfloat16 == lin.weight.dtype
    for tensor in (lin.basis, lin.gain):
        assert torch.equal(tensor.half().float(), tensor) and tensor.dtype == torch.float32
    plain = RBELinear.from_linear(source, layout.partition("+")[0], basis=basis, seed=9)
    plain_error = (plain.weight.float() - source.weight.float()).square().sum() / source.weight.float().square().sum()
    if "+" in layout:
        assert error < plain_error
    with torch.no_grad():
        x = torch.randn(2, 40)
        torch.testing.assert_close(lin.float()(x), nn.functional.linear(x, lin.weight, lin.bias), atol=1e-4, rtol=1e-4)


def test_from_linear_fits_a_basis_of_its_own() -> None:
    source = nn.Linear(64, 64, bias=False)
    lin = RBELinear.from_linear(source, "rbe8x2_g8")
    assert lin.bias is None and lin.basis.shape == (2, 256, 8)
    assert (lin.weight - source.weight).square().sum() / source.weight.square().sum() < 0.1


def test_from_linear_keeps_zero_rows_small_and_finite() -> None:
    source = nn.Linear(16, 3)
    source.weight.data[1] = 0
    lin = RBELinear.from_linear(source, "rbe8_g8", basis=torch.randn(1, 256, 8))
    assert float(lin.weight[1].detach().abs().max()) < 1e-6 and bool((lin.gain > 0).all())


# ---- refusals --------------------------------------------------------------------------------------------------------------------
def broken(layout: str, **changes) -> None:
    given = parts(layout)
    RBELinear.from_codes(**{**given, **{k: v(given[k]) if callable(v) else v for k, v in changes.items()}})


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"codes": lambda c: c.long()}, "codes: are torch.int64"),
        ({"codes": lambda c: c[:, :-1]}, "codes: have shape"),
        ({"codes": lambda c: c[:0]}, "codes: have shape"),
        ({"codes": lambda c: c[0]}, "codes: have shape"),
        ({"codes": lambda c: c | 1 << 30}, "codes"),
        ({"codes": [1, 2]}, "codes: is a list"),
        ({"basis": lambda b: b[..., :-1]}, r"basis: has shape \(1, 256, 7\), must be \(1, 256, 8\)"),
        ({"basis": lambda b: b.int()}, "basis: is torch.int32"),
        ({"basis": lambda b: b.index_fill(2, torch.tensor(1), float("nan"))}, "basis: has 256 values that are not finite"),
        ({"basis": lambda b: b.double() + 1e-12}, "basis: is torch.float64"),
        ({"basis": lambda b: b.to("meta")}, "basis: is on meta"),
        ({"gain": lambda g: g[:-1]}, "gain: has shape"),
        ({"gain": lambda g: g * float("inf")}, "gain: .*not finite"),
        ({"gain": lambda g: g.index_fill(0, torch.tensor(2), 0)}, "gain: has 1 values that are not positive, the first in row 2"),
        ({"gain": lambda g: -g}, "gain: .*not positive"),
        ({"bias": lambda b: b[:-1]}, "bias"),
        ({"bias": lambda b: b.int()}, "bias"),
        ({"in_features": 0}, "in_features: is 0"),
        ({"in_features": -3}, "in_features: is -3"),
        ({"in_features": 2.5}, "in_features: is 2.5"),
        ({"in_features": 30}, "codes: have shape .* in_features=30"),
        ({"seed": 1}, "seed: is 1, must be None"),
        ({"layout": "rbe22_g0"}, "layout"),
        ({"residual": {"residual": torch.zeros(1)}}, "residual"),
    ],
)
def test_from_codes_refuses_by_name(changes: dict, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        broken("rbe22_g8", **changes)


@pytest.mark.parametrize("seed, text", [(None, "seed: is None"), (-1, "seed"), (2**32, "seed"), (78, "idx"), (1.5, "seed")])
def test_from_codes_checks_the_seed(seed: object, text: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=text):
        broken("rbe9r_g7", seed=seed)


def test_padding_bits_of_packed_codes_are_checked() -> None:
    given = parts("rbe22_g8", n=8)
    packed = RBELinear.from_codes(**given).packed.clone()
    packed[1, -1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        RBELinear.from_codes(packed, **{k: v for k, v in given.items() if k != "codes"})


@pytest.mark.parametrize("options", [{"in_features": 0}, {"out_features": -1}, {"layout": "nope"}, {"dtype": torch.int8}, {"seed": -1}, {"in_features": True}])
def test_the_constructor_refuses_by_name(options: dict) -> None:
    name = next(iter(options))
    with pytest.raises((ValueError, TypeError), match=name):
        RBELinear(**{"in_features": 8, "out_features": 4, **options})


@pytest.mark.parametrize("module", [nn.Conv2d(1, 1, 1), nn.LazyLinear(3), nn.modules.linear.NonDynamicallyQuantizableLinear(3, 3)])
def test_from_linear_refuses_other_modules(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="nn_linear"):
        RBELinear.from_linear(module)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda w: w.fill_(float("nan")), "weight: .*not finite"),
        (lambda w: w.mul_(1e30), "weight: .*65504"),
    ],
)
def test_from_linear_refuses_weights_that_it_cannot_hold(change, text: str) -> None:
    source = nn.Linear(8, 4)
    change(source.weight.data)
    with pytest.raises(ValueError, match=text):
        RBELinear.from_linear(source, "rbe8_g8", basis=torch.randn(1, 256, 8))


def test_from_linear_refuses_bad_basis_and_gain() -> None:
    source = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="basis: has shape"):
        RBELinear.from_linear(source, "rbe8_g8", basis=torch.randn(256, 8))
    with pytest.raises(ValueError, match="basis: is so small"):
        RBELinear.from_linear(source, "rbe8_g8", basis=torch.full((1, 256, 8), 1e-7))
    with pytest.raises(ValueError, match="basis: holds"):
        RBELinear.from_linear(source, "rbe8_g8", basis=torch.full((1, 256, 8), 1e6))
    with pytest.raises(ValueError, match="gain"):
        RBELinear.from_linear(source, "rbe8_g8", basis=torch.randn(1, 256, 8), gain=torch.zeros(4))


def test_a_wrong_input_is_named() -> None:
    with pytest.raises(RuntimeError, match="x"):
        made()(torch.randn(2, 36))


# ---- drop-in ---------------------------------------------------------------------------------------------------------------------
def test_weight_is_read_only_and_says_what_to_do() -> None:
    lin = made()
    for value in (torch.zeros(11, 37), nn.Parameter(torch.zeros(11, 37)), None):
        with pytest.raises(AttributeError, match="from_linear"):
            lin.weight = value
    assert "weight" not in lin.state_dict() and "weight" not in dict(lin.named_parameters())
    assert not lin.weight.requires_grad


def test_looks_like_a_linear_but_is_none() -> None:
    lin = made(bias=False)
    assert (lin.in_features, lin.out_features, tuple(lin.weight.shape), lin.bias) == (37, 11, (11, 37), None)
    assert not isinstance(lin, nn.Linear)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repr_shows_layout_and_bits(layout: str) -> None:
    lin = made(layout)
    assert f"layout={layout}" in repr(lin) and f"bits_per_weight={lin.bits_per_weight:.3f}" in repr(lin)


def same(a: RBELinear, b: RBELinear) -> None:
    assert a.layout == b.layout and a.dtype == b.dtype and a.extra_repr() == b.extra_repr()
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype and torch.equal(ours[key], theirs[key]), key
    x = torch.randn(2, a.in_features)
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("layout", [*LAYOUTS, "rbe8_g8+int8", "rbe8_g8+fp8", "rbe8_g8+lr2", "rbe8_g8+sp0.2"])
@pytest.mark.parametrize("train", [False, True])
def test_copies_and_pickles_are_the_same_layer(layout: str, train: bool) -> None:
    lin = made(layout, n=16)
    if train:
        rbe_torch.prepare_training(lin)
    same(lin, copy.deepcopy(lin))
    same(lin, pickle.loads(pickle.dumps(lin)))
    file = io.BytesIO()
    torch.save(lin.state_dict(), file)
    file.seek(0)
    other = RBELinear(16, 11, layout=layout, seed=2)
    if train:
        rbe_torch.prepare_training(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    same(lin, other)


def test_a_copied_model_shares_its_basis_as_the_original_does() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    rbe_torch.convert(model, "rbe22_g8")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(torch.float64), model.to("cpu")):
        assert other[0].basis is other[2].basis
    assert copy.deepcopy(model)[0].basis is not model[0].basis


# ---- casting ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.type(torch.float16)])
@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe9r_g8", "rbe8_g8+fp8", "rbe8_g8+sp0.2"])
@pytest.mark.parametrize("train", [False, True])
def test_casting_changes_the_bias_and_loses_no_code(cast, layout: str, train: bool) -> None:
    lin = made(layout, n=16)
    if train:
        rbe_torch.prepare_training(lin)
    before = copy.deepcopy(lin).state_dict()
    exact = lin.weight
    cast(lin)
    for key, tensor in lin.state_dict().items():
        if key != "bias":
            assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key
    assert lin.bias.dtype == lin.weight.dtype == lin.dtype != torch.float32
    assert torch.equal(lin.float().weight, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_decide_the_dtype_of_the_result(dtype: torch.dtype) -> None:
    lin = made().to(dtype)
    x = torch.randn(3, 37).to(dtype)
    got = lin(x)
    assert got.dtype == dtype
    want = nn.functional.linear(x.double(), lin.double().weight, lin.bias)
    torch.testing.assert_close(got.double(), want, atol=0.05 if dtype == torch.bfloat16 else 0.01, rtol=0.02)


def test_default_dtype_is_honoured() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        lin = RBELinear(8, 4, layout="rbe22_g8")
    finally:
        torch.set_default_dtype(torch.float32)
    assert lin.bias.dtype == lin.weight.dtype == torch.float64 and lin.basis.dtype == torch.float32


# ---- meta device -----------------------------------------------------------------------------------------------------------------
def test_meta_layers_have_shapes_and_can_be_filled() -> None:
    source = made("rbe9r_g7")
    for lin in (made("rbe9r_g7", device="meta"), made("rbe9r_g7").to("meta")):
        assert lin.weight.is_meta and lin.weight.shape == (11, 37) and lin.codes.shape == (11, 6, 1)
        assert lin(torch.empty(2, 37, device="meta")).shape == (2, 11)
        assert repr(lin) == repr(source)
        lin.to_empty(device="cpu").reset_parameters()
        assert torch.isfinite(lin(torch.randn(2, 37))).all() and lin.problem() == ""
        lin.load_state_dict(source.state_dict())
        same(lin, source)
    lin = made("rbe9r_g7", device="meta")
    lin.load_state_dict(source.state_dict(), assign=True)
    same(lin, source)


def test_torch_device_and_accelerate_make_empty_layers() -> None:
    accelerate = pytest.importorskip("accelerate")
    with torch.device("meta"):
        assert RBELinear(8, 4, layout="rbe22_g8").packed.is_meta
    with accelerate.init_empty_weights():
        model = nn.Sequential(nn.Linear(16, 8), RBELinear(8, 4, layout="rbe22_g8"))
    assert model[1].basis.is_meta and model[1].bias.is_meta
    with accelerate.init_empty_weights(include_buffers=True):
        lin = RBELinear(8, 4, layout="rbe9r_g8")
    assert lin.packed.is_meta
    source = RBELinear(8, 4, layout="rbe9r_g8")
    for name, tensor in source.state_dict().items():
        accelerate.utils.set_module_tensor_to_device(lin, name, "cpu", tensor)
    assert torch.equal(lin.packed, source.packed) and torch.equal(lin.gain, source.gain)


# ---- state_dict ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("other", ["rbe32_g8", "rbe8x2_g8", "rbe22_g4", "rbe9r_g8"])
def test_a_state_dict_of_another_layout_is_refused(other: str) -> None:
    lin, state = made("rbe22_g8"), made(other).state_dict()
    before = copy.deepcopy(lin.state_dict())
    with pytest.raises(RuntimeError, match=f"layout {other}"):
        lin.load_state_dict(state)
    with pytest.raises(RuntimeError, match="must be|Missing|Unexpected"):
        lin.load_state_dict(dict(state))  # without metadata, as from a safetensors file
    for key, value in lin.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_state_dict_of_another_width_with_as_many_groups_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in_features=36"):
        made("rbe22_g8").load_state_dict(made("rbe22_g8", n=36).state_dict())


@pytest.mark.parametrize(
    "key, change, text",
    [
        ("gain", lambda g: g * float("nan"), "not finite"),
        ("gain", lambda g: -g, "not positive"),
        ("basis", lambda b: b / 0, "not finite"),
    ],
)
def test_a_state_dict_with_bad_values_is_refused(key: str, change, text: str) -> None:
    lin = nn.Sequential(made("rbe22_g8", n=8))
    state = lin.state_dict()
    state[f"0.{key}"] = change(state[f"0.{key}"].clone())
    with pytest.raises(RuntimeError, match=rf"0: {key}: .*{text}"):
        lin.load_state_dict(state)


def test_strict_loading_reports_missing_and_unexpected_keys() -> None:
    lin = made()
    state = lin.state_dict()
    del state["gain"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="gain.*extra|extra.*gain|Missing") as caught:
        lin.load_state_dict(state)
    assert "gain" in str(caught.value) and "extra" in str(caught.value)
    result = lin.load_state_dict(state, strict=False)
    assert result.missing_keys == ["gain"] and result.unexpected_keys == ["extra"]


def test_a_dense_state_dict_is_encoded_and_says_so_once() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    layers = nn.Sequential(RBELinear(32, 16, layout="rbe8x2_g8"), nn.ReLU(), RBELinear(16, 8, layout="rbe9r_g8"))
    bases = [layers[0].basis.clone(), layers[2].basis.clone()]
    for assign in (False, True):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            layers.load_state_dict(dense.state_dict(), assign=assign)
        assert [w.category for w in seen] == [UserWarning] and "dense weights" in str(seen[0].message)
        for index in (0, 2):
            got, want = layers[index], dense[index]
            assert torch.equal(got.bias, want.bias) and torch.equal(got.basis, bases[index // 2])
            assert (got.weight - want.weight).square().sum() < 0.95 * want.weight.square().sum()
    state = dense.state_dict()
    del state["0.bias"]
    state["0.stray"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="stray") as caught, pytest.warns(UserWarning):
        layers.load_state_dict(state)
    assert "0.bias" in str(caught.value) and "packed" not in str(caught.value)
    with pytest.raises(RuntimeError, match="weight: has shape"), pytest.warns(UserWarning):
        layers.load_state_dict({**dense.state_dict(), "0.weight": torch.zeros(3, 3)})


# ---- training --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_form_changes_nothing_but_what_can_be_trained(layout: str) -> None:
    lin = RBELinear.from_codes(**parts(layout))
    x = torch.randn(4, lin.in_features)
    before, codes = lin(x).detach(), lin.codes
    rbe_torch.prepare_training(lin)
    if lin.layout.has_amplitude:
        assert torch.equal(lin.codes, codes)
    torch.testing.assert_close(lin(x), before, rtol=1e-5, atol=FLOAT32_SUM * float(lin.weight.abs().max()))
    lin(x).square().mean().backward()
    names = {"basis", "log_gain", "bias"} | ({"amplitude"} if lin.layout.has_amplitude else set())
    assert {name for name, p in lin.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0} == names
    rbe_torch.finish_training(lin)
    assert torch.equal(lin.codes, codes) and set(dict(lin.named_parameters())) == {"basis", "gain", "bias"}


@pytest.mark.parametrize("layout", [*TRAINABLE, "rbe8x2_g8"])
def test_a_converted_model_trains_and_finishing_keeps_what_was_evaluated(layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    rbe_torch.convert(model, layout, seed=1)
    x, y = torch.randn(64, 20), torch.randn(64, 3)
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model, lr=1e-3))
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    evaluated = float((model(x) - y).square().mean().detach())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rbe_torch.finish_training(model)
    assert float((model(x) - y).square().mean().detach()) == pytest.approx(evaluated, rel=0.02)  # basis and gain rounded to fp16
    for lin in (model[0], model[2]):
        assert lin.amplitude is None and not lin.training_form and not lin.basis.requires_grad
        assert torch.equal(lin.basis.half().float(), lin.basis) and torch.equal(lin.gain.half().float(), lin.gain)
    assert torch.equal(model[0].packed, state["0.packed"])  # the state_dict taken in training form had the amplitudes in its codes
    with pytest.raises(RuntimeError, match="prepare_training"):
        model.load_state_dict(state)
    rbe_torch.prepare_training(model)
    model.load_state_dict(state)
    assert float((model(x) - y).square().mean().detach()) == pytest.approx(evaluated, rel=1e-5)


def test_a_finished_state_dict_loads_into_training_form() -> None:
    lin, trained = made("rbe32_g8"), made("rbe32_g8", m=11)
    rbe_torch.prepare_training(trained)
    trained.load_state_dict(RBELinear(37, 11, layout="rbe32_g8", seed=9).state_dict())
    lin.load_state_dict(RBELinear(37, 11, layout="rbe32_g8", seed=9).state_dict())
    assert torch.equal(trained.codes, lin.codes)
    torch.testing.assert_close(trained.weight, lin.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fields", ["rbe22", "rbe32"])
def test_amplitudes_and_words_are_each_others_inverse(fields: str) -> None:
    layout = Layout.parse(f"{fields}_g8")
    words = random_codes(str(layout), 64, 64, torch.Generator().manual_seed(0))
    words[0] &= ~255 & 0x3FFFFF  # zero amplitude with either sign
    assert torch.equal(with_amplitude(words, amplitude_of(words), layout), words)


@pytest.mark.parametrize("layout", TRAINABLE)
def test_codes_are_those_that_the_forward_pass_uses(layout: str) -> None:
    """Amplitudes at, just below and just above every rounding border, and beyond 1."""
    lin = made(layout, n=260, m=40)
    rbe_torch.prepare_training(lin)
    with torch.no_grad():
        count = lin.amplitude.numel()
        border = (torch.arange(count) % 257 - 0.5) / 256
        border = torch.nextafter(border, border + torch.tensor([-1.0, 0.0, 1.0]).repeat(count)[:count])
        lin.amplitude.copy_((border * torch.where(torch.arange(count) % 2 == 0, 1.01, -1.0)).view_as(lin.amplitude))
        weight = lin.weight
        plain = torch.ops.rbe.decode(lin.codes, lin.basis, lin.gain, layout=layout, in_features=260, seed=lin._options["seed"])
    assert torch.equal(weight, plain)


def test_param_groups_cover_every_trainable_parameter_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    rbe_torch.convert(model, "rbe22_g8")
    groups = rbe_torch.param_groups(model, lr=2e-3)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters() if p.requires_grad}) and len(listed) == len(set(listed))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["amplitude"] > 10 * rates["rest"] and rates["basis"] > 10 * rates["rest"] == 10 * 2e-3
    with pytest.raises(ValueError, match="lr"):
        rbe_torch.param_groups(model, lr=0)


def test_training_refuses_what_it_cannot_do() -> None:
    lin = made()
    with pytest.raises(ValueError, match="method: is 'hybrid'"):
        rbe_torch.prepare_training(lin, method="hybrid")
    for verb in (rbe_torch.prepare_training, rbe_torch.finish_training):
        with pytest.raises(ValueError, match="no RBELinear"):
            verb(nn.Linear(3, 3))
    rbe_torch.prepare_training(lin)
    lin.log_gain.data[0] = float("nan")
    with pytest.raises(ValueError, match="log_gain"):
        rbe_torch.finish_training(lin)


# ---- tools ------------------------------------------------------------------------------------------------------------------------
def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    lin = made(n=64, m=32)
    with FlopCounterMode(display=False) as counter:
        lin(torch.randn(5, 64))
    assert counter.get_total_flops() > 0


def test_compiles_without_graph_breaks_in_either_form() -> None:
    lin = made("rbe9r_g8", n=64, m=32)
    for _ in range(2):
        compiled = torch.compile(lin, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (3, 7):
            x = torch.randn(tokens, 64, requires_grad=True)
            torch.testing.assert_close(compiled(x), lin(x))
            compiled(x).sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), lin(x))
        rbe_torch.prepare_training(lin)
        torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["rbe9r_g8", "rbe8_g8+sp0.1", "rbe9r_g8+int8", "rbe22_g8+lr2"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_export_trace_and_functional_calls_take_the_layer(layout: str, train: bool) -> None:
    lin = made(layout, n=64, m=32)
    if train:
        rbe_torch.prepare_training(lin)
    x = torch.randn(5, 64)
    tokens = torch.export.Dim("tokens")
    for strict in (False, True):
        program = torch.export.export(lin, (x,), dynamic_shapes=({0: tokens},), strict=strict).module()
        assert torch.equal(program(x[:3]), lin(x[:3]))
    assert torch.equal(torch.jit.trace(lin, x)(x[:3]), lin(x[:3]))
    own = {name: p.detach() for name, p in lin.named_parameters()}
    gradients = torch.func.grad(lambda values: torch.func.functional_call(lin, values, (x,)).square().sum())(own)
    lin.requires_grad_(True)
    lin(x).square().sum().backward()
    for name, p in lin.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_show_config_prints_what_it_holds() -> None:
    config = rbe_torch.show_config()
    text = str(config)
    for name in ("rbe_torch", "torch", "isa", "threads", "cuda", "kernels"):
        assert name in config and f"{name}:" in text
    assert config["torch"] == torch.__version__ and all(config["kernels"].values())


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = ("import sys, warnings; warnings.simplefilter('error'); import torch; had = set(sys.modules); import rbe_torch; "
            "new = set(sys.modules) - had; bad = [m for m in new if m.split('.')[0] in ('transformers', 'safetensors', 'numpy', 'accelerate')]; "
            "assert not bad, bad; assert callable(rbe_torch.compress); import rbe_torch.compress; assert callable(rbe_torch.compress) and rbe_torch.show_config")
    subprocess.run([sys.executable, "-c", code], check=True)
