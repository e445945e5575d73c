"""Compressing from shards. Risks: a result that differs from compress, a kill that loses or spoils work, parts of another run mixed in,
memory that grows
with the model, damaged shards read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rbe_torch
from rbe_torch import models, shards, stream
from rbe_torch.cli import main
from rbe_torch.linear import RBELinear

transformers = pytest.importorskip("transformers")

LAYOUT = "rbe16s_g8"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A BERT with a tied head in several shards."""
    path = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=100, max_position_embeddings=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """What a run that nothing disturbs writes."""
    target = tmp_path_factory.mktemp("whole")
    stream.compress_checkpoint(source, target, LAYOUT, progress=False)
    return target


def test_it_is_what_compress_makes_in_memory(source, whole):
    model = models.load_dense(source)
    rbe_torch.compress(model, LAYOUT, progress=False)
    loaded = rbe_torch.load_pretrained(whole)
    expected, got = model.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert not (whole / stream.PARTS).exists()


def start(source: Path, target: Path, *arguments: str) -> subprocess.Popen:
    slow = (
        "import sys, time\nfrom rbe_torch import stream\ntrue = stream._encode\n"
        "def slow(*a):\n    time.sleep(0.15)\n    true(*a)\nstream._encode = slow\n"
        f"stream.compress_checkpoint(sys.argv[1], sys.argv[2], '{LAYOUT}', progress=False)\n"
    )
    return subprocess.Popen([sys.executable, *arguments, "-c", slow, str(source), str(target)], env={**os.environ, "OMP_NUM_THREADS": "1"})


def parts_of(target: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_mtime_ns for path in (target / stream.PARTS).glob("*.safetensors") if path.name != "basis.safetensors"
    }


