"""Hyperbolic space. Risks: distances that are none, maps that do not undo each other, two models that disagree, gradients that are not
finite at the origin or the boundary, a limit c -> 0 that is not Euclidean, parameters that an optimiser moves off the manifold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

geoopt = pytest.importorskip("geoopt")
from rbe_torch.hyperbolic import HypActivation, HypAttention, HypLayerNorm, HypLinear, Lorentz, PoincareBall, attend
from rbe_torch.hyperbolic.curvature import BALL_LIMIT
from rbe_torch.hyperbolic.safe import asinhc, atanhc, coshr, function_and_slope, sinhc

SPACES = [Lorentz, PoincareBall]
ROUND64 = 1e-9  # of float64 chains of a few operations, relative
ROUND32 = 1e-4
EUCLIDEAN = 1e-5  # float32 layers of width 8
CURVATURES = st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1.0, 3.0])

spaces = pytest.mark.parametrize("space", SPACES, ids=["lorentz", "poincare"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@st.composite
def tangents(draw, count: int, radius: float = 1.2) -> list[torch.Tensor]:
    """Vectors of R^3 with lengths from 1e-15 to `radius`, origin and equal directions included."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    out = []
    for _ in range(count):
        direction = torch.nn.functional.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
        if out and draw(st.booleans()) and out[0].norm() > 0:
            direction = out[0] / out[0].norm() * draw(st.sampled_from([1.0, -1.0]))
        out.append(direction * draw(st.sampled_from([0.0, 1e-15, 1e-8, 1e-3]) | st.floats(0.01, radius)))
    return out


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float, floor: float = 1e-12) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max() + floor)


# ---- the functions of c|v|^2 ------------------------------------------------------------------------------------------------------
@dtypes
@pytest.mark.parametrize("name", ["sinhc", "asinhc", "tanhc", "atanhc", "coshr"])
def test_the_series_and_the_closed_form_agree_with_mpmath(name, dtype):
    """Values and slopes, those written out and those of autograd."""
    import mpmath

    mpmath.mp.dps = 40
    values = [0.0, 1e-30, 1e-9, 4.9e-3, 5.1e-3, 0.02, 0.0999, 0.1001, 0.5, 0.98] + ([] if name == "atanhc" else [4.0, 30.0])
    s = torch.tensor(values, dtype=dtype, requires_grad=True)
    function = {"coshr": lambda r: mpmath.cosh(r)}.get(name) or (lambda r: getattr(mpmath, name[:-1])(r) / r)
    exact = [function(mpmath.sqrt(mpmath.mpf(float(v)))) if v else mpmath.mpf(1) for v in s.detach()]
    slope = [mpmath.diff(lambda t: function(mpmath.sqrt(t)), mpmath.mpf(max(float(v), 1e-12))) for v in s.detach()]
    exact, slope = (torch.tensor([float(v) for v in numbers], dtype=torch.float64) for numbers in (exact, slope))
    digits = 20 * torch.finfo(dtype).eps
    found = []
    if name != "tanhc":
        y = {"sinhc": sinhc, "asinhc": asinhc, "atanhc": atanhc, "coshr": coshr}[name](s)
        y.sum().backward()
        found.append((y.detach(), s.grad))
    if name != "coshr":
        found.append(function_and_slope(s.detach(), name[:-1]))
    for value, rate in found:
        torch.testing.assert_close(value.double(), exact, rtol=digits, atol=0)
        torch.testing.assert_close(rate.double(), slope, rtol=500 * digits, atol=0)


# ---- a metric space, and maps that undo each other --------------------------------------------------------------------------------
@spaces
@settings(max_examples=60, deadline=None)
@given(vectors=tangents(3), c=CURVATURES)
def test_distance_axioms(space, vectors, c):
    m = space(c)
    x, y, z = (m.expmap0(v) for v in vectors)
    xy, yz, xz = m.dist(x, y), m.dist(y, z), m.dist(x, z)
    assert min(xy, yz, xz) >= 0 and m.dist(x, x) < 1e-12
    assert close(m.dist(y, x), xy, ROUND64)
    assert xz <= (xy + yz) * (1 + ROUND64) + 1e-12
    assert xy > 0 or (vectors[0] - vectors[1]).norm() < 1e-14


