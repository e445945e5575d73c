"""The command line. Risks: a wrong exit status, a traceback instead of a reason, JSON that does not parse, files overwritten, numbers that disagree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rbe_torch
from rbe_torch import evaluate, models
from rbe_torch.cli import main
from rbe_torch.plan import plan
from rbe_torch.replace import find_linears

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
COMMANDS = ("compress", "inspect", "verify", "eval", "bench", "plan", "export", "train-hbbert")


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny BERT with a tokenizer that spells words letter by letter."""
    path = tmp_path_factory.mktemp("dense")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS), "."]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=100,
                                     max_position_embeddings=160)
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "model"
    assert main(["compress", str(dense), str(path), "--quiet"]) == 0
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.tsv"
    path.write_text("# score, two sentences\n5\ta cat sleeps\ta cat sleeps\n2.5\tthe dog runs\tthe dog barks\n0\ta boat\tmusic is loud\n1\tred\tgreen\n")
    return path


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def json_of(capsys, *arguments: object) -> dict:
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_warning_is_one_line_that_names_the_command(capsys, dense, tmp_path):
    status, _, err = run(capsys, "compress", dense, tmp_path / "out", "--layout", "rbe22_g32", "--quiet")
    assert status == 0 and len(err.splitlines()) == 1 and err.startswith("rbe compress: warning: rbe22_g32 loses ")


def python(*arguments: object, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "rbe_torch", *map(str, arguments)], capture_output=True, text=True, timeout=120, **keywords)


# ---- exit status and messages -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments", [
    [], ["train-hbbert"], ["train-hbbert", "--data", "a"], ["train-hbbert", "--data", "a", "--out", "b", "--curvature", "-1"],
    ["compress"], ["compress", "a"], ["compress", "a", "b", "--layout", "rbe9"],
    ["compress", "a", "b", "--seed", "-1"], ["compress", "a", "b", "--include", "("], ["inspect"], ["bench", "--tokens", "0"], ["bench", "--shape", "3"],
    ["export", "a", "--to", "onnx"], ["bench", "--threads", "99999"], ["export", "a"], ["plan", "a", "--no-such-option"],
])
def test_wrong_usage_is_status_2_and_one_line(arguments, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("rbe") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(("arguments", "reason"), [
    (["inspect", "no/such/place"], "no such file"), (["verify", "no/such/place"], "no such file"), (["plan", "no/such/place"], "models are not downloaded"),
    (["compress", "no/such/place", "out"], "models are not downloaded"), (["eval", "no/such/place"], "models are not downloaded"),
    (["export", "no/such/place", "--to", "dense"], "is no directory that"),
])
def test_failure_is_status_1_and_one_line(arguments, reason, capsys):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert reason in err and err.startswith(f"rbe {arguments[0]}: ") and err.count("\n") == 1


def test_a_process_ends_with_these_statuses_and_debug_shows_the_traceback(tmp_path):
    failed = python("verify", tmp_path)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert python("verify").returncode == 2
    import os

    assert "Traceback" in python("verify", tmp_path, env={**os.environ, "RBE_DEBUG": "1"}).stderr


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_an_example(command, capsys):
    status, out, _ = run(capsys, *command.split(), "--help")
    assert status == 0 and "example" in out and "rbe " in out


def test_dense_checkpoints_are_not_inspected(dense, capsys):
    assert run(capsys, "inspect", dense)[0] == 1
    assert run(capsys, "verify", dense)[0] == 1


# ---- compress ---------------------------------------------------------------------------------------------------------------------
def test_compress_writes_a_model_that_loads_and_computes(dense, compressed):
    tokenizer = models.load_tokenizer(compressed)
    loaded = rbe_torch.load_pretrained(compressed).eval()
    here = models.load_dense(dense)
    rbe_torch.compress(here, "rbe8x2_g8", progress=False)
    sentences = ["a cat sleeps", "music"]
    assert torch.equal(evaluate.embed(loaded, tokenizer, sentences), evaluate.embed(here, tokenizer, sentences))


def test_compress_reports_the_bytes_on_disk(dense, tmp_path, capsys):
    facts = json_of(capsys, "compress", dense, tmp_path / "out", "--layout", "rbe8_g8")
    assert facts["file_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert facts["converted"] == 13 and facts["layers"][0]["reason"]


def test_compress_does_not_touch_a_directory_that_is_not_empty(dense, tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("keep")
    status, _, err = run(capsys, "compress", dense, tmp_path)
    assert status == 1 and "--force" in err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    assert run(capsys, "compress", dense, tmp_path, "--force", "--layout", "rbe8_g8")[0] == 0
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_compress_refuses_its_own_source_and_a_compressed_model(dense, compressed, tmp_path, capsys):
    assert run(capsys, "compress", dense, dense, "--force")[0] == 2
    status, _, err = run(capsys, "compress", compressed, tmp_path / "again")
    assert status == 1 and "compressed already" in err


def test_a_model_with_nan_is_refused_by_layer_and_nothing_is_written(dense, tmp_path, capsys):
    model = transformers.BertModel.from_pretrained(dense)
    model.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    capsys.readouterr()  # what transformers says of its own loading and saving
    status, _, err = run(capsys, "compress", tmp_path / "bad", tmp_path / "out")
    assert status == 1 and "encoder.layer.1.output.dense" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_heads_survive(dense, tmp_path, capsys):
    config = transformers.AutoConfig.from_pretrained(dense)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    facts = json_of(capsys, "compress", tmp_path / "dense", tmp_path / "out", "--exclude", "pooler")
    reasons = {layer["name"]: layer["reason"] for layer in facts["layers"]}
    assert "head" in reasons["classifier"] and "excluded" in reasons["bert.pooler.dense"]
    loaded = rbe_torch.load_pretrained(tmp_path / "out")
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


# ---- inspect, verify, export -------------------------------------------------------------------------------------------------------
def test_inspect_counts_what_the_file_holds(compressed, capsys):
    facts = json_of(capsys, "inspect", compressed)
    assert facts["file_bytes"] == (compressed / "model.safetensors").stat().st_size
    header = facts["file_bytes"] - facts["compressed_bytes"] - facts["other_bytes"]
    assert 0 < header < 20_000
    model = rbe_torch.load_pretrained(compressed)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, rbe_torch.RBELinear)}
    assert {row["name"] for row in facts["layers"]} == set(layers)
    for row in facts["layers"]:
        assert row["bytes"] == layers[row["name"]].packed.numel() + 2 * layers[row["name"]].out_features
    assert "bits a weight" in run(capsys, "inspect", compressed)[1]


@pytest.mark.parametrize("place", [0.5, 0.999])
def test_verify_finds_a_flipped_bit(compressed, tmp_path, place, capsys):
    assert run(capsys, "verify", compressed, "--quiet")[0] == 0
    data = bytearray((compressed / "model.safetensors").read_bytes())
    data[int(len(data) * place)] ^= 4
    (tmp_path / "model.safetensors").write_bytes(data)
    status, out, err = run(capsys, "verify", tmp_path, "--quiet")
    assert (status, out) == (1, "") and "model.safetensors" in err


def test_verify_finds_a_truncated_file(compressed, tmp_path, capsys):
    data = (compressed / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-100])
    assert run(capsys, "verify", tmp_path, "--quiet")[0] == 1


