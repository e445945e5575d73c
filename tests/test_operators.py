"""rbe::linear and its neighbours against float64: values, layouts, dtypes, strides, shards, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from operator_cases import LAYOUTS, make_case, products_check_values, random_codes, split

from rbe_torch import Layout

pytestmark = pytest.mark.usefixtures("device")

# Largest error over the largest output, sums of n ~ 300 products: float32 rounding, and half types' storage of x and y.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The fast class reads 8-bit lookup tables (docs/operators.md).
FAST_TOLERANCE = 3e-2
RESIDUALS = ["rbe8x2_g8+int8", "rbe8x2_g8+fp8", "rbe22_g16+lr3", "rbe16s_g8+sp0.05"]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def expected(case) -> torch.Tensor:
    y = case.x.double() @ case.dense().T
    return y if case.bias is None else y + case.bias.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS + RESIDUALS)
def test_product_equals_dense_product_of_the_decoded_weight(layout, dtype):
    for m, n, tokens in [(1, 1, (1,)), (37, 301, (5,)), (300, 129, (2, 35)), (64, 64, ()), (7, 40, (130,))]:
        case = make_case(layout, m, n, tokens, dtype)
        got = case.run(accuracy="exact")
        assert got.shape == (*tokens, m) and got.dtype == dtype
        assert relative_error(got, expected(case)) < TOLERANCE[dtype], (m, n, tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fast_class_stays_inside_its_stated_error(layout):
    for tokens in [(1,), (4,), (16,), (64,)]:
        case = make_case(layout, 130, 515, tokens)
        want = case.x.double() @ case.dense().T
        got = case.run(accuracy="fast", bias=None)
        assert ((got.double() - want).norm() / want.norm()).item() < FAST_TOLERANCE


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe32_g16", "rbe9r_g7", "rbe22x2_g5"])
def test_amplitude_replaces_sign_and_size_of_every_code(layout):
    case = make_case(layout, 11, 50, (4,), amplitude=True)
    name, stages, _ = split(layout)
    a = case.amplitude.double()
    steps = 2**18 if name == "rbe32" else 256
    u = (a.abs().clamp(max=1 - 2**-18) * steps + 0.5).floor().clamp(max=steps - 1).to(torch.int64)
    amp, fine = (u >> 10, u & 1023) if name == "rbe32" else (u, 0 * u)
    kept = 0x3FFFFF & ~0x2FF
    words = (case.codes.to(torch.int64) & kept) | amp | (a < 0).to(torch.int64) << 9 | fine << 22
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(case.run(), case.run(codes=words, amplitude=None))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_codes_give_what_words_give(layout):
    """The same bits, or where codes of one byte have paths of their own the same numbers in another order of summation."""
    case = make_case(layout, 9, 61, (3,), seed=5)
    keywords = {k: v for k, v in case.keywords.items()}
    packed = torch.ops.rbe.pack(case.codes, **keywords)
    assert torch.equal(torch.ops.rbe.unpack(packed, **keywords), case.codes)
    got = case.run(codes=packed)
    if split(layout)[0] in ("rbe8", "rbe16s"):
        assert relative_error(got, case.run()) < TOLERANCE[torch.float32]
    else:
        assert torch.equal(got, case.run())
    wide = torch.full((9, packed.shape[1] + 3), 255, dtype=torch.uint8)
    wide[:, 2:-1] = packed
    assert torch.equal(case.run(codes=wide[:, 2:-1]), got)


def test_strides_and_offsets_are_honoured():
    case = make_case("rbe22_g8", 13, 40, (6,))
    want = case.run()
    storage = torch.zeros(100, 100)
    for view in (storage[3:9, 7:47], storage[1:13:2, 5:85:2], storage.T[2:8, 1:41]):
        view.copy_(case.x)
        assert torch.equal(case.run(x=view), want)
    nested = torch.zeros(3, 5, 2, 40)[:, 1:3].transpose(0, 1)  # rows are not evenly spaced
    nested.copy_(torch.randn(2, 3, 2, 40))
    assert torch.equal(case.run(x=nested), case.run(x=nested.contiguous()))
    one = case.x[:1].expand(6, 40)
    assert torch.equal(case.run(x=one), want[:1].expand(6, 13))
    flipped_basis = case.basis.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(case.run(basis=flipped_basis), want)
    codes = torch.stack([case.codes, case.codes], -1)[..., 0]
    assert torch.equal(case.run(codes=codes), want)


def test_half_precision_basis_gain_and_bias_are_read_as_what_they_hold():
    case = make_case("rbe22_g8", 13, 40, (6,))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        narrow = [t.to(dtype) for t in (case.basis, case.gain, case.bias)]
        wide = [t.float() for t in narrow]
        got = case.run(basis=narrow[0], gain=narrow[1], bias=narrow[2])
        assert torch.equal(got, case.run(basis=wide[0], gain=wide[1], bias=wide[2]))


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+int8"])
def test_empty_batch_gives_empty_output_and_zero_gradients(layout):
    case = make_case(layout, 5, 19, (0,)).require_grad()
    y = case.run()
    assert y.shape == (0, 5)
    y.sum().backward()
    assert case.x.grad.shape == (0, 19)
    for t in (case.basis, case.gain, case.bias):
        assert torch.count_nonzero(t.grad) == 0
    assert case.run(x=torch.zeros(2, 0, 3, 19)).shape == (2, 0, 3, 5)


@pytest.mark.parametrize("accuracy", ["exact", "fast"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_that_is_not_finite_stays_so_and_stays_alone(layout, accuracy):
    for tokens in (1, 3, 40):
        case = make_case(layout, 33, 70, (tokens,))
        clean = case.run(accuracy=accuracy)
        for bad in (float("nan"), float("inf")):
            x = case.x.clone()
            x[tokens // 2, 11] = bad
            y = case.run(x=x, accuracy=accuracy)
            assert not torch.isfinite(y[tokens // 2]).any()
            keep = torch.arange(tokens) != tokens // 2
            assert torch.isfinite(y[keep]).all()
            if accuracy == "exact":
                assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe9r_g7", "rbe2r_g5", "rbe8x2_g8", "rbe16s_g8"])
def test_shards_sum_and_stack_to_the_whole(layout):
    name, _, group = split(layout)
    m, n, seed = 12, group * 5 + 3, 77
    case = make_case(layout, m, n, (4,), torch.float64, bias=False, seed=seed)
    whole = case.run()
    cut = 2
    left = case.run(x=case.x[:, : cut * group], codes=case.codes[:, :cut], **({} if name.endswith("r") else {"in_features": cut * group}))
    right = case.run(x=case.x[:, cut * group :], codes=case.codes[:, cut:], k0=cut)
    torch.testing.assert_close(left + right, whole)
    top = case.run(codes=case.codes[:7], gain=case.gain[:7])
    below = case.run(codes=case.codes[7:], gain=case.gain[7:], row0=7)
    torch.testing.assert_close(torch.cat([top, below], -1), whole)
    if name.endswith("r"):  # the packed form draws idx from its place
        kw = {"layout": layout, "in_features": n, "seed": seed, "row0": 7, "k0": cut}
        packed = torch.ops.rbe.pack(case.codes[7:, cut:].contiguous(), **kw)
        assert torch.equal(torch.ops.rbe.unpack(packed, **kw), case.codes[7:, cut:])


def test_encode_inverts_decode():
    for layout in ("rbe22_g8", "rbe8_g8", "rbe16s_g8", "rbe9r_g7"):
        case = make_case(layout, 6, 40, (), torch.float64, seed=3)
        weight = case.dense()
        words = torch.ops.rbe.encode(weight, case.basis, case.gain, **case.keywords)
        again = torch.ops.rbe.decode(words, case.basis, case.gain, **case.keywords)
        torch.testing.assert_close(again, weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", ["rbe22_g16", "rbe32_g5", "rbe8_g8", "rbe16s_g8"])
def test_of_two_equal_basis_vectors_encode_takes_the_first(layout):
    half = torch.randn(1, 128, Layout.parse(layout).group)
    keywords = {"layout": layout, "in_features": 80}
    codes = torch.ops.rbe.encode(torch.randn(60, 80), torch.cat([half, half], 1), torch.ones(60), **keywords)
    assert int((codes >> 10 & 255).max()) < 128


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe8x2_g8", "rbe16s_g8"])
def test_results_do_not_depend_on_the_number_of_threads_or_the_run(layout):
    threads = torch.get_num_threads()
    case = make_case(layout, 130, 260, (70,)).require_grad()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            y = case.run()
            grads = torch.autograd.grad(y.square().sum(), [case.x, case.basis, case.gain, case.bias])
            results.append((y.detach(), *grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


BAD = {
    "x: last dimension": dict(x=torch.randn(3, 20)),
    "x: is int64": dict(x=torch.ones(3, 19, dtype=torch.int64)),
    "x: is a scalar": dict(x=torch.tensor(1.0)),
    "codes: is int64": dict(codes=torch.zeros(5, 3, 1, dtype=torch.int64)),
    "codes: has shape [5, 3]": dict(codes=torch.zeros(5, 3, dtype=torch.int32)),
    "in_features": dict(codes=torch.zeros(5, 4, 1, dtype=torch.int32)),
    "codes: rows have 7 bytes": dict(codes=torch.zeros(5, 7, dtype=torch.uint8)),
    "basis: has shape": dict(basis=torch.randn(2, 256, 8)),
    "basis: is int64": dict(basis=torch.zeros(1, 256, 8, dtype=torch.int64)),
    "gain: has shape [4]": dict(gain=torch.ones(4)),
    "gain": dict(gain=torch.tensor([1.0, 2.0, float("nan"), 1.0, 1.0])),
    "bias: has shape": dict(bias=torch.ones(6)),
    "amplitude: has shape": dict(amplitude=torch.zeros(5, 3, 2)),
    "amplitude: is float16": dict(amplitude=torch.zeros(5, 3, 1, dtype=torch.float16)),
    "layout": dict(layout="rbe23_g8"),
    "layout'": dict(layout="rbe22_g0"),
    "in_features: was 0": dict(in_features=0),
    "in_features: was -3": dict(in_features=-3),
    "seed: was -1": dict(seed=-1),
    "k0: was 9": dict(k0=9),
    "row0: was -2": dict(row0=-2),
    "accuracy: was 'quick'": dict(accuracy="quick"),
    "rounded: was False": dict(rounded=False, amplitude=torch.zeros(5, 3, 1)),
    "residual: is None": dict(layout="rbe22_g8+int8"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_refused_by_name(message):
    if message == "gain" and not products_check_values():
        pytest.skip("products on a CUDA device check no values")
    case = make_case("rbe22_g8", 5, 19, (3,))
    bad = {k: v.to(case.x.device) if isinstance(v, torch.Tensor) else v for k, v in BAD[message].items()}
    with pytest.raises(RuntimeError) as caught:
        case.run(**bad)
    assert str(caught.value).startswith("rbe::linear: ") and message.strip("'") in str(caught.value)


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe8_g8", "rbe16s_g8", "rbe9r_g7", "rbe4r_g3"])
def test_codes_with_bits_outside_the_layout_are_refused(layout):
    case = make_case(layout, 5, 19, (3,))
    bad = case.codes.clone()
    bad[3, 1, 0] |= 1 << 30
    calls = [lambda: torch.ops.rbe.pack(bad, **case.keywords)] + [lambda: case.run(codes=bad)] * products_check_values()
    for call in calls:
        with pytest.raises(RuntimeError, match="codes"):
            call()


def test_padding_bits_that_are_not_zero_are_refused():
    case = make_case("rbe22_g8", 5, 19, (3,))
    packed = torch.ops.rbe.pack(case.codes, **case.keywords)  # 66 bits in 9 bytes
    packed[2, 8] |= 0x80
    calls = [lambda: torch.ops.rbe.unpack(packed, **case.keywords)] + [lambda: case.run(codes=packed)] * products_check_values()
    for call in calls:
        with pytest.raises(RuntimeError, match="padding"):
            call()


def test_an_idx_that_the_seed_does_not_give_is_refused():
    case = make_case("rbe9r_g7", 5, 19, (3,), seed=4)
    if products_check_values():
        with pytest.raises(RuntimeError, match="seed"):
            case.run(seed=5)
    with pytest.raises(RuntimeError, match="seed"):
        torch.ops.rbe.pack(case.codes, layout="rbe9r_g7", in_features=19, seed=5)


def test_mixed_devices_are_refused():
    case = make_case()
    with pytest.raises(RuntimeError, match="must be on"):
        case.run(codes=case.codes.to("meta"))


def test_random_codes_cover_the_layout():
    """The tests above would be weak if the generator left fields at zero."""
    with torch.device("cpu"):
        words = random_codes("rbe32_g8", 64, 64, torch.Generator().manual_seed(0))
    assert (words.min() < 0) and all((words >> bit & 1).any() and not (words >> bit & 1).all() for bit in range(32))
