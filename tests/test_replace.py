"""convert, decompress and the choice of modules: nothing is replaced that a parent reads directly, and nothing is left alone silently."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear
from rbe_torch.replace import find_linears
from rbe_torch.report import Report

LAYOUT = "rbe22_g8"


class Net(nn.Module):
    """One of everything that has a reason."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16)
        self.fc1 = nn.Linear(16, 32)
        self.fc10 = nn.Linear(32, 16)
        self.alias = self.fc10  # the same module at two places
        self.conv = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda *_: None)
        self.tied = nn.Linear(16, 10, bias=False)
        self.tied.weight = self.emb.weight
        self.lm_head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.decoder(self.encoder(self.alias(torch.relu(self.fc1(self.emb(x))))), self.attention(*[self.emb(x)] * 3)[0]))


CONVERTED = {"fc1", "fc10", "decoder.linear1", "decoder.linear2"}
REASONS = {
    "emb": "embedding", "conv": "Conv1d", "attention": "MultiheadAttention", "attention.out_proj": "MultiheadAttention",
    "encoder.linear1": "TransformerEncoderLayer", "encoder.linear2": "TransformerEncoderLayer", "encoder.self_attn": "MultiheadAttention",
    "encoder.self_attn.out_proj": "MultiheadAttention", "decoder.self_attn": "MultiheadAttention", "decoder.self_attn.out_proj": "MultiheadAttention",
    "decoder.multihead_attn": "MultiheadAttention", "decoder.multihead_attn.out_proj": "MultiheadAttention", "bilinear": "Bilinear",
    "parametrised": "subclass", "hooked": "hooks", "tied": "tied to emb.weight", "lm_head": "output head",
}  # fmt: skip


def test_every_matrix_is_converted_or_listed_with_the_reason() -> None:
    model = Net()
    report = rbe_torch.convert(model, LAYOUT)
    assert {row.name for row in report.converted} == CONVERTED
    assert {row.name for row in report.skipped} >= set(REASONS)
    for row in report.skipped:
        assert REASONS.get(row.name, "only nn.Linear") in row.reason, row.name
    assert {name for name, module in model.named_modules() if isinstance(module, RBELinear)} == CONVERTED
    assert model.alias is model.fc10 and isinstance(model.alias, RBELinear)
    x = torch.randint(10, (2, 5))
    assert torch.isfinite(model(x)).all() and torch.isfinite(model.eval()(x)).all()


def test_unconverted_attention_computes_what_it_did() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        before = model.encoder(x), model.attention(x, x, x)[0]
        rbe_torch.convert(model, LAYOUT)
        assert torch.equal(model.encoder(x), before[0]) and torch.equal(model.attention(x, x, x)[0], before[1])


@pytest.mark.parametrize(
    "options, converted",
    [
        ({"include": "fc1$"}, {"fc1"}),
        ({"include": ["^fc1", "linear2"]}, {"fc1", "fc10", "decoder.linear2"}),
        ({"exclude": "decoder"}, {"fc1", "fc10"}),
        ({"include": "fc1", "exclude": "fc10"}, {"fc1"}),
        ({"include": ["lm_head", "fc1$"]}, {"fc1", "lm_head"}),
    ],
)
def test_include_and_exclude_choose_by_name(options: dict, converted: set) -> None:
    report = rbe_torch.convert(Net(), LAYOUT, **options)
    assert {row.name for row in report.converted} == converted
    assert len(report.rows) == len(find_linears(Net()))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"include": "nothing_like_it"}, "include: 'nothing_like_it' matches no module"),
        ({"exclude": ["fc1", "nope"]}, "exclude: 'nope' matches no module"),
        ({"include": "(", "exclude": None}, "include: .* is not a regular expression"),
        ({"include": "encoder"}, "include: 'encoder' matches only modules that cannot be converted: .*fast path|MultiheadAttention"),
        ({"include": [3]}, "include: holds a int"),
        ({"exclude": "."}, "no module that can be converted"),
    ],
)
def test_patterns_that_do_nothing_are_refused_and_change_nothing(options: dict, text: str) -> None:
    model = Net()
    with pytest.raises((ValueError, TypeError), match=text):
        rbe_torch.convert(model, LAYOUT, **options)
    assert not any(isinstance(module, RBELinear) for module in model.modules())


@pytest.mark.parametrize("model", [nn.Conv2d(1, 1, 1), nn.Sequential(), nn.MultiheadAttention(8, 2), nn.Sequential(nn.Embedding(3, 3))])
def test_a_model_without_linear_layers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="model: has no module that can be converted"):
        rbe_torch.convert(model, LAYOUT)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model: is a dict"):
        rbe_torch.convert({}, LAYOUT)
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        rbe_torch.convert(nn.Linear(3, 3), LAYOUT)
    with pytest.raises(ValueError, match="layout"):
        rbe_torch.convert(nn.Sequential(nn.Linear(3, 3)), "rbe8_g8+int8")


