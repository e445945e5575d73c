"""RBELinear: what copying, casting and saving keep."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_cases import LAYOUTS, made
from torch import nn

import rbe_torch
from rbe_torch import RBELinear


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


# ---- drawing anew ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe8_g8+int8", "rbe8_g8+fp8", "rbe8_g8+lr2", "rbe8_g8+sp0.2", "rbe9r_g7", "rbe4r_g3"])
@pytest.mark.parametrize("train", [False, True])
def test_a_layer_made_on_meta_is_whole_after_reset_parameters(layout: str, train: bool) -> None:
    lin = RBELinear(64, 64, layout=layout, device="meta", seed=3)
    if train:
        rbe_torch.prepare_training(lin)
    lin.to_empty(device="cpu")
    for tensor in (*lin.parameters(), *lin.buffers()):
        tensor.data.view(-1).view(torch.uint8).fill_(0x7F) if tensor.dtype != torch.int64 else tensor.data.fill_(9)
    lin.reset_parameters()
    assert lin.problem() == "" and torch.isfinite(lin(torch.randn(2, 64))).all()
    assert 0.8 < float(lin.weight.detach().square().mean() * 3 * 64) < 1.25


def test_a_used_residual_does_not_stay_in_weights_that_are_drawn_anew() -> None:
    dense = nn.Linear(64, 64)
    dense.weight.data.mul_(100)
    lin = RBELinear.from_linear(dense, "rbe8_g8+int8")
    lin.reset_parameters()
    assert float(lin.weight.std()) < 0.1


def test_a_parametrised_bias_is_used() -> None:
    class Double(nn.Module):
        def forward(self, bias: torch.Tensor) -> torch.Tensor:
            return 2 * bias

    lin, x = made(), torch.randn(2, 37)
    before, bias = lin(x), lin.bias.detach().clone()
    torch.nn.utils.parametrize.register_parametrization(lin, "bias", Double())
    torch.testing.assert_close(lin(x), before + bias)