@spaces
@settings(max_examples=60, deadline=None)
@given(vectors=tangents(3), c=CURVATURES)
def test_the_exponential_and_the_logarithm_undo_each_other(space, vectors, c):
    m = space(c)
    v, w, _ = vectors
    x, y = m.expmap0(v), m.expmap0(w)
    assert close(m.logmap0(x), v, ROUND64, 1e-25)
    assert close(m.dist0(x), m.scale * v.norm(), ROUND64, 1e-25)
    assert close(m.dist(torch.zeros_like(x), x), m.dist0(x), ROUND64)
    assert close(m.expmap(x, m.logmap(x, y)), y, 1e-6, 1e-10)
    assert close(m.add(-x, m.add(x, y)), y, 1e-7)


@spaces
@settings(max_examples=60, deadline=None)
@given(vectors=tangents(3), c=CURVATURES)
def test_adding_a_point_is_an_isometry_and_the_pairwise_form_is_the_distance(space, vectors, c):
    m = space(c)
    x, y, z = (m.expmap0(v) for v in vectors)
    assert close(m.dist(m.add(x, y), m.add(x, z)), m.dist(y, z), 1e-6, 1e-7)
    both = m.pairwise_sqdist(torch.stack([x, y]), torch.stack([y, z]))
    assert close(both, torch.stack([torch.stack([m.dist(a, b) for b in (y, z)]) for a in (x, y)]).square(), 1e-7, 1e-9)


@settings(max_examples=80, deadline=None)
@given(vectors=tangents(4), c=CURVATURES, seed=st.integers(0, 9))
def test_the_two_models_are_one_space(vectors, c, seed):
    ball, sheet = PoincareBall(c), Lorentz(c)
    p = torch.stack([ball.expmap0(v) for v in vectors])
    x = sheet.from_poincare(p)
    assert close(sheet.to_poincare(x), p, ROUND64, 1e-25)
    assert close(x, sheet.expmap0(2 * torch.stack(vectors)), ROUND64, 1e-25)
    assert close(sheet.dist(x[0], x[1]), ball.dist(p[0], p[1]), 1e-7, 1e-12)
    assert close(sheet.to_poincare(sheet.add(x[0], x[1])), ball.add(p[0], p[1]), 1e-7)
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert close(sheet.to_poincare(sheet.midpoint(x, weights)), ball.midpoint(p, weights), 1e-7)


def test_we_agree_with_geoopt_where_geoopt_is_accurate():
    torch.manual_seed(0)
    c = 0.7
    ball, sheet, theirs, hyperboloid = PoincareBall(c), Lorentz(c), geoopt.PoincareBall(c), geoopt.Lorentz(k=1 / c)
    v, w = torch.randn(2, 20, 4, dtype=torch.float64) * 0.7
    p, q = ball.expmap0(v), ball.expmap0(w)
    assert (
        close(p, theirs.expmap0(v), 1e-6)
        and close(ball.dist(p, q), theirs.dist(p, q), 1e-6)
        and close(ball.add(p, q), theirs.mobius_add(p, q), 1e-6)
    )
    weights = torch.rand(20, dtype=torch.float64)
    assert close(ball.midpoint(p, weights[None])[0], theirs.weighted_midpoint(p, weights), 1e-6)
    x, y = sheet.expmap0(v), sheet.expmap0(w)
    assert close(sheet.dist(x, y), hyperboloid.dist(sheet.to_ambient(x), sheet.to_ambient(y)), 1e-5)
    lifted = hyperboloid.logmap(sheet.to_ambient(x), sheet.to_ambient(y))
    assert close(sheet.logmap(x, y), lifted[..., 1:], 1e-5) and close(
        sheet.inner(x, lifted[..., 1:]), hyperboloid.inner(None, lifted), 1e-5
    )
    moved = hyperboloid.transp(sheet.to_ambient(x), sheet.to_ambient(y), lifted)
    assert close(sheet.transp(x, y, sheet.logmap(x, y)), moved[..., 1:], 1e-5)