def test_export_gives_a_plain_model_with_the_same_weights(compressed, tmp_path, capsys):
    assert run(capsys, "export", compressed, "--to", "dense", "--out", tmp_path / "plain")[0] == 0
    plain = transformers.AutoModel.from_pretrained(tmp_path / "plain").eval()
    loaded = rbe_torch.load_pretrained(compressed).eval()
    assert type(plain.pooler.dense) is torch.nn.Linear
    assert torch.equal(plain.pooler.dense.weight, loaded.pooler.dense.weight)
    assert not hasattr(plain.config, "quantization_config")
    assert (tmp_path / "plain" / "vocab.txt").exists()


def test_an_exported_program_computes_what_the_model_does(compressed, tmp_path, capsys):
    file = tmp_path / "small.pt2"
    assert run(capsys, "export", compressed, "--to", "pt2", "--out", file)[0] == 0
    program = torch.export.load(file).module()
    ids = torch.arange(35).view(5, 7)
    with torch.no_grad():
        ours = program(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        wanted = rbe_torch.load_pretrained(compressed).eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours, wanted)
    assert "--force" in run(capsys, "export", compressed, "--to", "pt2", "--out", file)[2]
    assert [path.name for path in tmp_path.iterdir()] == ["small.pt2"]


# ---- eval, bench, plan -------------------------------------------------------------------------------------------------------------
def test_eval_agrees_with_scipy_and_sees_itself_as_the_same(dense, pairs, capsys):
    stats = pytest.importorskip("scipy.stats")
    facts = json_of(capsys, "eval", dense, "--dense", dense, "--data", pairs)
    assert facts["pairs"] == 4 and facts["models"][0]["cosine_mean"] == pytest.approx(1.0, abs=1e-6)
    read = evaluate.read_pairs(pairs)
    embeddings = evaluate.embed(models.load_dense(dense), models.load_tokenizer(dense), read.sentences)
    expected = stats.spearmanr((embeddings[:4] * embeddings[4:]).sum(1), read.scores).statistic
    assert facts["models"][0]["spearman"] == pytest.approx(expected)


