"""Gradients of the operators: finite differences in float64, the float32 kernels against float64, and torch.func transforms."""

from __future__ import annotations

import pytest
import torch
from operator_cases import LAYOUTS, make_case
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import rbe_torch  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("device")

# Largest error over the largest entry of a gradient, against the float64 reference on the same numbers.
WITH_HALF_ACTIVATIONS = 3e-5  # float32 gradients where x is of a half type: products of two bfloat16 pieces, 2^-16
# Root mean square error of a gradient of the fast class over its own: docs/operators.md.
FAST_GRADIENT_ERROR = {"x": 2e-3, "basis": 3e-3, "gain": 4e-3, "bias": 1e-6, "amplitude": 4e-3}
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALED = ["rbe22_g8", "rbe22x2_g5", "rbe32_g16", "rbe9r_g7", "rbe4r_g7", "rbe2r_g3"]


def leaves(case):
    return [t for t in (case.x, case.basis, case.gain, case.bias, case.amplitude) if t is not None]


def function(case):
    """The product as a function of its differentiable tensors."""

    def product(*values):
        return case.run(**dict(zip(("x", "basis", "gain", "bias", "amplitude"), values, strict=False)))

    return product


@pytest.mark.parametrize("layout", LAYOUTS + ["rbe8x2_g8+int8", "rbe22_g8+lr2", "rbe22_g8+sp0.1"])
def test_gradcheck_and_gradgradcheck(layout):
    amplitude = layout.startswith(("rbe22", "rbe32", "rbe9r", "rbe4r", "rbe2r"))
    case = make_case(layout, 3, 11, (2,), torch.float64, amplitude=amplitude, rounded=not amplitude).require_grad()
    # A derivative across a border of the 256 cells is one-sided: keep amplitudes off the borders.
    if amplitude:
        cells = (case.amplitude.detach().abs() * 256).floor() + 0.5
        case.amplitude = (torch.sign(case.amplitude.detach()) * cells / 256).requires_grad_()
    inputs = leaves(case)
    assert gradcheck(function(case), inputs, fast_mode=True)
    assert gradgradcheck(function(case), inputs, fast_mode=True)


def test_gradcheck_of_every_entry_once():
    case = make_case("rbe22_g4", 2, 6, (2,), torch.float64, amplitude=True, rounded=False).require_grad()
    case.basis = case.basis.detach()  # 1024 entries, of which 4 matter: the fast mode above covers them
    inputs = [case.x, case.gain, case.bias, case.amplitude]
    product = lambda x, gain, bias, amplitude: case.run(x=x, gain=gain, bias=bias, amplitude=amplitude)  # noqa: E731
    assert gradcheck(product, inputs)


@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS + ["rbe22_g64", "rbe8x2_g8+fp8"])
def test_kernels_give_the_gradients_of_the_reference(layout, dtype):
    amplitude = layout.startswith(("rbe22", "rbe32", "rbe9r", "rbe4r", "rbe2r"))
    for m, n, tokens in [(1, 1, (1,)), (37, 301, (5,)), (300, 129, (2, 35)), (5, 70, (130,))]:
        case = make_case(layout, m, n, tokens, dtype, amplitude=amplitude).require_grad()
        dy = torch.randn(*tokens, m, generator=torch.Generator().manual_seed(3), device="cpu").to(case.x)
        got = torch.autograd.grad(case.run(accuracy="exact"), leaves(case), dy)
        wide = make_case(layout, m, n, tokens, torch.float64, amplitude=amplitude)
        for name in ("x", "basis", "gain", "bias", "amplitude"):
            value = getattr(case, name)
            setattr(wide, name, None if value is None else value.detach().double())
        wide.require_grad()
        want = torch.autograd.grad(wide.run(), leaves(wide), dy.double())
        for name, a, b, leaf in zip(("x", "basis", "gain", "bias", "amplitude"), got, want, leaves(case), strict=False):
            assert a.dtype == leaf.dtype and a.shape == leaf.shape
            error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)
            tolerance = GRADIENT_TOLERANCE[dtype] if a.dtype == dtype else WITH_HALF_ACTIVATIONS
            assert error < tolerance, (name, m, n, tokens, error.item())


