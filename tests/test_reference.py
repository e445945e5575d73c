"""The torch reference: the numbers of the C library in float64, and what the double backward needs (functorch, fake tensors, no branches)."""

from __future__ import annotations

import pytest
import torch
from operator_cases import LAYOUTS, make_case
from torch.fx.experimental.proxy_tensor import make_fx

import rbe_torch  # noqa: F401  registers the operators
from rbe_torch import reference

FLOAT64_ERROR = 1e-11  # two orders of float64 sums of some hundred products of size one
RESIDUALS = ["rbe8x2_g8+int8", "rbe22_g8+fp8", "rbe8_g8+lr3", "rbe22_g8+sp0.1"]
AMPLITUDES = ["rbe22_g8", "rbe22x2_g5", "rbe32_g16", "rbe9r_g7", "rbe4r_g7", "rbe2r_g3"]


def product(case, words=None, **changed):
    """reference.linear on the tensors of a case."""
    tensors = {"x": case.x, "words": case.codes if words is None else words, "basis": case.basis, "gain": case.gain, "bias": case.bias,
               "amplitude": case.amplitude} | changed  # fmt: skip
    names = ("residual", "residual_scale", "residual_right", "residual_right_scale")
    return reference.linear(**tensors, **dict(zip(names, case.residual, strict=True)), **case.keywords)


@pytest.mark.parametrize("layout", LAYOUTS + RESIDUALS)
def test_products_and_weights_are_those_of_the_c_library(layout):
    case = make_case(layout, 5, 19, (2, 3), torch.float64, seed=3)
    torch.testing.assert_close(product(case), case.run(), rtol=0, atol=FLOAT64_ERROR)
    packed = reference.pack(case.codes, **case.keywords)
    assert torch.equal(product(case, packed), product(case))
    weight = reference.decode(case.codes, case.basis, case.gain, None, *case.residual, **case.keywords)
    torch.testing.assert_close(weight, case.dense(), rtol=0, atol=FLOAT64_ERROR)


