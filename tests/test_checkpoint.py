"""save_pretrained and load_pretrained: bit-exact in a fresh process, whole after a kill, and nothing damaged is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear
from rbe_torch.checkpoint import Checkpoint
from rbe_torch.manifest import content_id
from rbe_torch.pack import digest

LAYOUTS = ["rbe22_g8", "rbe32x2_g5", "rbe8x2_g8", "rbe16s_g8", "rbe9r_g7", "rbe2r_g3", "rbe8_g8+int8", "rbe8_g8+fp8", "rbe8_g8+lr2", "rbe8_g8+sp0.2"]


def network(tie: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"emb": nn.Embedding(9, 16), "a": nn.Linear(16, 24), "norm": nn.BatchNorm1d(24), "b": nn.Linear(24, 16, bias=False),
                           "out": nn.Linear(16, 9)})  # fmt: skip
    model["again"] = model["a"]
    if tie:
        model["out"].weight = model["emb"].weight
    return model


def run(model: nn.Module) -> torch.Tensor:
    model.eval()
    return model["out"](model["b"](torch.relu(model["norm"](model["again"](model["emb"](torch.arange(9)))))))


def compressed(layout: str = "rbe22_g8") -> nn.Module:
    """The network with random codes, its tables rounded as compress leaves them; the layer at two places stays one."""
    model = network()
    shared = None
    for name in ("a", "b"):
        old = model[name]
        lin = RBELinear(old.in_features, old.out_features, old.bias is not None, layout, seed=5)
        if shared is not None:
            lin.basis = shared
        shared = lin.basis
        for buffer in ("residual", "residual_scale", "residual_right_scale"):
            tensor = getattr(lin, buffer)
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape) * 3)
        model[name] = lin
    model["again"] = model["a"]
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_process_computes_the_same_bits(layout: str, tmp_path: Path) -> None:
    model = compressed(layout)
    want = run(model)
    rbe_torch.save_pretrained(model, tmp_path / "saved")
    torch.save(want, tmp_path / "want.pt")
    code = (f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import torch, rbe_torch, test_checkpoint as t; m = t.network(); "
            f"torch.manual_seed(9); [p.data.normal_() for p in m.parameters()]; m = rbe_torch.load_pretrained({str(tmp_path / 'saved')!r}, m); "
            f"assert torch.equal(t.run(m), torch.load({str(tmp_path / 'want.pt')!r}))")
    if layout in ("rbe22_g8", "rbe9r_g7"):  # a process takes seconds; the others load here
        subprocess.run([sys.executable, "-c", code], check=True)
    loaded = rbe_torch.load_pretrained(tmp_path / "saved", network())
    assert torch.equal(run(loaded), want)
    for name in ("a", "b"):
        ours, theirs = model[name].state_dict(), loaded[name].state_dict()
        assert list(ours) == list(theirs) and all(ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k]) for k in ours)
    assert loaded["a"].basis is loaded["b"].basis and loaded["again"] is loaded["a"] and loaded["out"].weight is loaded["emb"].weight


def test_files_hold_each_basis_and_each_tied_tensor_once(tmp_path: Path) -> None:
    model = compressed()
    rbe_torch.save_pretrained(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(name.startswith("rbe.basis.") for name in tensors) == 1
    assert tensors["rbe.basis.0"].dtype == tensors["a.gain"].dtype == torch.float16
    assert ("out.weight" in tensors) != ("emb.weight" in tensors) and not any(name.startswith("again.") for name in tensors)
    assert tensors["a.packed"].dtype == torch.uint8 and tensors["a.packed"].shape == model["a"].packed.shape
    layout = model["a"].layout
    stored = sum(t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(("rbe.", "a.packed", "a.gain", "b.packed", "b.gain")))
    assert stored == layout.bytes(24, 16, basis=False) + layout.bytes(16, 24, basis=False) + layout.basis_bytes
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "rbe" and config["version"] == 1 and config["layers"]["a"]["layout"] == "rbe22_g8"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_tables_that_fp16_cannot_hold_are_saved_exactly_with_a_warning(tmp_path: Path) -> None:
    model = compressed()
    model["a"].basis.data.add_(1e-5)
    with pytest.warns(UserWarning, match="finish_training"):
        rbe_torch.save_pretrained(model, tmp_path)
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path, network())), run(model))
    rbe_torch.finish_training(model)
    rbe_torch.save_pretrained(model, tmp_path)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors")["rbe.basis.0"].dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_survive(dtype: torch.dtype, tmp_path: Path) -> None:
    model = compressed().to(dtype)
    model["norm"].float()
    rbe_torch.save_pretrained(model, tmp_path)
    with torch.device("meta"):
        skeleton = network()
    loaded = rbe_torch.load_pretrained(tmp_path, skeleton)
    assert loaded["a"].dtype == loaded["a"].bias.dtype == loaded["emb"].weight.dtype == dtype and loaded["norm"].weight.dtype == torch.float32
    assert torch.equal(loaded["a"].weight, model["a"].weight)


def test_one_layer_alone_can_be_saved(tmp_path: Path) -> None:
    lin = RBELinear(16, 8, layout="rbe9r_g4")
    rbe_torch.save_pretrained(lin, tmp_path)
    loaded = rbe_torch.load_pretrained(tmp_path, nn.Linear(16, 8))
    assert torch.equal(loaded.weight, lin.weight) and torch.equal(loaded.bias, lin.bias)


def test_an_rbe_model_can_be_the_skeleton(tmp_path: Path) -> None:
    model = compressed("rbe8x2_g8")
    rbe_torch.save_pretrained(model, tmp_path)
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path, compressed("rbe9r_g7"))), run(model))


# ---- saving refuses --------------------------------------------------------------------------------------------------------------
def test_saving_refuses_what_would_not_load(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no RBELinear"):
        rbe_torch.save_pretrained(network(), tmp_path / "x")
    model = compressed()
    rbe_torch.prepare_training(model)
    with pytest.raises(ValueError, match="'a' is in training form.*finish_training"):
        rbe_torch.save_pretrained(model, tmp_path / "x")
    model = compressed()
    model["a"].gain.data[3] = float("inf")
    with pytest.raises(ValueError, match="'a' cannot be saved: gain"):
        rbe_torch.save_pretrained(model, tmp_path / "x")
    with pytest.raises(ValueError, match="meta"):
        rbe_torch.save_pretrained(compressed().to("meta"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        rbe_torch.save_pretrained(compressed(), tmp_path / "file")


def test_a_failed_write_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path, monkeypatch) -> None:
    model = compressed()
    rbe_torch.save_pretrained(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        rbe_torch.save_pretrained(compressed("rbe8x2_g8"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_between_the_two_renames_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """The weights are renamed first; config.json of the old ones is then stale, and what the weights' own header says counts."""
    old, new = compressed(), compressed("rbe8x2_g8")
    rbe_torch.save_pretrained(old, tmp_path)
    stale = (tmp_path / "config.json").read_bytes()
    rbe_torch.save_pretrained(new, tmp_path)
    (tmp_path / "config.json").write_bytes(stale)
    assert Checkpoint(tmp_path).config_is_stale
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path, network())), run(new))
    (tmp_path / "config.json").unlink()
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path, network())), run(new))


