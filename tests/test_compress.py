"""compress and the trainers behind it. Risks: a wrong report, a half-changed model, results that change from run to run, and error beyond theory."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import codebook, reference, trainers
from rbe_torch.compress import fit_basis
from rbe_torch.layout import Layout
from rbe_torch.linear import RBELinear

# Relative squared error on iid Gaussian weights that the basis was not fitted to: (rate-distortion bound at the code's bits, what is accepted).
GAUSSIAN_BOUNDS = {
    "rbe8_g8": (0.25, 0.36), "rbe8x2_g8": (0.0625, 0.105), "rbe16s_g8": (0.0625, 0.12), "rbe8x3_g8": (0.0156, 0.036),
}
REPORT_TOLERANCE = 1e-5  # float32 decode against float64 decode
FAST = ["rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe22_g16", "rbe9r_g16"]


def gaussian(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def small_net(seed: int = 0) -> nn.Sequential:
    """Odd sizes: ragged groups, a single row, fewer columns than a group."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 61), nn.ReLU(), nn.Linear(61, 50, bias=False), nn.ReLU(), nn.Linear(50, 5), nn.Linear(5, 1))


@pytest.fixture
def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=101, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100,
                                     max_position_embeddings=32)
    return transformers.BertForMaskedLM(config).eval()


def compress_quietly(model: nn.Module, layout: str, **keywords) -> rbe_torch.Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rbe_torch.compress(model, layout, progress=False, **keywords)


def dense_float64(layer: RBELinear) -> torch.Tensor:
    """The weight by the independent implementation."""
    residual = [None if t is None else t for t in (layer.residual, layer.residual_scale, layer.residual_right, layer.residual_right_scale)]
    return reference.decode(layer.codes, layer.basis.double(), layer.gain.double(), None, *residual, layout=str(layer.layout), in_features=layer.in_features,
                            seed=int(layer.seed) if layer.layout.seeded else 0).double()


