"""Loading a state_dict into RBELinears: what is refused leaves every layer as it was, and what is taken is what was saved."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_cases import made
from torch import nn

import rbe_torch
from rbe_torch import RBELinear


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


@pytest.mark.parametrize(("key", "change", "text"), [
    ("packed", lambda t: t.float(), "packed: is torch.float32"), ("basis", lambda t: t.int(), "basis: is torch.int32"), ("bias", lambda t: "x", "bias: is a str"),
])  # fmt: skip
def test_entries_of_another_kind_are_refused(key: str, change, text: str) -> None:
    state = made().state_dict()
    state[key] = change(state[key])
    with pytest.raises(RuntimeError, match=text):
        made().load_state_dict(state)


# ---- refused, and nothing changed --------------------------------------------------------------------------------------------------
def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


BAD = {
    "gain, nan": ("gain", lambda t: t * float("nan"), "not finite"),
    "gain, negative": ("gain", lambda t: -t, "not positive"),
    "gain, beyond float32": ("gain", lambda t: t.double() * 1e300, "not finite"),
    "gain, shape": ("gain", lambda t: t[:-1], r"gain: has shape \(10,\)"),
    "gain, a scalar": ("gain", lambda t: t[0], r"gain: has shape \(\)"),
    "gain, complex": ("gain", lambda t: t.to(torch.complex64), "complex64"),
    "basis, inf": ("basis", lambda t: t / 0, "not finite"),
    "packed, of int64": ("packed", lambda t: t.long() + 256, "packed: is torch.int64"),
    "packed, dirty padding": ("packed", lambda t: t | 255, "padding"),
    "bias, shape": ("bias", lambda t: t[:3], "bias: has shape"),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fault", BAD)
def test_a_refused_layer_keeps_every_value(fault: str, strict: bool, assign: bool) -> None:
    key, change, text = BAD[fault]
    lin, state = made("rbe22_g8"), RBELinear(37, 11, layout="rbe22_g8", seed=5).state_dict()
    before = copy.deepcopy(lin.state_dict())
    state[key] = change(state[key])
    with pytest.raises(RuntimeError, match=text):
        lin.load_state_dict(state, strict=strict, assign=assign)
    unchanged(lin, before)


def encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 16))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("fault", ["3.gain", "3.basis", "3.packed"])
@pytest.mark.parametrize("made_by", ["compress", "convert", "prepared", "loaded"])
def test_a_model_of_which_one_layer_is_refused_keeps_every_value(made_by: str, fault: str, strict: bool, assign: bool, tmp_path) -> None:
    def model(seed: int) -> nn.Module:
        found = encoder(seed)
        if made_by == "convert":
            rbe_torch.convert(found, "rbe22_g8", seed=seed)
        else:
            rbe_torch.compress(found, "rbe8x2_g8", progress=False, seed=seed)
        if made_by == "prepared":
            rbe_torch.prepare_training(found)
        if made_by == "loaded":
            rbe_torch.save_pretrained(found, tmp_path / str(seed))
            found = rbe_torch.load_pretrained(tmp_path / str(seed), encoder(9))
        return found

    ours, state = model(0), model(1).state_dict()
    before = copy.deepcopy(ours.state_dict())
    if made_by in ("convert", "prepared") and fault == "3.gain":
        fault = "3.log_gain"
    state[fault] = state[fault].long() if fault == "3.packed" else state[fault] * float("inf")
    with pytest.raises(RuntimeError, match=r"unchanged:\s*3: "):
        ours.load_state_dict(state, strict=strict, assign=assign)
    unchanged(ours, before)
    copied = copy.deepcopy(ours)  # the guard goes with the model
    with pytest.raises(RuntimeError, match="unchanged"):
        copied.load_state_dict(state, strict=strict, assign=assign)
    unchanged(copied, before)


def test_layers_of_one_basis_take_one_basis() -> None:
    """The basis of the layer that is loaded last would silently become that of all."""
    ours, other = encoder(0), encoder(1)
    rbe_torch.compress(ours, "rbe8_g8", progress=False)
    rbe_torch.compress(other, "rbe8_g8", progress=False, basis="layer")
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match="basis: is another one in the state_dict than for a layer that shares it"):
        ours.load_state_dict(other.state_dict())
    unchanged(ours, before)
    by_hand = nn.Sequential(*(layer for layer in ours.modules() if isinstance(layer, RBELinear)))  # a model that nobody guards
    with pytest.raises(RuntimeError, match="basis: is another one"):
        by_hand.load_state_dict({f"{i}.{key}": value for i, layer in enumerate(m for m in other.modules() if isinstance(m, RBELinear))
                                 for key, value in layer.state_dict().items()})
    ours.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), other(x)) and ours[0].basis is not ours[3].basis


def test_assigned_layers_of_one_basis_still_share_it() -> None:
    ours, other = encoder(0), encoder(1)
    for model in (ours, other):
        rbe_torch.compress(model, "rbe8_g8", progress=False)
    ours.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), other(x)) and ours[0].basis is ours[2][0].basis is ours[3].basis


def test_a_half_precision_state_is_assigned_as_the_format_wants_it() -> None:
    lin, other = made("rbe22_g8"), RBELinear(37, 11, layout="rbe22_g8", seed=5)
    rbe_torch.finish_training(other)
    state = {key: value.half() if key in ("gain", "basis") else value for key, value in other.state_dict().items()}
    lin.load_state_dict(state, assign=True)
    assert lin.gain.dtype == lin.basis.dtype == torch.float32
    x = torch.randn(2, 37)
    assert torch.equal(lin(x), other(x))


def test_a_layer_whose_values_are_spoilt_can_be_loaded() -> None:
    lin = made("rbe22_g8")
    rbe_torch.prepare_training(lin)
    good = RBELinear(37, 11, layout="rbe22_g8", seed=5)
    with torch.no_grad():
        lin.log_gain.fill_(float("nan"))
        lin.amplitude.fill_(float("nan"))
    lin.load_state_dict(good.state_dict())
    x = torch.randn(2, 37)
    torch.testing.assert_close(lin(x), good(x))