# ---- numbers at both ends ---------------------------------------------------------------------------------------------------------
@spaces
@dtypes
@pytest.mark.parametrize("c", [0.0, 1e-12, 1 / 384, 1.0])
@pytest.mark.parametrize("size", [0.0, 1e-15, 1e-7, 1e-2, 1.0, 1e3, 1e15])
def test_values_and_gradients_are_finite_from_the_origin_to_the_boundary(space, dtype, c, size):
    m = space(c, learnable=c > 0)
    generator = torch.Generator().manual_seed(0)
    size = size if c else min(size, 1e8)  # without curvature there is no boundary, and float32 does not hold the squares of squares
    u, v = (torch.nn.functional.normalize(torch.randn(6, 5, generator=generator, dtype=dtype), dim=-1) * size for _ in range(2))
    v[0], v[1], v[2] = u[0], -u[1], 0
    u.requires_grad_(), v.requires_grad_()
    x, y = m.expmap0(u), m.expmap0(v)
    weights = torch.rand(6, 6, generator=generator, dtype=dtype)
    results = [
        x,
        m.logmap0(x),
        m.dist(x, y),
        m.dist0(x),
        m.add(x, y),
        m.pairwise_sqdist(x, y),
        m.midpoint(x, weights),
        m.dist(u, v),
        m.projx(u),
        m.logmap0(u),
    ]
    results.append(attend(m, u, v, v))
    for number, result in enumerate(results):
        assert torch.isfinite(result).all(), number
        ends = (u, v, m.log_c) if m.learnable else (u, v)
        for gradient in torch.autograd.grad(result.sum(), ends, retain_graph=True, allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all(), number


@spaces
def test_a_point_on_the_boundary_has_a_finite_distance_and_gradient(space):
    m = space(1.0)
    x = torch.tensor([[1.0, 0.0], [1 - 1e-7, 0.0], [0.0, 1e15]], requires_grad=True)
    for value in (m.dist(x, x.flip(0)), m.dist0(x), m.logmap0(x)):
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), x, retain_graph=True)[0]).all()


@spaces
def test_float32_keeps_the_distance_of_close_points_far_out(space):
    """Where the textbook formulas leave no digit: 1e-3 apart at a distance of 6 from the origin."""
    m, angle = space(1.0), 1e-3 / math.sinh(6)
    far = [torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) * 6 / m.scale for a in (0.0, angle)]
    exact = m.dist(m.expmap0(far[0]), m.expmap0(far[1]))
    radial = m.dist(m.expmap0(far[0].float()), m.expmap0((far[0] * (1 - 1e-3)).float()))
    assert abs(float(exact) - 1e-3) < 1e-5
    assert abs(float(radial) - 6e-3) < 3e-4
    tilted = m.dist(m.expmap0(far[0].float()), m.expmap0(far[1].float()))
    assert abs(float(tilted) - 1e-3) < 2e-5


@spaces
def test_both_models_stop_at_the_same_distance_in_float32(space):
    m = space(0.25)
    longest = float(m.dist0(m.expmap0(torch.tensor([1e4, 0.0]))))
    assert longest == pytest.approx(2 * math.atanh(BALL_LIMIT[torch.float32]) / 0.5, rel=1e-3)


@spaces
@pytest.mark.parametrize("c", [0.0, 1e-12, 0.3, 1.0])
def test_gradients_are_those_of_finite_differences(space, c):
    m = space(c)
    torch.manual_seed(1)
    u, v = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    for function, arguments in [
        (m.expmap0, (u,)), (lambda a: m.logmap0(m.expmap0(a)), (u,)), (lambda a, b: m.dist(m.expmap0(a), m.expmap0(b)), (u, v)),
        (lambda a: m.dist0(m.expmap0(a)), (u,)), (lambda a, b: m.add(m.expmap0(a), m.expmap0(b)), (u, v)),
        (lambda a, b: m.pairwise_sqdist(m.expmap0(a), m.expmap0(b)), (u, v)), (lambda a, w: m.midpoint(m.expmap0(a), w), (u, weights)),
        (lambda a, b: attend(m, a, b, b), (u, v)),
    ]:  # fmt: skip
        assert torch.autograd.gradcheck(function, arguments)


@spaces
def test_the_gradient_of_the_curvature_is_that_of_finite_differences(space):
    torch.manual_seed(1)
    u, v = (torch.randn(3, 4, dtype=torch.float64) * 0.5 for _ in range(2))

    def at(log_c: torch.Tensor) -> torch.Tensor:
        m = space(1.0, learnable=True)
        m._parameters["log_c"] = None
        m.__dict__["_fixed"] = log_c.exp()
        return torch.stack([m.dist(m.expmap0(u), m.expmap0(v)).sum(), attend(m, u, v, v).sum(), m.add(m.expmap0(u), m.expmap0(v)).sum()])

    for value in (math.log(1e-10), 0.0):
        assert torch.autograd.gradcheck(at, (torch.tensor(value, dtype=torch.float64, requires_grad=True),))