# ---- the report ------------------------------------------------------------------------------------------------------------------
def test_every_module_with_a_weight_is_in_the_report_once(bert):
    holding = {name for name, m in bert.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    report = compress_quietly(bert, "rbe8x2_g8")
    names = [row.name for row in report.rows]
    assert sorted(names) == sorted(holding)
    assert {row.name for row in report.converted} == {name for name, m in bert.named_modules() if isinstance(m, RBELinear)}
    assert all(row.reason for row in report.skipped)


def test_embeddings_and_tied_head_are_left_alone(bert):
    embedding = bert.bert.embeddings.word_embeddings.weight
    report = compress_quietly(bert, "rbe8x2_g8")
    reasons = {row.name: row.reason for row in report.skipped}
    assert "tied" in reasons["cls.predictions.decoder"]
    assert "embedding" in reasons["bert.embeddings.word_embeddings"]
    assert bert.cls.predictions.decoder.weight is embedding is bert.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("layout", [*FAST, "rbe8x2_g8+int8", "rbe8x2_g8+sp0.02"])
def test_reported_error_is_the_error_of_the_weights(layout):
    model = small_net()
    dense = {name: m.weight.detach().double() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = compress_quietly(model, layout)
    for row in report.converted:
        w = dense[row.name]
        error = (w - dense_float64(model.get_submodule(row.name))).square().sum() / w.square().sum()
        assert row.relative_error == pytest.approx(float(error), rel=REPORT_TOLERANCE, abs=1e-9), row.name
    mean = sum(r.relative_error * r.weights for r in report.converted) / report.weights
    assert report.relative_error == pytest.approx(mean)


def test_reported_bytes_are_those_of_the_tensors():
    model = small_net()
    report = compress_quietly(model, "rbe8x2_g8+lr2")
    layers = [m for m in model.modules() if isinstance(m, RBELinear)]
    tables = {id(layer.basis): 2 * layer.basis.numel() for layer in layers}
    own = sum(layer.packed.numel() + 2 * layer.gain.numel() + layer.residual.numel() + layer.residual_right.numel()
              + 4 * (layer.residual_scale.numel() + layer.residual_right_scale.numel()) for layer in layers)
    assert report.compressed_bytes == own + sum(tables.values())
    assert report.bits_per_weight == pytest.approx(8 * report.compressed_bytes / sum(r.out_features * r.in_features for r in report.converted))


# ---- quality ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", GAUSSIAN_BOUNDS)
def test_error_on_unseen_gaussian_weights_is_near_the_bound(layout):
    least, most = GAUSSIAN_BOUNDS[layout]
    basis = fit_basis([gaussian(256, 768)], layout)
    weight = gaussian(64, 768, seed=1)
    linear = nn.Linear(768, 64, bias=False)
    linear.weight.data = weight
    w = RBELinear.from_linear(linear, layout, basis).weight
    error = float((weight - w).square().sum() / weight.square().sum())
    assert least < error < most


def test_gain_per_code_error_is_that_of_the_best_line():
    """rbe22 stores a scale of about 14 bits, so what is lost is the angle to the nearest of 256 lines."""
    weight = gaussian(256, 256)
    basis = fit_basis([weight], "rbe22_g8")
    linear = nn.Linear(256, 256, bias=False)
    linear.weight.data = weight
    vectors = weight.reshape(-1, 8).double()
    along = (vectors @ basis[0].double().t()).square() / basis[0].double().square().sum(1)
    best = float((vectors.square().sum(1) - along.amax(1)).sum() / vectors.square().sum())
    got = RBELinear.from_linear(linear, "rbe22_g8", basis).weight.double()
    assert float((weight - got).square().sum() / weight.square().sum()) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("suffix", ["+int8", "+fp8", "+lr8", "+sp0.05"])
def test_a_residual_lowers_the_error(suffix):
    plain, more = (compress_quietly(small_net(), layout).relative_error for layout in ("rbe8_g8", "rbe8_g8" + suffix))
    assert more < 0.9 * plain


def test_the_layer_computes_with_the_compressed_weight(bert):
    ids = torch.arange(20).view(2, 10)
    compress_quietly(bert, "rbe8x2_g8")
    with torch.no_grad():
        got = bert(ids).logits
        for name, module in list(bert.named_modules()):
            if isinstance(module, RBELinear):
                linear = nn.Linear(module.in_features, module.out_features)
                linear.weight.data, linear.bias = dense_float64(module).float(), module.bias
                parent, _, child = name.rpartition(".")
                setattr(bert.get_submodule(parent), child, linear)
        torch.testing.assert_close(got, bert(ids).logits, rtol=1e-4, atol=1e-5)


def test_scaling_a_row_scales_its_reconstruction():
    """The gain carries the magnitude: powers of two on rows change nothing else."""
    factors = 2.0 ** torch.randint(-4, 5, (61, 1), generator=torch.Generator().manual_seed(0))
    plain, scaled = small_net(), small_net()
    scaled[0].weight.data *= factors
    compress_quietly(plain, "rbe8x2_g8", include="^0$")
    compress_quietly(scaled, "rbe8x2_g8", include="^0$")
    torch.testing.assert_close(scaled[0].weight, plain[0].weight * factors, rtol=1e-6, atol=0)


# ---- the trainers ----------------------------------------------------------------------------------------------------------------
def test_least_squares_finds_the_optimum():
    vectors, codes = gaussian(2000, 5), torch.randint(0, 256, (2000, 2), generator=torch.Generator().manual_seed(1))
    basis = trainers._least_squares(vectors, codes, torch.Generator().manual_seed(0))
    one_hot = torch.zeros(2000, 512, dtype=torch.float64).scatter_(1, codes + torch.tensor([0, 256]), 1.0)
    best = one_hot @ torch.linalg.lstsq(one_hot, vectors.double(), driver="gelsd").solution
    assert float((vectors - basis[0][codes[:, 0]] - basis[1][codes[:, 1]]).square().sum()) <= 1.0001 * float((vectors - best).square().sum())


def test_unused_vectors_are_put_to_use():
    vectors = gaussian(500, 4)
    codes = torch.randint(0, 3, (500, 2), generator=torch.Generator().manual_seed(1))
    basis = trainers._least_squares(vectors, codes, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(basis).all())
    assert len(torch.unique(basis[0], dim=0)) > 200


@pytest.mark.parametrize("layout", FAST)
def test_the_basis_holds_fp16_numbers(layout):
    basis = fit_basis([gaussian(64, 64), gaussian(32, 40)], layout)
    assert basis.dtype == torch.float32 and tuple(basis.shape) == Layout.parse(layout).basis_shape and basis.is_contiguous()
    assert torch.equal(basis.half().float(), basis)


def test_padding_does_not_reach_the_sample():
    vectors = codebook.sample_vectors([gaussian(20, 13).abs() + 1], 8, torch.Generator().manual_seed(0))
    assert tuple(vectors.shape) == (20, 8) and bool((vectors > 0).all())


def test_the_sample_is_bounded_and_takes_from_every_weight(monkeypatch):
    monkeypatch.setattr(codebook, "SAMPLE_VECTORS", 1000)
    weights = [torch.full((300, 64), 1.0), torch.full((300, 64), -1.0), torch.full((600, 64), 1.0)]
    vectors = codebook.sample_vectors(weights, 8, torch.Generator().manual_seed(0))
    assert 999 <= len(vectors) <= 1001
    assert int((vectors[:, 0] < 0).sum()) == 250


# ---- the same every time ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", FAST)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(layout):
    models, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            models.append(small_net())
            torch.manual_seed(len(models))  # the global generator must not matter
            compress_quietly(models[-1], layout, seed=7)
    finally:
        torch.set_num_threads(threads)
    first, *others = (model.state_dict() for model in models)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


def test_another_seed_gives_another_basis():
    one, two = small_net(), small_net()
    compress_quietly(one, "rbe8x2_g8", seed=1)
    compress_quietly(two, "rbe8x2_g8", seed=2)
    assert not torch.equal(one[0].basis, two[0].basis)


def test_seeded_layers_draw_different_idx():
    model = small_net()
    compress_quietly(model, "rbe9r_g16", seed=3)
    assert len({int(m.seed) for m in model if isinstance(m, RBELinear)}) == 4


@pytest.mark.parametrize(("basis", "tables"), [("model", 1), ("layer", 4)])
def test_one_basis_for_the_model_or_one_a_layer(basis, tables):
    model = small_net()
    report = compress_quietly(model, "rbe8_g8", basis=basis)
    assert len({id(m.basis) for m in model if isinstance(m, RBELinear)}) == len(report.bases) == tables


# ---- all or nothing --------------------------------------------------------------------------------------------------------------
def snapshot(model: nn.Module) -> tuple[list[int], dict[str, torch.Tensor]]:
    return [id(m) for m in model.modules()], copy.deepcopy(model.state_dict())


def assert_untouched(model: nn.Module, before: tuple[list[int], dict[str, torch.Tensor]]) -> None:
    assert [id(m) for m in model.modules()] == before[0]
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[1][key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_a_bad_weight_is_refused_by_name_before_anything_is_changed(bad):
    model = small_net()
    model[4].weight.data[2, 3] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^model: .*\b4: weight has .*(not finite|magnitude)"):
        compress_quietly(model, "rbe8x2_g8")
    assert_untouched(model, before)


def test_an_error_midway_leaves_the_model_as_it_was(monkeypatch):
    model, made, true = small_net(), [], RBELinear.from_linear

    def failing(*arguments, **keywords):
        made.append(1)
        if len(made) == 3:
            raise RuntimeError("out of luck")
        return true(*arguments, **keywords)

    monkeypatch.setattr(RBELinear, "from_linear", failing)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="4: out of luck"):
        compress_quietly(model, "rbe8_g8")
    assert_untouched(model, before)


@pytest.mark.parametrize("argument", [{"calibration": [torch.zeros(1, 2)]}, {"bits": 0.0}, {"max_megabytes": 1e-9}, {"tune": 1.0}, {"basis": "both"}, {"seed": -1},
                                      {"layout": "rbe8x2"}, {"include": "nothing_like_it"}])
def test_arguments_that_cannot_be_honoured_are_refused_by_name(argument):
    model = small_net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=next(iter(argument))):
        rbe_torch.compress(model, progress=False, **argument)
    assert_untouched(model, before)


# ---- odd weights -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", FAST)
def test_zero_rows_stay_next_to_zero(layout):
    model = small_net()
    model[0].weight.data[::2] = 0
    model[2].weight.data.zero_()
    report = compress_quietly(model, layout)
    rows = {row.name: row for row in report.rows}
    assert float(model[0].weight[::2].abs().max()) < 1e-5 and float(model[2].weight.abs().max()) < 1e-5
    assert rows["2"].relative_error is None and "zero" in rows["2"].note
    report.to_json()


def test_a_model_of_zeros_can_be_compressed():
    model = nn.Sequential(nn.Linear(16, 16))
    nn.init.zeros_(model[0].weight)
    assert compress_quietly(model, "rbe8x2_g8").relative_error is None
    assert bool(torch.isfinite(model[0].weight).all())


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**16])
def test_small_and_large_weights_keep_their_precision(scale):
    model = small_net()
    model[0].weight.data *= scale  # rows of 2e-5 and of 6e3
    report = compress_quietly(model, "rbe8x2_g8", include="^0$")
    plain = compress_quietly(small_net(), "rbe8x2_g8", include="^0$")
    assert report.relative_error == pytest.approx(plain.relative_error, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_keep_them(dtype):
    model = small_net().to(dtype)
    compress_quietly(model, "rbe8x2_g8")
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    assert model(torch.randn(3, 37, dtype=dtype)).dtype == dtype


# ---- what the user is told -------------------------------------------------------------------------------------------------------
def test_a_layout_that_cannot_hold_trained_weights_says_so():
    with pytest.warns(UserWarning, match=r"rbe22_g32 loses .*\(relative squared error 0\.\d+.*rbe8x2_g8"):
        report = rbe_torch.compress(nn.Sequential(nn.Linear(128, 128)), "rbe22_g32", progress=False)
    measured = float(report.notes[0].split("relative squared error ")[1].split(" ")[0])
    assert measured == pytest.approx(report.relative_error, abs=0.02)


def test_the_warning_comes_before_anything_is_run(monkeypatch):
    def never(*_):
        raise AssertionError("ran")

    monkeypatch.setattr(RBELinear, "from_linear", never)
    model = nn.Sequential(nn.Linear(128, 128))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="loses"):
            rbe_torch.compress(model, "rbe22_g64", progress=False)
    assert type(model[0]) is nn.Linear


def test_a_layout_that_can_does_not_warn(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rbe_torch.compress(small_net(), "rbe8x2_g8", progress=False)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(capfd):
    rbe_torch.compress(small_net(), "rbe8_g8", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "compress to rbe8_g8: done" in err


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe16s_g8", "rbe22_g16", "rbe8_g8+lr2", "rbe8_g8+sp0.1"])
def test_torchs_default_dtype_changes_no_encoding(dtype: torch.dtype, layout: str) -> None:
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
    other, batches = copy.deepcopy(model), [torch.randn(8, 32) for _ in range(9)]
    rbe_torch.compress(model, layout, calibration=batches, progress=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        rbe_torch.compress(other, layout, calibration=batches, progress=False)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(model[2].codes, other[2].codes) and torch.equal(model[2].gain, other[2].gain)


def test_a_weight_too_small_for_an_fp16_gain_is_refused() -> None:
    linear = nn.Linear(30, 64)
    linear.weight.data *= 1e-10
    with pytest.raises(ValueError, match="weight: has no value of a magnitude above 1.*must have one of 3.8e-06"):
        RBELinear.from_linear(linear)
    linear.weight.data.zero_()
    assert float(RBELinear.from_linear(linear).weight.abs().max()) < 1e-6