@pytest.mark.parametrize("layout", ["rbe22_g64", "rbe9r_g32", "rbe22x2_g16"])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e4])
def test_fast_gradients_err_by_what_is_documented(layout, size):
    case = make_case(layout, 300, 259, (140,), amplitude=True).require_grad()
    dy = size * torch.randn(140, 300, generator=torch.Generator().manual_seed(3), device="cpu").to(case.x)
    wide = make_case(layout, 300, 259, (140,), torch.float64, amplitude=True)
    for name in ("x", "basis", "gain", "bias", "amplitude"):
        setattr(wide, name, getattr(case, name).detach().double())
    wide.require_grad()
    want = torch.autograd.grad(wide.run(), leaves(wide), dy.double())
    fast = torch.autograd.grad(case.run(accuracy="fast"), leaves(case), dy)
    for name, a, b in zip(("x", "basis", "gain", "bias", "amplitude"), fast, want, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < FAST_GRADIENT_ERROR[name], (name, error)


def test_the_class_of_the_forward_is_that_of_the_backward():
    case = make_case("rbe22_g32", 130, 96, (70,), amplitude=True).require_grad()
    dy = torch.randn(70, 130, generator=torch.Generator().manual_seed(3), device="cpu").to(case.x)
    for accuracy in ("auto", "exact", "fast"):
        got = torch.autograd.grad(case.run(accuracy=accuracy), leaves(case), dy)
        want = torch.ops.rbe.linear_backward(dy, *case.tensors, **case.keywords, accuracy="exact" if accuracy == "auto" else accuracy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), accuracy


@pytest.mark.parametrize("layout", SCALED)
def test_a_gradient_that_pushes_the_amplitude_beyond_one_is_zero(layout):
    case = make_case(layout, 6, 33, (4,), amplitude=True)
    inside = case.amplitude.clone()
    inside.view(-1)[::2] = torch.where(inside.view(-1)[::2] < 0, -0.999999, 0.999999)
    outside = torch.where(inside.abs() > 0.99, inside.sign() * 1.25, inside)
    gradients, dy = [], torch.randn(4, 6, generator=torch.Generator().manual_seed(3), device="cpu").to(case.x)
    for a in (inside, outside):
        a.requires_grad_()
        gradients.append(torch.autograd.grad(case.run(amplitude=a), a, dy)[0])
    beyond = outside.detach().abs() >= 1
    pushed = beyond & (outside.detach() * gradients[0] < 0)  # descent would raise |a|
    assert pushed.any() and (beyond & ~pushed).any()
    assert torch.equal(gradients[1], torch.where(pushed, torch.zeros(()), gradients[0]))


def test_only_wanted_gradients_are_computed_and_frozen_ones_stay_none():
    case = make_case("rbe22_g8", amplitude=True)
    case.gain.requires_grad_()
    case.run().sum().backward()
    assert case.gain.grad is not None and case.basis.grad is None and case.x.grad is None
    y = case.run()
    for wanted in range(32):
        got = torch.ops.rbe.linear_backward(torch.ones_like(y), *case.tensors, **case.keywords, wanted=wanted)
        for bit, g in enumerate(got):
            assert (g.numel() > 0) == bool(wanted >> bit & 1)


def test_backward_operator_refuses_what_does_not_fit():
    case = make_case()
    run = torch.ops.rbe.linear_backward
    for dy, words in [(torch.ones(3, 4), "dy: has shape"), (torch.ones(2, 5), "dy: has shape"), (torch.ones(3, 5).half(), "dy: is float16")]:
        with pytest.raises(RuntimeError, match=words):
            run(dy, *case.tensors, **case.keywords)
    with pytest.raises(RuntimeError, match="wanted: was 32"):
        run(torch.ones(3, 5), *case.tensors, **case.keywords, wanted=32)
    with pytest.raises(RuntimeError, match="accuracy: was 'half'; must be 'auto', 'exact' or 'fast'"):
        run(torch.ones(3, 5), *case.tensors, **case.keywords, accuracy="half")


def test_half_precision_parameters_get_gradients_of_their_own_dtype():
    case = make_case("rbe22_g8", 13, 40, (6,))
    for name in ("basis", "gain", "bias"):
        setattr(case, name, getattr(case, name).bfloat16())
    case.require_grad().run().sum().backward()
    assert all(getattr(case, name).grad.dtype == torch.bfloat16 for name in ("basis", "gain", "bias"))


def test_decode_is_differentiable():
    case = make_case("rbe22_g4", 3, 10, (), torch.float64, amplitude=True, rounded=False)
    inputs = [t.requires_grad_() for t in (case.basis, case.gain, case.amplitude)]
    assert gradcheck(lambda b, g, a: torch.ops.rbe.decode(case.codes, b, g, a, **case.keywords), inputs, fast_mode=True)


def test_func_transforms_compose():
    case = make_case("rbe22_g8", 5, 19, (3,), torch.float64, amplitude=True)

    def loss(x, basis, amplitude):
        return case.run(x=x, basis=basis, amplitude=amplitude).square().sum()

    values = (case.x, case.basis, case.amplitude)
    want = torch.autograd.grad(loss(*(v.requires_grad_() for v in values)), values)
    values = tuple(v.detach() for v in values)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*values), want, strict=True):
        torch.testing.assert_close(a, b)
    jacobian = torch.func.jacrev(lambda x: case.run(x=x))(values[0])
    torch.testing.assert_close(jacobian[1, :, 1], case.dense())
    _, vjp = torch.func.vjp(lambda x: case.run(x=x), values[0])
    torch.testing.assert_close(vjp(torch.ones(3, 5, dtype=torch.float64))[0], torch.ones(3, 5, dtype=torch.float64) @ case.dense())
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(0, None, None))(case.x.detach(), *values[1:])
    torch.testing.assert_close(per_sample.sum(0), want[1])


def test_vmap_over_any_argument():
    case = make_case("rbe8x2_g8", 5, 19, (3,))
    x = torch.randn(4, 3, 19)
    got = torch.func.vmap(lambda v: case.run(x=v), in_dims=1, out_dims=2)(x.transpose(0, 1))
    assert torch.equal(got.movedim(2, 0), case.run(x=x))
    gains = torch.rand(4, 5)
    got = torch.func.vmap(lambda v, g: case.run(x=v, gain=g))(x, gains)
    assert torch.equal(got, torch.stack([case.run(x=x[i], gain=gains[i]) for i in range(4)]))


def test_forward_mode_says_that_it_is_not_supported():
    case = make_case()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: case.run(x=x), (case.x,), (case.x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        case.run(x=forward_ad.make_dual(case.x, case.x))


def test_inference_operator_matches_and_does_not_hide_that_it_has_no_gradient():
    case = make_case()
    y = torch.ops.rbe.linear_inference(*case.tensors, **case.keywords)
    assert torch.equal(y, case.run())
    case.x.requires_grad_()
    y = torch.ops.rbe.linear_inference(*case.tensors, **case.keywords)
    with pytest.warns(UserWarning, match="rbe::linear_inference"):
        y.sum().backward()