def test_a_killed_save_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    code = (f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}; import rbe_torch, test_checkpoint as t; "
            f"models = [t.compressed(), t.compressed('rbe8x2_g8')]; print('ready', flush=True)\n"
            f"while True:\n    for m in models: rbe_torch.save_pretrained(m, {str(tmp_path / 'c')!r})")
    results = [run(compressed()), run(compressed("rbe8x2_g8"))]
    rbe_torch.save_pretrained(compressed(), tmp_path / "c")
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            time.sleep(0.05 + 0.013 * attempt)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        got = run(rbe_torch.load_pretrained(tmp_path / "c", network()))
        assert any(torch.equal(got, want) for want in results)


# ---- damage ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    rbe_torch.save_pretrained(compressed(), tmp_path)
    return tmp_path


def refuse(path: Path, text: str = "safetensors|config") -> None:
    """Neither opening, verifying nor loading lets it through, the file is named, and the model stays as it was."""
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=text) as caught:
        rbe_torch.load_pretrained(path, model)
    assert "model.safetensors" in str(caught.value) or "config.json" in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=text):
        Checkpoint(path).verify()


def test_a_file_cut_short_anywhere_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = file.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 9 + header, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        refuse(saved, "not a whole safetensors file")
    file.write_bytes(data + b"\0")
    refuse(saved, "not a whole safetensors file")


