"""Interleaved codes of rbe8: the same weight to every operator, and a layer that holds them saves, loads, copies and compiles as if it held packed ones."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys

import pytest
import torch

from rbe_torch import RBELinear, _ops
from rbe_torch.codes import for_kernels, is_interleaved

ERROR_OF_24_BITS = 1e-5  # over the largest output, as for any exact product
M, N = 130, 100  # two tiles of 64 rows and two rows more; the last group is cut short


@pytest.fixture
def weight(device: str) -> dict:
    generator = torch.Generator().manual_seed(3)
    with torch.device("cpu"):
        packed = torch.randint(0, 256, (M, 26), generator=generator, dtype=torch.uint8).to(device)
        basis, gain = torch.randn(2, 256, 8, generator=generator).to(device), (torch.rand(M, generator=generator) + 0.5).to(device)
    return {"packed": packed, "codes": torch.ops.rbe.interleave(packed), "basis": basis, "gain": gain,
            "keywords": {"layout": "rbe8x2_g8", "in_features": N}}


def test_rows_stand_side_by_side_and_come_back(weight: dict) -> None:
    codes = weight["codes"]
    assert codes.shape == (3, 26, 64) and codes.dtype == torch.uint8
    for row in (0, 63, 64, 129):
        assert torch.equal(codes[row // 64, :, row % 64], weight["packed"][row])
    assert not codes[2, :, 2:].any()
    assert torch.equal(torch.ops.rbe.deinterleave(codes, M), weight["packed"])


def test_every_operator_reads_them_as_the_same_weight(weight: dict) -> None:
    basis, gain, keywords = weight["basis"], weight["gain"], weight["keywords"]
    dense = torch.ops.rbe.decode(weight["packed"], basis, gain, **keywords)
    assert torch.equal(torch.ops.rbe.decode(weight["codes"], basis, gain, **keywords), dense)
    x = torch.randn(5, N, dtype=torch.float64, requires_grad=True)
    sides = []
    for codes in (weight["packed"], weight["codes"]):
        y = torch.ops.rbe.linear(x, codes, basis.double(), gain.double(), **keywords)
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        sides.append((y, first, *torch.autograd.grad(first.square().sum(), x)))
    for one, other in zip(*sides, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    gradients = []
    for codes in (weight["packed"], weight["codes"]):
        leaves = basis.clone().requires_grad_(), gain.clone().requires_grad_()
        gradients.append(torch.autograd.grad(torch.ops.rbe.decode(codes, *leaves, **keywords).sin().sum(), leaves))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    for tokens in (1, 4, 40):
        x = torch.randn(tokens, N)
        want = x.double() @ dense.double().T
        got = torch.ops.rbe.linear(x, weight["codes"], basis, gain, **keywords)
        assert (got - want).abs().max() < ERROR_OF_24_BITS * want.abs().max()


@pytest.mark.parametrize("spoil, message", [
    (lambda w: w.update(codes=w["codes"][:2]), r"codes: has shape \[2, 26, 64\]; interleaved codes must be \[ceil\(m/64\) = 3"),
    (lambda w: w.update(codes=w["codes"][:, :25]), "interleaved codes must be"),
    (lambda w: w.update(codes=w["codes"][..., :32]), "interleaved codes must be"),
    (lambda w: w["keywords"].update(layout="rbe16s_g8"), "only codes of rbe8 can be interleaved"),
    (lambda w: w["keywords"].update(in_features=300), "in_features: was 300"),
])
def test_what_cannot_be_is_refused_by_name(weight: dict, spoil, message: str) -> None:
    spoil(weight)
    basis = weight["basis"] if weight["keywords"]["layout"] == "rbe8x2_g8" else weight["basis"][:1]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rbe.linear(torch.randn(2, N), weight["codes"], basis, weight["gain"], **weight["keywords"])


@pytest.mark.parametrize("call, message", [
    (lambda c: torch.ops.rbe.interleave(c), "packed: is uint8"),
    (lambda c: torch.ops.rbe.interleave(torch.zeros(3, 4)), "packed: is float32"),
    (lambda c: torch.ops.rbe.deinterleave(c, 128), "rows: was 128; .* have 129 .. 192"),
    (lambda c: torch.ops.rbe.deinterleave(c, 193), "rows: was 193"),
    (lambda c: torch.ops.rbe.deinterleave(c[0], 60), "codes: is uint8"),
    (lambda c: torch.ops.rbe.unpack(c, layout="rbe8x2_g8", in_features=N), "packed: has shape"),
])
def test_the_conversions_refuse_by_name(weight: dict, call, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(weight["codes"])


def test_opcheck_and_compile(weight: dict) -> None:
    torch.library.opcheck(torch.ops.rbe.interleave.default, (weight["packed"],))
    torch.library.opcheck(torch.ops.rbe.deinterleave.default, (weight["codes"], M))
    arguments = (torch.randn(3, N, requires_grad=True), weight["codes"], weight["basis"], weight["gain"])
    torch.library.opcheck(torch.ops.rbe.linear.default, arguments, weight["keywords"])


# ---- layers ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def layer() -> RBELinear:
    return RBELinear(N, 128, layout="rbe8x2_g8", seed=1)


def test_a_layer_holds_what_its_kernels_read_and_shows_packed_codes(layer: RBELinear) -> None:
    assert is_interleaved(layer._buffers["packed"]) == _ops.reads_interleaved()
    assert layer.packed.shape == (128, 26) and layer.state_dict()["packed"].shape == (128, 26)
    assert layer.codes.shape == (128, 13, 2) and layer.weight.shape == (128, N)
    assert sum(b.numel() for b in layer.buffers()) <= 1.1 * layer.packed.numel()
    few = RBELinear(N, 70, layout="rbe8x2_g8")  # 128 rows would be laid out: more than a tenth for nothing
    assert not is_interleaved(few._buffers["packed"])
    assert not is_interleaved(for_kernels(torch.zeros(128, 26, dtype=torch.uint8, device="meta"), 128, few.layout))


def test_state_copies_and_pickles_are_the_same_layer(layer: RBELinear) -> None:
    x = torch.randn(3, N)
    want = layer(x)
    other = RBELinear(N, 128, layout="rbe8x2_g8", seed=2)
    other.load_state_dict(layer.state_dict())
    assigned = RBELinear(N, 128, layout="rbe8x2_g8", device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    loaded = RBELinear(N, 128, layout="rbe8x2_g8", seed=3)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    emptied = RBELinear(N, 128, layout="rbe8x2_g8", device="meta").to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    for same in (other, assigned, loaded, emptied, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        assert torch.equal(same(x), want) and torch.equal(same.packed, layer.packed)
        assert is_interleaved(same._buffers["packed"]) == _ops.reads_interleaved()


def test_a_pickled_layer_runs_where_the_kernels_read_packed_codes(layer: RBELinear, tmp_path) -> None:
    x = torch.randn(3, N)
    torch.save((layer, x, layer(x)), tmp_path / "layer.pt")
    done = subprocess.run(
        [sys.executable, "-c", "import sys, torch, rbe_torch\nlayer, x, want = torch.load(sys.argv[1], weights_only=False)\n"
         "torch.testing.assert_close(layer(x), want, atol=1e-4, rtol=1e-4)\nassert layer.to(torch.float32)._buffers['packed'].dim() == 2",
         str(tmp_path / "layer.pt")],
        env={**os.environ, "RBE_ISA": "scalar", "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_layer_exports_and_compiles(layer: RBELinear) -> None:
    x = torch.randn(3, N)
    want = layer(x)
    exported = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), want, atol=0, rtol=0)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), want, atol=0, rtol=0)
    grown = torch.func.functional_call(layer, {"packed": layer.packed}, (x,))  # packed codes by name
    torch.testing.assert_close(grown, want, atol=1e-4, rtol=1e-4)


def test_the_accuracy_of_a_layer_can_be_chosen(layer: RBELinear) -> None:
    x = torch.randn(40, N)  # few tokens of so small a layer are exact in both classes
    want = x.double() @ layer.weight.double().T + layer.bias
    errors = {}
    for accuracy in ("exact", "fast", "auto"):
        layer.accuracy = accuracy
        errors[accuracy] = float(((layer(x) - want).abs().max() / want.abs().max()).detach())
    assert errors["auto"] == errors["exact"] < ERROR_OF_24_BITS
    if _ops.reads_interleaved():
        assert errors["fast"] > errors["exact"]
    with pytest.raises(ValueError, match="accuracy: is 'sloppy', must be"):
        layer.accuracy = "sloppy"