# ---- c -> 0 is Euclidean ----------------------------------------------------------------------------------------------------------
@spaces
@pytest.mark.parametrize("c", [0.0, 1e-12])
def test_without_curvature_the_layers_are_the_euclidean_ones(space, c):
    torch.manual_seed(2)
    m = space(c)
    x, mask = torch.randn(2, 5, 8) * 3, torch.tensor([[True] * 5, [True, True, True, False, False]])
    linear, norm = HypLinear(8, 6, m), HypLayerNorm(8, m)
    attention = HypAttention(8, 2, m).eval()
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    expected = attention.output(expected.transpose(1, 2).flatten(2))
    for ours, theirs in [
        (linear(x), linear.linear(x)),
        (norm(x), torch.nn.functional.layer_norm(x, (8,), eps=1e-12)),
        (HypActivation(torch.nn.functional.gelu, m)(x), torch.nn.functional.gelu(x)),
        (attention(x, mask), expected),
        (m.dist(x[0], x[1]) / m.scale, (x[0] - x[1]).norm(dim=-1)),
        (m.add(x[0], x[1]), x[0] + x[1]),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=EUCLIDEAN, atol=EUCLIDEAN)


@spaces
def test_the_curvature_decides_something(space):
    """The tests of the limit would pass with layers that ignore c."""
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 5, 8) * 2
    flat, curved = attend(space(0.0), q, k, v), attend(space(1.0), q, k, v)
    assert (flat - curved).abs().max() > 0.1


def test_a_linear_layer_in_codes_is_trained_in_hyperbolic_space():
    import rbe_torch

    layer = HypLinear(16, 8, Lorentz(1.0), layout="rbe22_g8")
    rbe_torch.prepare_training(layer)
    layer(layer.manifold.expmap0(torch.randn(4, 16))).square().sum().backward()
    assert layer.linear.amplitude.grad.abs().max() > 0 and layer.linear.basis.grad.abs().max() > 0


@spaces
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(space, dtype):
    m = space(1.0)
    u = torch.randn(5, 4).to(dtype)
    x = m.expmap0(u)
    assert x.dtype == dtype and m.dist(x, x.flip(0)).dtype == dtype
    assert torch.equal(x, m.expmap0(u.float()).to(dtype))
    assert attend(m, u, u, u).dtype == dtype


# ---- geoopt's optimisers ----------------------------------------------------------------------------------------------------------
@spaces
@pytest.mark.parametrize("c", [0.0, 1.0])
def test_riemannian_adam_moves_points_to_their_targets(space, c):
    torch.manual_seed(3)
    m = space(c)
    start, target = (m.expmap0(torch.randn(4, 3, dtype=torch.float64) * 0.5) for _ in range(2))
    x = geoopt.ManifoldParameter(start.clone(), manifold=m)
    optimiser = geoopt.optim.RiemannianAdam([x], lr=2e-2, stabilize=10)
    for _ in range(400):
        optimiser.zero_grad()
        m.dist(x, target).square().sum().backward()
        optimiser.step()
    assert m.dist(start, target).max() > 0.5 and m.dist(x, target).max() < 0.02
    assert m.check_point_on_manifold(x.detach())


@spaces
def test_a_learned_curvature_follows_its_gradient_and_stays_positive(space):
    m = space(1.0, learnable=True)
    optimiser = torch.optim.Adam(m.parameters(), lr=0.1)
    u, v = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for _ in range(100):
        optimiser.zero_grad()
        (m.dist(m.expmap0(u), m.expmap0(v)) / m.scale - 1.45).square().backward()
        optimiser.step()
    assert 0 < float(m.c.detach()) < 0.7  # at c = 0 the distance is 1.414, at c = 1 it is 1.51 (Lorentz) or 1.66
    assert set(m.state_dict()) == {"log_c"}


@spaces
@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((-1.0,), "c: is -1.0, must be 0"),
        ((math.inf,), "c: is inf"),
        ((math.nan,), "c: is nan"),
        (("1",), "c: is '1', must be a number"),
        ((True,), "must be a number"),
        ((0.0, True), "must be positive where it is learned"),
    ],
)
def test_a_wrong_curvature_is_refused(space, arguments, reason):
    with pytest.raises((ValueError, TypeError), match=reason):
        space(*arguments)