def test_a_kill_in_the_middle_loses_no_finished_layer(source, whole, tmp_path):
    process = start(source, tmp_path)
    deadline = time.monotonic() + 100
    while len(parts_of(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = parts_of(tmp_path)
    assert 4 <= len(before) < 20 and not (tmp_path / "model.safetensors").exists()
    facts = stream.compress_checkpoint(source, tmp_path, LAYOUT, progress=False)
    assert facts["finished_before"] == len(before) and facts["encoded"] == facts["layers"] - len(before)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_processes_share_the_layers_and_write_the_same_file(source, whole, tmp_path):
    program = tmp_path / "run.py"
    program.write_text(
        f"import sys\nfrom rbe_torch.stream import compress_checkpoint\nfacts = compress_checkpoint(sys.argv[1], sys.argv[2], '{LAYOUT}', progress=False)\n"
        "assert facts['processes'] == 2 and 0 < facts['encoded'] < facts['layers'], facts\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--master-port=29611",
            str(program),
            str(source),
            str(tmp_path / "out"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(rbe_torch.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """A Llama, whose rotary frequencies are in no file, in several shards."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def test_calibrated_it_is_what_compress_makes_in_memory_also_after_a_kill(decoder, tmp_path, monkeypatch):
    model = models.load_dense(decoder)
    rbe_torch.compress(model, LAYOUT, calibration=batches(), progress=False)
    true, count = stream._write_part, []

    def failing(*arguments):
        count.append(1)
        if len(count) > 9:
            raise KeyboardInterrupt
        true(*arguments)

    monkeypatch.setattr(stream, "_write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        stream.compress_checkpoint(decoder, tmp_path / "out", LAYOUT, calibration=batches(), progress=False)
    monkeypatch.undo()
    facts = stream.compress_checkpoint(decoder, tmp_path / "out", LAYOUT, calibration=batches(), progress=False)
    assert facts["finished_before"] == 9 and facts["encoded"] == facts["layers"] - 9
    expected, got = model.state_dict(), rbe_torch.load_pretrained(tmp_path / "out").state_dict()
    assert expected.keys() == got.keys() and all(torch.equal(expected[key], got[key]) for key in expected)


def test_calibrated_only_one_block_is_in_memory(decoder, tmp_path, monkeypatch):
    seen, true = [], stream._write_part

    def watching(part, tensors):
        held = [
            name
            for name, module in kept[0].named_modules()
            if isinstance(module, torch.nn.Linear) and not module.weight.is_meta and ".layers." in name
        ]
        seen.append({name.split(".")[2] for name in held})
        true(part, tensors)

    kept, make = [], stream.skeleton
    monkeypatch.setattr(stream, "skeleton", lambda config: kept.append(make(config)) or kept[0])
    monkeypatch.setattr(stream, "_write_part", watching)
    stream.compress_checkpoint(decoder, tmp_path, LAYOUT, calibration=batches(), progress=False)
    assert len(seen) == 21 and max(map(len, seen)) == 1


def test_calibrated_layers_outside_the_blocks_are_refused(decoder, tmp_path):
    with pytest.raises(ValueError, match="lm_head: lies outside"):
        stream.compress_checkpoint(decoder, tmp_path, LAYOUT, include=["lm_head", "layers"], calibration=batches(), progress=False)


def test_parts_of_another_run_are_refused(source, tmp_path):
    parts = tmp_path / stream.PARTS
    parts.mkdir()
    (parts / "job.json").write_text(json.dumps({"layout": "rbe8_g8"}))
    with pytest.raises(ValueError, match="another model, layout, seed"):
        stream.compress_checkpoint(source, tmp_path, LAYOUT, progress=False)


def test_a_weight_that_is_not_finite_is_named(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    place = shards.Shards(copy).places["bert.encoder.layer.1.output.dense.weight"]
    with open(place.file, "r+b") as file:
        file.seek(place.begin)
        file.write(b"\x00\x00\xc0\x7f")
    with pytest.raises(ValueError, match="bert.encoder.layer.1.output.dense: weight: has 1 value"):
        stream.compress_checkpoint(copy, tmp_path / "out", LAYOUT, progress=False)


@pytest.mark.parametrize("damage", ["shorten", "header", "absent", "index"])
def test_damaged_shards_are_refused_by_name(source, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    victim = sorted(copy.glob("model-*.safetensors"))[1]
    if damage == "shorten":
        victim.write_bytes(victim.read_bytes()[:-10])
    elif damage == "header":
        victim.write_bytes(b"\xff" * 8 + victim.read_bytes()[8:])
    elif damage == "absent":
        victim.unlink()
    else:
        victim = copy / shards.INDEX_FILE
        victim.write_text('{"weight_map": {"x": "../y"}}')
    with pytest.raises(ValueError, match=victim.name):
        stream.compress_checkpoint(copy, tmp_path / "out", LAYOUT, progress=False)


def test_shards_that_do_not_fit_the_configuration_are_refused(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 104}))
    with pytest.raises(ValueError, match="shape"):
        stream.compress_checkpoint(copy, tmp_path / "out", LAYOUT, progress=False)


def test_written_files_are_safetensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {
        "a": torch.arange(5, dtype=torch.uint8),
        "b": torch.randn(3, 4),
        "c": torch.empty(0, 2),
        "d": torch.randn(3).half(),
        "e": torch.ones((), dtype=torch.int64),
    }
    shards.write_tensors(
        tmp_path / "x.safetensors", [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()], {"k": "v"}
    )
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    places, metadata = shards.read_header(tmp_path / "x.safetensors")
    assert metadata == {"k": "v"} and all(torch.equal(shards.read_tensor(places[name]), tensor) for name, tensor in tensors.items())


def test_the_command_line_streams(source, tmp_path, capsys):
    assert main(["compress", str(source), str(tmp_path / "out"), "--stream", "--layout", LAYOUT, "--quiet", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    loaded = rbe_torch.load_pretrained(tmp_path / "out")
    assert facts["layers"] == sum(isinstance(module, RBELinear) for module in loaded.modules())
    assert main(["compress", str(source), str(tmp_path / "two"), "--stream", "--bits", "2"]) == 2
    assert "--stream" in capsys.readouterr().err
