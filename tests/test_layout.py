"""Layout: refuses what the C parser refuses, and counts the bytes that a layer's tensors really take."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rbe_torch
from rbe_torch import Layout
from rbe_torch.layout import FIELD_BITS

GOOD = {
    "rbe22_g64": ("rbe22", 64, 1, None), "rbe8x2_g8": ("rbe8", 8, 2, None), "rbe8x16_g1": ("rbe8", 1, 16, None),
    "rbe16s_g8": ("rbe16s", 8, 1, None), "rbe9r_g65536": ("rbe9r", 65536, 1, None), "rbe4rx3_g5": ("rbe4r", 5, 3, None), "rbe2r_g2": ("rbe2r", 2, 1, None), "rbe32_g3+int8": ("rbe32", 3, 1, "int8"),
    "rbe8x2_g8+fp8": ("rbe8", 8, 2, "fp8"), "rbe8_g8+lr8": ("rbe8", 8, 1, "lr8"), "rbe8_g8+sp0.005": ("rbe8", 8, 1, "sp0.005"),
}
BAD = [
    "", "rbe", "rbe22", "rbe22_g", "rbe22_g0", "rbe22_g-1", "rbe22_g064", "rbe22_g65537", "rbe22_g99999999999999999999", "rbe22x0_g8", "rbe22x17_g8",
    "rbe22x_g8", "rbe22x02_g8", "rbe16s_g16", "rbe16_g8", "rbe8r_g8", "rbe3r_g8", "RBE22_g64", " rbe22_g64", "rbe22_g64 ", "rbe22_g64\n", "rbe22_g64\0", "rbe22-g64",
    "rbe22_g64+", "rbe22_g64+int4", "rbe22_g64+int8+fp8", "rbe22_g64+lr", "rbe22_g64+lr0", "rbe22_g64+lr65536", "rbe22_g64+sp", "rbe22_g64+sp0", "rbe22_g64+sp0.0",
    "rbe22_g64+sp1", "rbe22_g64+sp1.0", "rbe22_g64+sp.5", "rbe22_g64+sp0.", "rbe22_g64+sp5e-3", "rbe22_g64+sp-0.1", "rbe22_g64+spnan", "rbe22_g٣",
    "rbe22_g64+sp0.0000000000000001",
]  # fmt: skip


def c_parser_accepts(text: str) -> bool:
    """Whether the operators read the layout: any other complaint is about something else."""
    try:
        torch.ops.rbe.unpack(torch.zeros(1, 1, dtype=torch.uint8), layout=text, in_features=1)
    except RuntimeError as error:
        return not str(error).startswith("rbe::unpack: layout: ")
    return True


def python_accepts(text: str) -> bool:
    try:
        Layout.parse(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("text", GOOD)
def test_good_layouts_are_read_and_printed_back(text: str) -> None:
    layout = Layout.parse(text)
    assert (layout.fields, layout.group, layout.stages, layout.residual) == GOOD[text]
    assert str(layout) == text and Layout.parse(layout) is layout
    assert layout.bits == FIELD_BITS[layout.fields]
    assert pickle.loads(pickle.dumps(layout)) == layout and hash(layout) == hash(Layout.parse(text))
    assert c_parser_accepts(text)


def test_one_stage_has_one_spelling() -> None:
    assert Layout.parse("rbe8x1_g8") == Layout.parse("rbe8_g8") and str(Layout.parse("rbe8x1_g8")) == "rbe8_g8"


@pytest.mark.parametrize("text", BAD)
def test_bad_layouts_are_refused_by_name_here_and_in_c(text: str) -> None:
    with pytest.raises(ValueError, match="layout:"):
        Layout.parse(text)
    assert not c_parser_accepts(text)


pieces = st.sampled_from(["rbe8", "rbe22", "rbe32", "rbe16s", "rbe9r", "rbe4r", "rbe2r", "rbe", "x", "x2", "x1", "x16", "x17", "_g", "_g8", "_g64", "_g0", "0", "1", "8", "+int8", "+fp8",
                          "+lr", "+lr8", "+sp", "+sp0.5", "0.", ".", "+", "e", " "])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(st.lists(pieces, max_size=5).map("".join))
def test_python_and_c_accept_the_same_strings(text: str) -> None:
    assert python_accepts(text) == c_parser_accepts(text)


@pytest.mark.parametrize("value", [None, 8, b"rbe22_g64"])
def test_what_is_no_string_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="layout"):
        Layout.parse(value)


@pytest.mark.parametrize("fields", [("rbe22", 0), ("rbe22", 8, 0), ("rbe16s", 16), ("rbe22", 8, 1, "int4"), ("rbe22", "8"), ("rbe22", 8, True)])
def test_a_layout_cannot_be_made_invalid(fields: tuple) -> None:
    with pytest.raises(ValueError, match="layout"):
        Layout(*fields)


@pytest.mark.parametrize("text", GOOD)
@pytest.mark.parametrize("m, n", [(1, 1), (5, 13), (16, 64)])
def test_bytes_are_those_of_the_tensors(text: str, m: int, n: int) -> None:
    layout = Layout.parse(text)
    lin = rbe_torch.RBELinear(n, m, bias=False, layout="rbe9r_g64" if layout.group > 4096 else layout)
    layout = lin.layout
    taken = sum(b.numel() * b.element_size() for b in lin.buffers()) + 2 * m  # packed, residual, seed; gain in fp16
    assert layout.bytes(m, n, basis=False) == taken
    assert layout.bytes(m, n) == taken + 2 * lin.basis.numel()
    assert layout.bits_per_weight(m, n) == pytest.approx(8 * (taken + 2 * lin.basis.numel()) / (m * n))
    assert layout.bits_per_weight(m, n, basis_shared_by=4) == pytest.approx(8 * (taken + lin.basis.numel() / 2) / (m * n))


@pytest.mark.parametrize("n, kept", [(1, 1), (30, 2), (49, 2), (50, 2), (51, 3), (70, 4)])
def test_a_sparse_residual_keeps_as_many_entries_here_and_in_c(n: int, kept: int) -> None:
    """Halves (0.05 * 30, 50 and 70) go to even."""
    lin = rbe_torch.RBELinear(n, 3, layout="rbe8_g8+sp0.05")
    assert lin.residual_right.shape == (3, kept)
    lin.residual.fill_(8.0)
    assert int((lin.weight.abs() > 4).sum()) == 3 * kept


def test_codes_of_a_large_layer_cost_bits_times_stages_over_group() -> None:
    exact = 22 / 128
    assert Layout.parse("rbe22_g128").bits_per_weight(2**20, 2**20) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("arguments", [(0, 8), (8, 0), (8, 8, 0)])
def test_bits_per_weight_refuses_nothing_to_count(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="bits_per_weight"):
        Layout.parse("rbe8_g8").bits_per_weight(*arguments)