def test_converting_twice_leaves_the_first_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    rbe_torch.convert(model, LAYOUT)
    layer = model[0]
    model.append(nn.Linear(8, 8))
    report = rbe_torch.convert(model, LAYOUT)
    assert model[0] is layer and report.skipped[0].reason == "is an RBELinear already"


def test_output_embeddings_are_a_head_whatever_their_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unembed = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    report = rbe_torch.convert(Model(), LAYOUT)
    assert [row.name for row in report.skipped] == ["unembed"] and "head" in report.skipped[0].reason


def test_dtype_device_mode_and_bias_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)).to(torch.bfloat16).eval()
    bias = model[1].bias
    rbe_torch.convert(model, LAYOUT)
    assert model[0].bias is None and model[1].bias is bias and not model[0].training
    assert model[0].dtype == torch.bfloat16 and model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_seed_decides_the_codes_and_the_basis_is_shared() -> None:
    def converted(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        rbe_torch.convert(model, "rbe9r_g8", seed=seed)
        return model

    a, b, c = converted(1), converted(1), converted(2)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)
    assert a[0].basis is a[1].basis and int(a[0].seed) != int(a[1].seed)
    assert len([p for p in a.parameters() if p.shape == (1, 256, 8)]) == 1


def test_a_meta_model_can_be_converted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    report = rbe_torch.convert(model, "rbe8x2_g8")
    assert len(report.converted) == 2 and model(torch.empty(2, 16, device="meta")).shape == (2, 4)


def test_conv1d_of_transformers_is_converted_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    source = pytorch_utils.Conv1D(12, 20)  # 20 inputs, 12 outputs
    lin = RBELinear.from_linear(source, "rbe8x2_g4", basis=torch.randn(2, 256, 4))
    assert (lin.in_features, lin.out_features) == (20, 12) and lin.bias is source.bias
    assert (lin.weight - source.weight.t()).square().sum() < 0.9 * source.weight.square().sum()
    model = nn.Sequential(source)
    rbe_torch.convert(model, LAYOUT)
    assert model[0].weight.shape == (12, 20)


def test_decompress_gives_linears_with_the_decoded_weights() -> None:
    model = Net().eval()
    rbe_torch.convert(model, "rbe8x2_g8")
    rbe_torch.finish_training(model)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, RBELinear)}
    assert rbe_torch.decompress(model) is model
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert type(module) is nn.Linear and torch.equal(module.weight, weight) and not module.training
    assert model.alias is model.fc10
    single = RBELinear(8, 4, layout=LAYOUT)
    dense = rbe_torch.decompress(single)
    assert type(dense) is nn.Linear and torch.equal(dense.weight, single.weight) and dense.bias is single.bias


# ---- report ----------------------------------------------------------------------------------------------------------------------
def test_the_report_counts_every_byte() -> None:
    model = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 24), nn.Linear(24, 8))
    report = rbe_torch.convert(model, LAYOUT)
    rbe_torch.finish_training(model)
    codes = model[1].packed.numel() + model[2].packed.numel()
    gains, basis, biases = 2 * (24 + 8), 2 * 256 * 8, 4 * (24 + 8)
    assert report.compressed_bytes == codes + gains + basis and report.basis_bytes == basis and len(report.bases) == 1
    assert report.other_bytes == 4 * 7 * 16 + biases
    assert report.bits_per_weight == pytest.approx(8 * (codes + gains + basis) / (16 * 24 + 24 * 8))
    assert sum(report.layer_bits(row) * row.weights for row in report.converted) == pytest.approx(8 * report.compressed_bytes)


def test_the_report_prints_and_turns_into_json(tmp_path) -> None:
    report = rbe_torch.convert(Net(), LAYOUT)
    text = str(report)
    for name in (*CONVERTED, *REASONS):
        assert name in text
    for row in report.skipped:
        assert row.reason in text
    assert f"{report.bits_per_weight:.3f} bits a weight" in text
    values = json.loads(report.to_json(tmp_path / "report.json"))
    assert values == json.loads((tmp_path / "report.json").read_text())
    assert values["bits_per_weight"] == report.bits_per_weight and len(values["layers"]) == len(report.rows)
    assert {row["name"] for row in values["layers"] if row["converted"]} == CONVERTED


def test_a_report_can_be_copied_and_mean_error_is_weighted() -> None:
    report = Report()
    report.add_converted("a", RBELinear(8, 8, layout=LAYOUT), relative_error=0.5)
    report.add_converted("b", RBELinear(24, 8, layout=LAYOUT), relative_error=0.1)
    assert report.relative_error == pytest.approx(0.2) and len(report.bases) == 2
    assert copy.deepcopy(report).to_dict() == report.to_dict()