def test_eval_prints_both_models(dense, compressed, pairs, capsys):
    status, out, _ = run(capsys, "eval", compressed, "--dense", dense, "--data", pairs)
    assert status == 0 and str(compressed) in out and str(dense) in out


def test_eval_probes_the_classes_of_sst2_where_the_directory_has_it(dense, compressed, pairs, tmp_path, capsys):
    data = tmp_path / "data"
    (data / "sst2").mkdir(parents=True)
    (data / "dev.tsv").write_text(pairs.read_text())
    lines = [f"{label}\t{text}" for label, text in ((1, "music is loud"), (0, "a boat"), (1, "loud music"), (0, "a red boat"))]
    for part in ("train", "dev"):
        (data / "sst2" / f"{part}.tsv").write_text("\n".join(["label\tsentence", *lines]) + "\n")
    facts = json_of(capsys, "eval", compressed, "--dense", dense, "--data", data)
    assert facts["models"][1]["sst2"] == 1.0 and 0 <= facts["models"][0]["sst2"] <= 1  # the dense model's own sentences, separable
    (data / "sst2" / "dev.tsv").write_text("label\tsentence\n2\tthree classes\n")
    assert "dev.tsv line 2 is not 0<TAB>sentence" in run(capsys, "eval", dense, "--data", data)[2]


@pytest.mark.parametrize(("a", "b"), [([1, 2, 3, 4], [1, 3, 2, 4]), ([1, 1, 2, 3, 3, 3], [5, 4, 4, 1, 2, 2]), ([0.5, -1, 7], [1, 2, 0])])
def test_rank_correlation_with_ties(a, b):
    stats = pytest.importorskip("scipy.stats")
    assert evaluate.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_embeddings_do_not_depend_on_the_order_or_the_padding(dense):
    model, tokenizer = models.load_dense(dense), models.load_tokenizer(dense)
    sentences = ["a", "music is very loud here", "red boat"]
    together = evaluate.embed(model, tokenizer, sentences)
    alone = torch.cat([evaluate.embed(model, tokenizer, [s]) for s in sentences])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["", "5\tone sentence\n", "1\ta\tb\nx\tc\td\n"])
def test_bad_pairs_are_refused(dense, tmp_path, text, capsys):
    (tmp_path / "bad.tsv").write_text(text)
    status, _, err = run(capsys, "eval", dense, "--data", tmp_path / "bad.tsv")
    assert status == 1 and "data:" in err and "bad.tsv" in err


def test_the_projects_pairs_cover_all_scores():
    pairs = evaluate.read_pairs()
    assert len(pairs) == 80 and min(pairs.scores) == 0 and max(pairs.scores) == 5
    assert len(set(pairs.sentences)) == 160


def test_bench_times_every_combination_and_checks_the_result(capsys):
    facts = json_of(capsys, "bench", "--shape", "24x16", "--shape", "16x40", "--tokens", "1,3", "--layout", "rbe8x2_g8", "--layout", "rbe22_g16",
                    "--seconds", "0.01", "--quiet")
    assert len(facts["rows"]) == 8
    assert all(0 < row["min_us"] <= row["median_us"] and row["dense_min_us"] > 0 and row["relative_error"] < 1e-5 for row in facts["rows"])


def test_plan_is_what_compress_then_weighs(dense, capsys, tmp_path):
    layouts = ("rbe8x2_g8", "rbe22_g16", "rbe9r_g16", "rbe8_g8+lr4", "rbe8_g8+sp0.01")
    facts = json_of(capsys, "plan", dense / "config.json", *(part for layout in layouts for part in ("--layout", layout)))
    for row in facts["rows"]:
        model = models.load_dense(dense)
        with pytest.warns() if row["layout"].startswith("rbe9r") else _nothing():
            report = rbe_torch.compress(model, row["layout"], progress=False)
        assert (row["linears"], row["model"]) == (report.compressed_bytes, report.compressed_bytes + report.other_bytes)
        assert row["bits_per_weight"] == pytest.approx(report.bits_per_weight)


def test_plan_of_a_model_on_meta_is_that_of_the_real_one(dense):
    empty, real = models.empty_model(models.load_config(dense)), models.load_dense(dense)
    assert plan(empty) == plan(real)
    assert [entry.name for entry in find_linears(empty)] == [entry.name for entry in find_linears(real)]


def test_plan_lists_what_is_left_alone(dense, capsys):
    status, out, _ = run(capsys, "plan", dense, "--exclude", "attention")
    assert status == 0 and "left alone: embeddings.word_embeddings: embedding" in out and "excluded by 'attention'" in out


def _nothing():
    import contextlib

    return contextlib.nullcontext()
