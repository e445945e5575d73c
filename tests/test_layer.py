"""RBELinear: what it computes and what it accepts."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FLOAT32_SUM, LAYOUTS, made, parts
from torch import nn

from rbe_torch import Layout, RBELinear

VARIANCE = 0.03  # relative, of a sample of 2^17 weights


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
