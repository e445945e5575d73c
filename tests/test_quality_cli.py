"""`rbe compress`, `eval` and `plan` with text. Risks: options that are accepted and not honoured, numbers that disagree with the
library's, wrong perplexity."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rbe_torch import evaluate, models, text
from rbe_torch.cli import main
from rbe_torch.linear import RBELinear

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_with_tokenizer(model: torch.nn.Module, path: Path) -> Path:
    """The model with a tokenizer that spells words letter by letter."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "."]
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=58, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=160
    )
    return save_with_tokenizer(transformers.BertModel(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=58, n_embd=32, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=0)
    return save_with_tokenizer(transformers.GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    generator = torch.Generator().manual_seed(0)
    words = ["".join(LETTERS[i] for i in torch.randint(0, 26, (4,), generator=generator).tolist()) for _ in range(240)]
    path.write_text("\n".join(" ".join(words[i : i + 6]) for i in range(0, 240, 6)) + "\n\n")
    return path


def json_of(capsys, *arguments: object) -> dict:
    status = main([str(argument) for argument in arguments] + ["--json", "--quiet"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_compress_calibrates_tunes_and_writes_a_page(capsys, bert, lines, tmp_path):
    page = tmp_path / "report.html"
    facts = json_of(
        capsys, "compress", bert, tmp_path / "out", "--layout", "rbe16s_g8", "--calibrate", lines, "--tune", "0.03", "--report", page
    )
    assert all(row["output_error"] is not None for row in facts["layers"] if row["converted"] and row["name"] != "pooler.dense")
    assert facts["tuning"]["steps"] > 0 and "Compression report" in page.read_text()
    scored = json_of(capsys, "eval", tmp_path / "out", "--dense", bert, "--layers")
    assert 0 < scored["models"][0]["cosine_mean"] < scored["models"][1]["cosine_mean"] == 1 and len(scored["layers"]) == facts["converted"]


def test_a_language_model_is_calibrated_and_scored_by_perplexity(capsys, gpt, lines, tmp_path):
    json_of(capsys, "compress", gpt, tmp_path / "out", "--layout", "rbe16s_g8", "--calibrate", lines)
    facts = json_of(capsys, "eval", tmp_path / "out", "--dense", gpt, "--data", lines, "--layers")
    assert facts["context"] == 24 and len(facts["layers"]) == 8
    model, tokenizer = models.load_dense(gpt), models.load_tokenizer(gpt)
    windows = text.text_windows(tokenizer, "\n".join(text.read_lines(lines)), 24)
    with torch.no_grad():
        losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    assert facts["models"][1]["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_layer_errors_are_zero_for_the_same_weights(bert):
    dense, batch = models.load_dense(bert), {"input_ids": torch.arange(20).view(2, 10) + 5}
    model = models.load_dense(bert)
    layer = model.encoder.layer[0].intermediate.dense
    coded = RBELinear.from_linear(layer, "rbe8x2_g8")
    model.encoder.layer[0].intermediate.dense = coded
    row = evaluate.layer_errors(model, dense, [batch])[0]
    assert 0 < row["relative_error"] < 0.5 and row["cosine"] < 1
    layer.weight.data = coded.weight
    dense.encoder.layer[0].intermediate.dense = layer
    row = evaluate.layer_errors(model, dense, [batch])[0]
    assert row["relative_error"] < 1e-9 and row["cosine"] == pytest.approx(1)


def test_plan_with_a_budget_shows_what_compress_would_choose(capsys, bert, tmp_path):
    options = ["--bits", "5.5"]
    planned = json_of(capsys, "plan", bert, *options, "--layout", "rbe8_g8", "--layout", "rbe16s_g8")
    chosen = [row for row in planned["frontier"] if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["bits_per_weight"] <= 5.5 and set(planned["layouts"].values()) <= {"rbe8_g8", "rbe16s_g8"}
    assert sum(row["loss"] for row in planned["layers"]) == pytest.approx(chosen[0]["loss"])
    assert main(["plan", str(bert), "--bits", "40", "--layout", "rbe8x3_g8+int8", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert all(any(line.split()[:5] == [row["name"], f"{row['out_features']}x{row['in_features']}", "rbe8x3_g8+int8", "3", "int8"] for line in printed.splitlines())
               for row in planned["layers"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["compress", "{bert}", "{out}", "--tune", "1"], "--tune: needs --calibrate"),
    (["compress", "{bert}", "{out}", "--bits", "2", "--max-megabytes", "3"], "give one of them"),
    (["compress", "{bert}", "{out}", "--report", "page.txt"], "--report"),
    (["plan", "{bert}", "--calibrate", "{lines}"], "--calibrate"),
    (["plan", "{bert}/config.json", "--bits", "3"], "no model directory"),
    (["eval", "{gpt}"], "--data"), (["eval", "{bert}", "--layers"], "--layers"),
])  # fmt: skip
def test_wrong_usage_is_said_and_ends_with_2(capsys, bert, gpt, lines, tmp_path, arguments, message):
    filled = [text.format(bert=bert, gpt=gpt, lines=lines, out=tmp_path / "out") for text in arguments]
    assert main(filled) == 2
    assert message in capsys.readouterr().err


def test_text_that_cannot_be_used_is_refused(capsys, bert, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    for name in ("empty.txt", "missing.txt"):
        assert main(["compress", str(bert), str(tmp_path / "out"), "--calibrate", str(tmp_path / name), "--quiet"]) == 1
        assert "text:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters", "dense_gigabytes"),
    [
        ("gpt2", 124_439_808, 0.498),
        ("llama-2-7b", 6_738_415_616, 13.48),
        ("llama-2-70b", 68_976_648_192, 137.95),
        ("gpt-3-175b", 174_604_259_328, 349.2),
    ],
)
def test_plan_of_published_models_has_their_published_sizes(capsys, name, parameters, dense_gigabytes):
    """Parameter counts of the models' papers and cards; GPT-3's 175 B with its 2048 positions."""
    facts = json_of(capsys, "plan", name, "--layout", "rbe8x2_g8", "--layout", "rbe22_g64")
    size = 4 if name == "gpt2" else 2
    assert facts["dense_model"] == size * parameters and facts["dense_model"] / 1e9 == pytest.approx(dense_gigabytes, rel=2e-3)
    assert facts["rows"][0]["bits_per_weight"] == pytest.approx(2.0, abs=0.02)
    assert not Path(name).exists()