@pytest.mark.parametrize("layout", AMPLITUDES)
@pytest.mark.parametrize("rounded", [True, False])
def test_gradients_are_those_of_the_c_library(layout, rounded):
    case = make_case(layout, 4, 19, (3,), torch.float64, amplitude=True, seed=4, rounded=rounded)
    case.amplitude.view(-1)[:4] = torch.tensor([1.0, -1.0, 1.5, -2.0], dtype=torch.float64)  # at and beyond the end
    case.require_grad()
    wanted = (case.x, case.basis, case.gain, case.bias, case.amplitude)
    dy = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(torch.autograd.grad(product(case), wanted, dy), torch.autograd.grad(case.run(), wanted, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=FLOAT64_ERROR)


@pytest.mark.parametrize(("rows", "groups", "row0", "k0"), [(2, 2, 0, 0), (2, 1, 1, 1), (1, 2, 2, 0)])
def test_a_shard_of_a_seeded_layer_is_the_layers_own(rows, groups, row0, k0):
    layer = make_case("rbe9rx2_g7", 3, 19, (), torch.float64, seed=6)
    codes = layer.codes[row0 : row0 + rows, k0 : k0 + groups].contiguous()
    keywords = layer.keywords | {"row0": row0, "k0": k0}
    packed = reference.pack(codes, **keywords)
    assert torch.equal(torch.ops.rbe.pack(codes, **keywords), packed)
    assert torch.equal(reference.unpack(packed, **keywords), codes)
    part = reference.decode(packed, layer.basis, layer.gain[row0 : row0 + rows], **keywords)
    assert torch.equal(part, layer.dense()[row0 : row0 + rows, 7 * k0 : 7 * (k0 + groups)].clone())
    with pytest.raises(ValueError, match="codes: "):
        reference.pack(codes, **(keywords | {"seed": layer.keywords["seed"] + 1}))


def test_seeded_idx_of_large_layers_wraps_at_32_bits():
    far = reference.seeded_idx(1, 4, 3, 0xFFFFFFFF, row0=2**33, k0=5, groups_total=1000)
    c = [((2**33 * 1000 + 5 + k) * 3 + s) % 2**32 for k in range(4) for s in range(3)]
    for got, number in zip(far.flatten().tolist(), c, strict=True):
        h = (0xFFFFFFFF + 0x9E3779B9 * (number + 1)) % 2**32
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        assert got == (h ^ h >> 16) >> 24


@pytest.mark.parametrize("layout", AMPLITUDES)
def test_first_and_second_derivatives_by_finite_differences(layout):
    case = make_case(layout, 2, 11, (2,), torch.float64, amplitude=True, seed=7, rounded=False)
    cells = torch.randint(0, 250, case.amplitude.shape, generator=torch.Generator().manual_seed(2))
    case.amplitude = torch.where(case.amplitude < 0, -1.0, 1.0).double() * (cells + 0.5) / 256  # away from the kinks at cell borders
    inputs = [t.requires_grad_() for t in (case.x, case.basis, case.gain, case.bias, case.amplitude)]

    def function(x, basis, gain, bias, amplitude):
        return product(case, x=x, basis=basis, gain=gain, bias=bias, amplitude=amplitude)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_a_gradient_that_pushes_past_one_is_zero_and_one_that_returns_is_not():
    codes = torch.full((1, 2, 1), 7 << 18, dtype=torch.int32)  # exp(r) - 1, idx 0
    amplitude = torch.tensor([[[1.25], [-1.0]]], requires_grad=True)
    keywords = {"layout": "rbe22_g1", "in_features": 2}
    weight = reference.decode(codes, torch.ones(1, 256, 1), torch.ones(1), amplitude, **keywords)
    for sign, zero in ((-1.0, 0), (1.0, 1)):  # descent raises both elements, then lowers both
        (gradient,) = torch.autograd.grad(sign * weight.sum(), amplitude, retain_graph=True)
        assert gradient.flatten()[zero] == 0 and gradient.flatten()[1 - zero] * sign > 0


def test_amplitudes_that_are_not_numbers_stay_visible_and_infinite_ones_are_clamped():
    codes = torch.full((1, 3, 1), 7 << 18, dtype=torch.int32)
    keywords = {"layout": "rbe32_g1", "in_features": 3}
    amplitude = torch.tensor([[[float("nan")], [float("inf")], [-float("inf")]]])
    weight = reference.decode(codes, torch.ones(1, 256, 1), torch.ones(1), amplitude, **keywords)[0]
    last = reference.scale(torch.tensor([(1023 << 22) + (7 << 18) + 255 - 2**32], dtype=torch.int32), "rbe32")[0]
    assert weight[0].isnan() and weight[1] == last and weight[2] == -last
    theirs = torch.ops.rbe.decode(codes, torch.ones(1, 256, 1), torch.ones(1), amplitude, **keywords)[0]
    torch.testing.assert_close(weight, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("layout", ["rbe22x2_g5", "rbe8x2_g8", "rbe16s_g8"])
def test_functorch_sees_the_same_gradients(layout):
    case = make_case(layout, 4, 19, (3,), torch.float64, amplitude=layout in AMPLITUDES, seed=8)

    def loss(x, basis, gain):
        return product(case, x=x, basis=basis, gain=gain).square().sum()

    case.require_grad()
    plain = torch.autograd.grad(loss(case.x, case.basis, case.gain), (case.x, case.basis, case.gain))
    for mine, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(case.x, case.basis, case.gain), plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    rows = torch.func.vmap(torch.func.grad(lambda x: loss(x, case.basis, case.gain)))(case.x)
    torch.testing.assert_close(rows, plain[0])
    many = torch.stack([case.basis, 2 * case.basis])
    both = torch.func.vmap(lambda basis: product(case, basis=basis, bias=None))(many)
    torch.testing.assert_close(both[1], 2 * both[0])


@pytest.mark.parametrize("layout", ["rbe22x2_g5", "rbe9r_g7", "rbe16s_g8"])
def test_traces_with_symbolic_shapes_and_gives_the_same_again(layout):
    case, other = (make_case(layout, m, 19, (tokens,), amplitude=layout in AMPLITUDES, seed=9) for m, tokens in ((4, 3), (6, 5)))
    words = [reference.pack(c.codes, **c.keywords) for c in (case, other)]

    def function(x, words, basis, gain):
        return reference.linear(x, words, basis, gain, **case.keywords)

    traced = make_fx(function, tracing_mode="symbolic")(case.x, words[0], case.basis, case.gain)
    assert torch.equal(traced(other.x, words[1], other.basis, other.gain), function(other.x, words[1], other.basis, other.gain))
    meta = function(*(t.to("meta") for t in (case.x, words[0], case.basis, case.gain)))
    assert meta.shape == (3, 4)


def test_activations_keep_their_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        case = make_case("rbe22_g8", 4, 19, (3,), dtype)
        assert product(case).dtype == dtype


def test_refusals_name_the_argument():
    case = make_case("rbe22_g8", 4, 19)
    with pytest.raises(ValueError, match="layout: 'rbe23_g8'"):
        reference.decode(case.codes, case.basis, case.gain, layout="rbe23_g8", in_features=19)
    with pytest.raises(ValueError, match="layout: rbe8x2_g8 has 2 stages"):
        reference.encode(case.dense(), case.basis, case.gain, layout="rbe8x2_g8", in_features=19)
    packed = reference.pack(case.codes, **case.keywords)
    packed[2, -1] |= 128  # 66 bits in 9 bytes
    with pytest.raises(ValueError, match="codes: padding bits"):
        reference.unpack(packed, **case.keywords)
