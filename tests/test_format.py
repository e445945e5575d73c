"""The format: docs/format.md's vectors bit for bit, on the C operators and on the torch reference; encoding against brute force."""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import make_case, split

import rbe_torch  # noqa: F401  registers the operators
from rbe_torch import reference

ROOT = Path(__file__).resolve().parent.parent
SEED_OF_IDX_0 = 133  # gives idx 0 to the first code of a layer


def rows(columns: int, first: str, second: str = "") -> list[list[str]]:
    """The rows of docs/format.md's tables whose first cells start with `first` and, minus signs aside, `second`."""
    lines = (ROOT / "docs" / "format.md").read_text().partition("## Test vectors")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [row for row in cells if len(row) == columns and row[0].startswith(first) and row[1].lstrip("-").startswith(second)]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_documented_scales_are_bit_exact():
    vectors = rows(3, "rbe")
    assert len(vectors) == 17
    for field, word, scale in vectors:
        words = torch.tensor([[[signed(int(word, 16))]]], dtype=torch.int32)
        keywords = {"layout": f"{field}_g1", "in_features": 1, "seed": SEED_OF_IDX_0 if field.endswith("r") else 0}
        got = torch.ops.rbe.decode(words, torch.ones(1, 256, 1), torch.ones(1), **keywords)
        assert got.item() == float.fromhex(scale), (field, word)
        assert reference.decode(words, torch.ones(1, 256, 1), torch.ones(1), **keywords).item() == float.fromhex(scale), (field, word)


def test_documented_curve_table_is_the_data_and_the_formulas():
    (documented,) = re.findall(r"^`([0-9a-f]{64})`", (ROOT / "docs" / "format.md").read_text(), re.MULTILINE)
    data = (ROOT / "kernels" / "curve_table.c").read_text().partition("] = {")[2]
    values = [float.fromhex(number) for number in re.findall(r"(-?0x1\.[0-9a-f]+p[+-]\d+|\b0\.0)f", data)]
    assert len(values) == 32 * 257
    for table in (values, reference.curve_table().flatten().tolist()):
        assert hashlib.sha256(struct.pack(f"<{len(table)}f", *table)).hexdigest() == documented


def test_documented_amplitudes_round_to_the_documented_words():
    vectors = rows(4, "rbe", second="0x")
    assert len(vectors) == 15
    for field, amplitude, word, _ in vectors:
        keywords = {"layout": f"{field}_g1", "in_features": 1, "seed": SEED_OF_IDX_0 if field.endswith("r") else 0}
        value = torch.full((1, 1, 1), float.fromhex(amplitude), dtype=torch.float32)
        assert value.item() == float.fromhex(amplitude)
        start, made = (torch.tensor([[[signed(w)]]], dtype=torch.int32) for w in ({"rbe4r": 0x140010, "rbe2r": 0x140040}.get(field, 0x1C0000), int(word, 16)))
        want = reference.scale(made, field).item()
        for decode in (torch.ops.rbe.decode, reference.decode):
            assert decode(start, torch.ones(1, 256, 1), torch.ones(1), value, **keywords).item() == want, (field, amplitude)


def test_documented_seeds_give_the_documented_idx():
    vectors = [[int(cell) for cell in row] for row in rows(7, "") if row[0].isdigit()]
    assert len(vectors) == 4
    for seed, i, k, s, groups, stages, idx in vectors:
        keywords = {"layout": f"rbe9rx{stages}_g1", "in_features": groups, "seed": seed, "row0": i, "k0": k}
        packed = torch.zeros(1, -(-9 * stages // 8), dtype=torch.uint8)
        for side in (torch.ops.rbe, reference):
            assert side.unpack(packed, **keywords)[0, 0, s].item() >> 10 & 255 == idx


def test_documented_rows_pack_to_the_documented_bytes():
    vectors = [row for row in rows(4, "rbe") if row[1].isdigit()]
    assert len(vectors) == 8
    for layout, seed, words, data in vectors:
        stages = split(layout)[1]
        codes = torch.tensor([signed(int(word, 16)) for word in words.split()], dtype=torch.int32).reshape(1, -1, stages)
        keywords = {"layout": layout, "in_features": split(layout)[2] * codes.shape[1], "seed": int(seed)}
        packed = torch.tensor([list(bytes.fromhex(data))], dtype=torch.uint8)
        for side in (torch.ops.rbe, reference):
            assert torch.equal(side.pack(codes, **keywords), packed), layout
            assert torch.equal(side.unpack(packed, **keywords), codes), layout


def test_documented_rows_interleave_to_the_documented_bytes():
    ((packed, interleaved),) = [row for row in rows(2, "") if row[0][:1].isdigit()]
    codes = torch.tensor([list(bytes.fromhex(row)) for row in packed.split()], dtype=torch.uint8)
    columns = torch.tensor([list(bytes.fromhex(column)) for column in interleaved.split()], dtype=torch.uint8)
    got = torch.ops.rbe.interleave(codes)
    assert got.shape == (1, codes.shape[1], 64) and torch.equal(got[0, :, : columns.shape[1]], columns)
    assert not got[0, :, columns.shape[1] :].any()


@pytest.mark.parametrize("field", ["rbe22", "rbe32"])
def test_every_curve_decodes_alike_in_c_and_torch(field):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (64, 512, 1), generator=generator)
    words = (words & (0x3FFFFF if field == "rbe22" else -1)).to(torch.int32)
    basis, gain, keywords = torch.ones(1, 256, 1), torch.ones(64), {"layout": f"{field}_g1", "in_features": 512}
    assert torch.equal(torch.ops.rbe.decode(words, basis, gain, **keywords), reference.decode(words, basis, gain, **keywords))


def test_generated_curve_table_is_the_checked_in_one():
    pytest.importorskip("mpmath")
    done = subprocess.run(
        [sys.executable, ROOT / "kernels" / "generate_curves.py", "--check"], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("layout", ["rbe22_g3", "rbe9r_g3", "rbe4r_g3", "rbe2r_g2", "rbe8_g4", "rbe16s_g8"])
def test_one_stage_encoding_is_the_joint_minimum(layout):
    case = make_case(layout, 2, 7, (), torch.float64, seed=9)
    weight = torch.randn(2, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = torch.ops.rbe.encode(weight, case.basis, case.gain, **case.keywords)
    want = reference.encode(weight, case.basis, case.gain, **case.keywords)
    assert torch.equal(got, want)


def test_encoding_refuses_what_is_not_finite():
    case = make_case("rbe22_g8")
    weight = torch.randn(5, 19)
    weight[3, 7] = float("nan")
    with pytest.raises(RuntimeError, match=r"weight: element \[3, 7\]"):
        torch.ops.rbe.encode(weight, case.basis, case.gain, **case.keywords)


@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe22x2_g8", "rbe16sx2_g8"])
def test_more_stages_never_encode_worse(layout):
    fields, _, group = layout.partition("x2")
    case = make_case(layout, 16, 64, ())
    weight, gain = torch.randn(16, 64), torch.ones(16)
    one = torch.ops.rbe.encode(weight, case.basis[:1], gain, layout=fields + group, in_features=64)
    two = torch.ops.rbe.encode(weight, case.basis, gain, **case.keywords)
    first = torch.ops.rbe.decode(one, case.basis[:1], gain, layout=fields + group, in_features=64)
    both = torch.ops.rbe.decode(two, case.basis, gain, **case.keywords)
    assert (weight - both).square().sum() < (weight - first).square().sum()
