"""Where commands write and what they need there. Risks: hours of work lost on a place that cannot be written, files of another model kept, bars in --quiet,
a tokenizer that is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rbe_torch import models
from rbe_torch.cli import main
from rbe_torch.commands import target

transformers = pytest.importorskip("transformers")

SIDE_FILES = ("chat_template.jinja", "preprocessor_config.json", "special_tokens_map.json", "tokenizer.model", "modules.json", "1_Pooling/config.json",
              "2_Dense/config.json", "2_Dense/model.safetensors", "LICENSE")  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A tiny decoder with the side files that models come with, and no tokenizer."""
    path = tmp_path_factory.mktemp("dense") / "a decoder, größer"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, bos_token_id=1,
                                      eos_token_id=2)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(path)
    for name in SIDE_FILES:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("of the model")
    (path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    return path


@pytest.fixture
def long_work(monkeypatch):
    """Fails a test that comes as far as to load a model."""
    def refuse(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(models, "load_dense", refuse)
    monkeypatch.setattr(models, "empty_model", refuse)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc to be refused by")
@pytest.mark.parametrize("more", [[], ["--report", "OUT/report.html"]])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(dense, more, capsys, long_work) -> None:
    more = [part.replace("OUT", "/proc/x") for part in more]
    assert main(["compress", str(dense), "/proc/x/y", *more, "--quiet"]) == 1
    assert "OUT: /proc/x/y cannot be written: No such file or directory" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused_before_the_work(dense, tmp_path, capsys, long_work) -> None:
    assert main(["compress", str(dense), str(tmp_path / "out"), "--report", str(tmp_path / "no" / "r.html")]) == 1
    assert "--report" in (err := capsys.readouterr().err) and "there is no directory" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [[], ["--stream"], ["--bits", "3"], ["--max-megabytes", "4"]])
def test_a_full_disk_is_noticed_before_the_work(dense, more, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    assert main(["compress", str(dense), str(tmp_path / "out"), *more, "--quiet"]) == 1
    assert "has 0.01 MB free, the model takes about" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [[], ["--stream"]])
def test_every_side_file_comes_along(dense, kind, tmp_path) -> None:
    out = tmp_path / "out"
    assert main(["compress", str(dense), str(out), "--quiet", *kind]) == 0
    assert {name: (out / name).read_text() for name in SIDE_FILES} == {name: (dense / name).read_text() for name in SIDE_FILES}
    assert json.loads((out / "generation_config.json").read_text())["max_new_tokens"] == 7
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == {*SIDE_FILES, "config.json", "model.safetensors", "generation_config.json"}


def test_force_leaves_no_tokenizer_of_the_model_that_was_there(dense, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.model").write_text("of another model")
    assert main(["compress", str(dense), str(out), "--quiet", "--force"]) == 0
    assert (out / "tokenizer.model").read_text() == "of the model"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("command", [["eval"], ["compress", "OUT", "--calibrate", "TEXT"]])
def test_a_directory_without_a_tokenizer_is_named(kind, command, tmp_path, capsys) -> None:
    """Of a BERT directory without a vocabulary transformers makes a tokenizer to which every word is unknown."""
    config = (transformers.LlamaConfig if kind == "llama" else transformers.BertConfig)(vocab_size=64, hidden_size=32, num_hidden_layers=1,
                                                                                       num_attention_heads=2, intermediate_size=64)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "m")
    (tmp_path / "text").write_text("a sentence\nanother\n")
    arguments = [part.replace("OUT", str(tmp_path / "out")).replace("TEXT", str(tmp_path / "text")) for part in command]
    assert main([arguments[0], str(tmp_path / "m"), *arguments[1:]]) == 1
    assert f"{tmp_path / 'm'}: has no tokenizer" in capsys.readouterr().err


def test_quiet_commands_say_nothing_on_stderr(dense, tmp_path) -> None:
    """In a process of its own: transformers' progress bars are a setting of the process."""
    out = tmp_path / "out"
    code = f"""
import sys
from rbe_torch.cli import main
for command in (["compress", {str(dense)!r}, {str(out)!r}], ["verify", {str(out)!r}], ["export", {str(out)!r}, "--to", "dense"]):
    assert main([*command, "--quiet"]) == 0
"""
    for part in ("", "main = lambda arguments: __import__('rbe_torch.cli').cli.main(['export', %r, '--to', 'dense', '--force', '--quiet'])" % str(out)):
        done = subprocess.run([sys.executable, "-c", code if not part else f"{part}\nassert main([]) == 0"], capture_output=True, text=True, timeout=120,
                              check=False)
        assert done.returncode == 0 and done.stderr == "", done.stderr


def test_a_model_whose_files_lack_weights_is_refused(tmp_path, capsys) -> None:
    """transformers fills them with random numbers."""
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = transformers.BertForSequenceClassification(config)
    kept = {key: value for key, value in model.state_dict().items() if "intermediate" not in key}
    model.save_pretrained(tmp_path / "m", state_dict=kept)
    assert main(["compress", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]) == 1
    assert "its files lack 2 tensors of a BertForSequenceClassification, 'bert.encoder.layer.0.intermediate.dense.bias'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "m", state_dict={key: value for key, value in model.state_dict().items() if "classifier" not in key})
    assert main(["compress", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]) == 0
    assert "its files lack classifier.bias, classifier.weight" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "reason"), [
    (lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000]), "cannot be loaded as a LlamaForCausalLM"),
    (lambda path: (path / "config.json").write_text("{}"), "config.json: is no configuration that transformers"),
    (lambda path: (path / "config.json").write_text("[]"), "config.json: is no configuration that transformers"),
])  # fmt: skip
def test_a_damaged_model_is_named(dense, tmp_path, change, reason, capsys) -> None:
    shutil.copytree(dense, tmp_path / "m")
    change(tmp_path / "m")
    assert main(["compress", str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]) == 1
    assert (err := capsys.readouterr().err).startswith(f"rbe compress: {tmp_path / 'm'}") and reason in err and err.count("\n") == 1
