"""A basis from a seed: the same on every machine, never trained, stored as the seed, and stored in full as soon as it is another table."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear
from rbe_torch.checkpoint import Checkpoint
from rbe_torch.seeded import seeded_basis


def network(basis: str = "seeded", layout: str = "rbe9r_g8", seed: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    rbe_torch.convert(model, layout, seed=seed, basis=basis)
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def step(model: nn.Module, steps: int = 3) -> nn.Module:
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model))
    for _ in range(steps):
        optimiser.zero_grad()
        model(torch.ones(4, 16)).square().mean().backward()
        optimiser.step()
    return model


def test_the_table_is_the_one_of_the_format() -> None:
    """Written out once more, from docs/format.md alone."""
    wrap, seed, layout = 0xFFFFFFFF, 0xFEDCBA98, rbe_torch.Layout.parse("rbe22x2_g3")
    want = []
    for c in range(2 * 256 * 3):
        h = (seed + 0x9E3779B9 * (c + 1)) & wrap
        h = ((h ^ h >> 16) * 0x85EBCA6B) & wrap
        h = ((h ^ h >> 13) * 0xC2B2AE35) & wrap
        want.append(-1.0 if (h ^ h >> 16) >> 31 else 1.0)
    assert seeded_basis(layout, seed).flatten().tolist() == want


@pytest.mark.parametrize("basis, trained", [("trained", True), ("frozen", False), ("seeded", False)])
def test_what_is_frozen_is_not_trained(basis: str, trained: bool) -> None:
    model = network(basis)
    before = model[0].basis.detach().clone()
    groups = {group["name"] for group in rbe_torch.param_groups(model)}
    step(model)
    assert torch.equal(model[0].basis, before) != trained and ("basis" in groups) == trained


def test_a_seeded_basis_is_stored_as_its_seed_and_comes_back(tmp_path: Path) -> None:
    model = rbe_torch.finish_training(step(network()))
    want = model(torch.ones(2, 16))
    rbe_torch.save_pretrained(model, tmp_path / "one")
    assert not [name for name in Checkpoint(tmp_path / "one").shapes if name.startswith("rbe.basis")]
    loaded = rbe_torch.load_pretrained(tmp_path / "one", plain())
    assert torch.equal(loaded(torch.ones(2, 16)), want) and loaded[0].basis is loaded[2].basis
    rbe_torch.prepare_training(loaded)
    assert not loaded[0].basis.requires_grad
    rbe_torch.save_pretrained(rbe_torch.finish_training(loaded), tmp_path / "two")
    assert Checkpoint(tmp_path / "two").manifest.id == Checkpoint(tmp_path / "one").manifest.id  # the hash of everything there is


def test_a_seeded_basis_that_was_trained_is_stored_in_full(tmp_path: Path) -> None:
    model = rbe_torch.prepare_training(rbe_torch.finish_training(network()), basis="trained")
    rbe_torch.finish_training(step(model))
    rbe_torch.save_pretrained(model, tmp_path)
    assert [name for name in Checkpoint(tmp_path).shapes if name.startswith("rbe.basis")] == ["rbe.basis.0"]
    assert torch.equal(rbe_torch.load_pretrained(tmp_path, plain())(torch.ones(2, 16)), model(torch.ones(2, 16)))


def test_the_report_counts_the_seed_alone() -> None:
    torch.manual_seed(0)
    seeded, stored = (rbe_torch.convert(plain(), "rbe9r_g8", basis=basis) for basis in ("seeded", "frozen"))
    assert seeded.basis_bytes == 4 and stored.basis_bytes == 2 * 256 * 8


def test_a_state_of_another_seed_loads_with_its_basis() -> None:
    first, second = network(seed=3), network(seed=4)
    assert not torch.equal(first[0].basis, second[0].basis)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(torch.ones(2, 16)), first(torch.ones(2, 16))) and int(second[0].basis_seed) == int(first[0].basis_seed)


def test_a_layer_takes_a_seed_alone() -> None:
    lin = RBELinear(16, 8, layout="rbe22_g4", basis_seed=5)
    assert torch.equal(lin.basis, seeded_basis("rbe22_g4", 5)) and not lin.basis.requires_grad


def test_a_layer_made_on_the_meta_device_draws_its_basis_when_it_is_reset() -> None:
    lin = RBELinear(16, 8, layout="rbe22_g4", basis_seed=5, device="meta").to_empty(device="cpu")
    lin.basis_seed.fill_(-7)  # whatever the memory held
    lin.reset_parameters()
    assert torch.equal(lin.basis, seeded_basis("rbe22_g4", 5)) and int(lin.basis_seed) == 5


@pytest.mark.parametrize("change, text", [
    ({"basis_seed": -1}, "basis_seed is -1"), ({"basis_seed": 2**32}, "basis_seed is 4294967296"), ({"basis_seed": "5"}, "basis_seed is '5'"),
    ({"basis_seed": 6}, "basis 0 is another layer's"), ({"basis": 1}, None),
])  # fmt: skip
def test_hostile_manifests_are_refused(change: dict, text: str | None, tmp_path: Path) -> None:
    import hashlib

    rbe_torch.save_pretrained(rbe_torch.finish_training(network()), tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    manifest = json.loads(header["__metadata__"]["rbe"])
    manifest["layers"]["2"].update(change)
    header["__metadata__"]["rbe"] = json.dumps(manifest, sort_keys=True)
    header["__metadata__"]["rbe_sha256"] = hashlib.sha256(header["__metadata__"]["rbe"].encode()).hexdigest()
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size:])
    if text is None:  # another number for the same table is no harm
        rbe_torch.load_pretrained(path, plain())
        return
    with pytest.raises(ValueError, match=text):
        rbe_torch.load_pretrained(path, plain())


@pytest.mark.parametrize("call", [lambda: network("fixed"), lambda: rbe_torch.prepare_training(network(), basis="seeded")])
def test_an_unknown_choice_is_named(call) -> None:
    with pytest.raises(ValueError, match="basis: is '"):
        call()


@pytest.mark.parametrize("layout, basis, said", [("rbe8x2_g8", "seeded", True), ("rbe16s_g8", "frozen", True), ("rbe8x2_g8", "trained", False), ("rbe4r_g8", "seeded", False)])
def test_a_choice_that_leaves_almost_nothing_to_train_is_said(layout: str, basis: str, said: bool) -> None:
    report = str(rbe_torch.convert(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), layout, basis=basis))
    assert ("gains and biases alone are trained" in report) == said and "lose most" not in report