def test_any_altered_byte_is_refused(saved: Path) -> None:
    rbe_torch.save_pretrained(compressed("rbe9r_g7"), saved)  # its seed is in the header alone
    file = saved / "model.safetensors"
    data = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    places = [*torch.randint(start, len(data), (40,), generator=generator).tolist(), *torch.randint(0, 8, (4,), generator=generator).tolist(), len(data) - 1]
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        refuse(saved)
    said = what_the_header_says(data[8:start])
    for place in torch.randint(8, start, (80,), generator=generator).tolist():
        changed = data[:place] + bytes([data[place] ^ 0x01]) + data[place + 1 :]
        if what_the_header_says(changed[8:start]) != said:
            file.write_bytes(changed)
            refuse(saved)


def what_the_header_says(header: bytes) -> object:
    """All of it but safetensors' own "format", which is nothing to us."""
    try:
        entries = json.loads(header)
        return {**entries, "__metadata__": [entries["__metadata__"].get(key) for key in ("rbe", "rbe_sha256")]}
    except (ValueError, KeyError):
        return None


@pytest.mark.parametrize("size", [2**63, 2**40, 10**8 + 10, 2])
def test_a_header_of_absurd_length_is_refused(saved: Path, size: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    refuse(saved, "not a whole safetensors file")


def rewrite(path: Path, tensors=None, manifest=None, rehash: bool = True) -> None:
    """Writes the checkpoint anew as an attacker would: changed tensors and manifest, hashes and ids to match."""
    file = path / "model.safetensors"
    with safetensors.safe_open(file, "pt") as handle:
        values = json.loads(handle.metadata()["rbe"])
        data = {name: handle.get_tensor(name) for name in handle.keys()}
    if tensors is not None:
        tensors(data)
    if rehash:
        values["hashes"] = {name: digest(tensor) for name, tensor in data.items()}
    if manifest is not None:
        values = manifest(values) or values
    if isinstance(values, dict) and isinstance(values.get("layers"), dict) and isinstance(values.get("hashes"), dict):
        config = {"quantization_config": {"quant_method": "rbe", "version": values.get("version"), "id": content_id(values["layers"], values["hashes"]),
                                          "layers": values["layers"]}}
        (path / "config.json").write_text(json.dumps(config))
    text = values if isinstance(values, str) else json.dumps(values)
    safetensors.torch.save_file(data, file, {"format": "pt", "rbe": text, "rbe_sha256": hashlib.sha256(text.encode()).hexdigest()})


def put(name: str, change):
    return lambda data: data.__setitem__(name, change(data[name]).contiguous())


@pytest.mark.parametrize(
    "change, text",
    [
        (put("a.packed", lambda t: t[:-1]), r"'a.packed' is uint8 \(23, 6\), must be uint8 \(24, 6\)"),
        (put("a.packed", lambda t: t.to(torch.int8)), "'a.packed' is int8"),
        (put("a.packed", lambda t: t | 0xF0), "layer 'a': codes: .*padding"),
        (put("a.gain", lambda t: t * float("nan")), "layer 'a': gain: .*not finite"),
        (put("a.gain", lambda t: -t), "layer 'a': gain: .*not positive"),
        (put("a.gain", lambda t: t.double()), "'a.gain' is F64"),
        (put("a.bias", lambda t: t[:-1]), "layer 'a': bias"),
        (put("rbe.basis.0", lambda t: t[:, :255]), "'rbe.basis.0' is float16"),
        (put("rbe.basis.0", lambda t: t / 0), "basis: .*not finite"),
        (put("norm.weight", lambda t: t[:-1]), "'norm.weight': has shape"),
        (lambda data: data.pop("b.gain"), "'b.gain' is missing"),
        (lambda data: data.pop("a.bias"), "'again.bias' shares tensor 'a.bias', which is not there"),
        (lambda data: data.pop("norm.weight"), "missing .*norm.weight"),
        (lambda data: data.update({"norm.extra": torch.zeros(1)}), "unexpected .*norm.extra"),
        (lambda data: data.update({"rbe.basis.7": torch.zeros(1)}), "'rbe.basis.7' is the basis of no layer"),
        (lambda data: data.update({"b.bias": torch.zeros(16)}), "'b.bias' does not belong"),
        (lambda data: data.update({"b.weight": torch.zeros(16)}), "'b.weight' does not belong"),
    ],
)
def test_hostile_tensors_are_refused(saved: Path, change, text: str) -> None:
    rewrite(saved, tensors=change)
    model = network()
    with pytest.raises(ValueError, match=text) as caught:
        rbe_torch.load_pretrained(saved, model)
    assert "model.safetensors" in str(caught.value) and type(model["a"]) is nn.Linear


def edit(layer: str, **changes):
    def apply(values: dict) -> None:
        values["layers"][layer].update(changes)

    return apply


@pytest.mark.parametrize(
    "change, text",
    [
        (edit("a", layout="rbe32_g8"), "'a.packed' is uint8"),
        (edit("a", layout="rbe99_g8"), "layer 'a': layout"),
        (edit("a", layout="rbe9r_g8", seed=3), "'a.packed'"),
        (edit("a", layout="rbe9r_g8"), "has no seed"),
        (edit("a", seed=1), "has a seed"),
        (edit("a", in_features=2**62), "in_features is"),
        (edit("a", in_features=-16), "in_features is -16"),
        (edit("a", in_features=16.0), "in_features is 16.0"),
        (edit("a", in_features=15), "in_features=16 .* 15 and 24"),
        (edit("a", out_features=2**31 - 1), "'a.packed' is"),
        (edit("a", basis=1), "'rbe.basis.1' is missing"),
        (edit("a", basis=-1), "basis is -1"),
        (edit("a", dtype="float8_e4m3fn"), "dtype is"),
        (edit("a", dtype="__class__"), "dtype is"),
        (edit("a", bias=0), "bias is 0"),
        (edit("a", evil=1), "has the entries"),
        (lambda v: v["layers"].update({"../../etc": v["layers"].pop("b")}), "'../../etc.packed' is missing"),
        (lambda v: v["layers"].update({"norm": {"same_as": "a"}}), "layer 'norm': is a BatchNorm1d"),
        (lambda v: v["layers"].update({"nowhere": {"same_as": "a"}}), "layer 'nowhere': the model has no such module"),
        (lambda v: v["layers"].update({"again": {"same_as": "again"}}), "same as"),
        (lambda v: v["layers"].update({"a": []}), "layer 'a': is a list"),
        (lambda v: v.update(version=2), "is of version 2; this rbe_torch reads version 1"),
        (lambda v: v.update(version="1"), "no version"),
        (lambda v: v.update(layers={}), "no layers"),
        (lambda v: v.update(layers=[1]), "layers is a list"),
        (lambda v: v.update(aliases={"out.weight": "nothing"}), "'out.weight' shares"),
        (lambda v: v.update(aliases={"out.weight": 3}), "aliases must be strings"),
        (lambda v: v["hashes"].pop("a.gain") and None, "hashes differ"),
        (lambda v: v["hashes"].update({"a.gain": "0" * 64}), "was altered"),
        (lambda v: "[" * 100000, "not JSON|no version"),
        (lambda v: "{}", "no version"),
        (lambda v: "not json", "not JSON"),
    ],
)
def test_hostile_manifests_are_refused(saved: Path, change, text: str) -> None:
    rewrite(saved, manifest=change)
    refuse_or_misfit(saved, text)


def refuse_or_misfit(path: Path, text: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=text) as caught:
        rbe_torch.load_pretrained(path, model)
    assert "model.safetensors" in str(caught.value) and type(model["a"]) is nn.Linear


def test_a_safetensors_file_of_someone_else_is_refused(saved: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(2)}, saved / "model.safetensors")
    refuse(saved, "was not written by rbe_torch")


def test_an_altered_config_is_refused_and_other_keys_are_not(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "label": "mine"}))
    Checkpoint(saved).verify()
    config["quantization_config"]["layers"]["a"]["layout"] = "rbe32_g8"
    path.write_text(json.dumps(config))
    refuse(saved, "config.json: was altered")
    for text in ("{", "[]", "[" * 100000):
        path.write_text(text)
        refuse(saved, "config.json")


def test_what_is_missing_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        rbe_torch.load_pretrained(tmp_path / "nowhere", network())
    with pytest.raises(ValueError, match="model: is None.*ModuleDict"):
        rbe_torch.load_pretrained(saved)
    other = network()
    del other["b"]
    with pytest.raises(ValueError, match="layer 'b': the model has no such module"):
        rbe_torch.load_pretrained(saved, other)
    other = network(tie=False)
    assert torch.equal(run(rbe_torch.load_pretrained(saved, other)), run(compressed()))
