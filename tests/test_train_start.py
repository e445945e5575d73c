"""Where training starts: variance through depth, a low-rank term beside frozen codes, and peft's LoRA attached, trained and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear
from rbe_torch.lowrank import lowrank_of, merge_lowrank

DEPTH = 24
KEPT = 6.0  # the variance after 24 layers over the one before; nn.Linear's initialisation leaves 3^-24 = 4e-12
INT8 = 0.02  # of the largest entry of a product of rank 4


# ---- variance through depth --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("nonlinearity, layout", [
    *(("relu", layout) for layout in ("rbe22_g64", "rbe9r_g16", "rbe4r_g8", "rbe2r_g4")),
    *(("linear", layout) for layout in ("rbe22_g64", "rbe9r_g16", "rbe4r_g8", "rbe2r_g4", "rbe8x2_g8")),
])  # fmt: skip
def test_activations_and_gradients_keep_their_variance_through_depth(layout: str, nonlinearity: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256, bias=False) for _ in range(DEPTH)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU() if nonlinearity == "relu" else nn.Identity())))
    rbe_torch.convert(model, layout, seed=1, basis="seeded", nonlinearity=nonlinearity)
    x = torch.randn(64, 256, requires_grad=True)
    y = model(x)
    dy = torch.randn(64, 256)
    y.backward(dy)
    for got, start in ((y.detach(), x.detach()), (x.grad, dy)):
        ratio = float(got.square().mean() / start.square().mean())
        assert 1 / KEPT < ratio < KEPT


def test_the_gains_of_fan_out_keep_gradients_in_a_narrowing_layer() -> None:
    lin = RBELinear(512, 128, bias=False, layout="rbe22_g16", seed=1)
    rbe_torch.keep_variance(lin, mode="fan_out")
    assert float(lin.weight.square().sum() / 512) == pytest.approx(1.0, rel=1e-2)
    assert lin.weight.square().sum(1).sub(4).abs().max() < 0.02  # every row the same: 512 / 128


def test_a_row_drawn_with_almost_nothing_in_it_gets_no_huge_gain() -> None:
    """Rows of one code each, some of amplitude 0: their gain was 65504, and training them ended beyond fp16."""
    lin = RBELinear(64, 512, bias=False, layout="rbe22_g128", seed=1)
    rbe_torch.keep_variance(lin, "relu")
    assert float(lin.gain.max()) <= 4.01 * float(lin.gain.median())


@pytest.mark.parametrize("layout", ["rbe22_g64", "rbe32_g16", "rbe9r_g16", "rbe4r_g9", "rbe2r_g4", "rbe8x2_g8", "rbe16s_g8"])
@pytest.mark.parametrize("init_scale", [0.4, 0.05])
def test_a_small_start_makes_weights_as_small_as_it_says_by_the_amplitudes(layout: str, init_scale: float) -> None:
    whole, small = (nn.Sequential(nn.Linear(250, 96, bias=False)) for _ in range(2))
    rbe_torch.convert(whole, layout, seed=3, basis="seeded", nonlinearity="linear")
    rbe_torch.convert(small, layout, seed=3, basis="seeded", nonlinearity="linear", init_scale=init_scale)
    assert float((small[0].weight.norm() / whole[0].weight.norm()).detach()) == pytest.approx(init_scale, rel=1e-3)
    gains = float((small[0].gain / whole[0].gain).detach().median())
    if small[0].amplitude is None:
        assert gains == pytest.approx(init_scale, rel=1e-3)
        return
    assert float((small[0].amplitude - whole[0].amplitude).detach().abs().max()) > 0.05
    if layout not in ("rbe2r_g4", "rbe4r_g9") or init_scale > 0.1 and layout == "rbe4r_g9":  # else their smallest amplitude is too large, and gains do the rest
        assert gains == pytest.approx(1, abs=0.05)
    before = small[0].weight.detach().clone()
    rbe_torch.finish_training(small)
    assert float((small[0].weight.detach() - before).norm() / before.norm()) < 1e-3


@pytest.mark.parametrize("value, error, text", [
    (0.0, ValueError, "init_scale: is 0.0, must be 0.01 to 1"), (-0.4, ValueError, "init_scale: is -0.4"), (1.5, ValueError, "init_scale: is 1.5"),
    (float("nan"), ValueError, "init_scale: is nan"), ("0.4", TypeError, "init_scale: is a str"), (True, TypeError, "init_scale: is a bool"),
])  # fmt: skip
def test_a_start_that_is_none_is_named_and_nothing_is_replaced(value: object, error: type[Exception], text: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(error, match=text):
        rbe_torch.convert(model, init_scale=value)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("call, text", [
    (lambda m: rbe_torch.convert(m, nonlinearity="gelu2"), "nonlinearity: is 'gelu2'"),
    (lambda m: rbe_torch.keep_variance(RBELinear(8, 8), mode="fan"), "mode: is 'fan'"),
    (lambda m: rbe_torch.keep_variance(RBELinear(8, 8, layout="rbe8_g8+int8")), "residual no gain"),
])  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_replaced(call, text: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=text):
        call(model)
    assert type(model[0]) is nn.Linear


# ---- low-rank term -----------------------------------------------------------------------------------------------------------------
def compressed(layout: str = "rbe8_g8") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 6))
    rbe_torch.compress(model, layout, progress=False)
    return model.requires_grad_(False)


def fine_tune(model: nn.Module, steps: int = 40) -> list[float]:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(5))
    y = torch.sin(x[:, :6] * 2)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layout, rank", [("rbe8_g8", 4), ("rbe22_g8+lr3", 3)])
def test_a_low_rank_term_trains_beside_frozen_codes_and_becomes_the_residual(layout: str, rank: int, tmp_path: Path) -> None:
    model = compressed(layout)
    x = torch.randn(5, 32)
    before, packed = model(x), model[0].packed.clone()
    rbe_torch.add_lowrank(model, 4)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{i}.lowrank_{side}" for i in (0, 2) for side in ("left", "right")}
    losses = fine_tune(model)
    assert losses[-1] < 0.7 * losses[0] and torch.equal(model[0].packed, packed)
    with torch.no_grad():
        want = model(x)
    rbe_torch.finish_training(model)
    assert type(model[0]) is RBELinear and str(model[0].layout) == f"{layout.partition('+')[0]}+lr{rank}"
    assert float((model(x) - want).abs().max()) < INT8 * float(want.abs().max())
    rbe_torch.save_pretrained(model, tmp_path)
    loaded = rbe_torch.load_pretrained(tmp_path, nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 6)))
    assert torch.equal(loaded(x), model(x))


def test_codes_and_the_low_rank_term_train_together() -> None:
    model = rbe_torch.prepare_training(rbe_torch.add_lowrank(compressed("rbe22_g8"), 2))
    groups = rbe_torch.param_groups(model, lr=1e-3, rest=8e-3)
    assert {group["name"] for group in groups} == {"amplitude", "basis", "gain", "weight"}
    (factors,) = (group for group in groups if group["name"] == "weight")
    assert factors["lr"] == 1e-3 and len(factors["params"]) == 4
    losses = fine_tune(model)
    assert losses[-1] < losses[0]
    rbe_torch.finish_training(model)
    assert model[0].layout.rank == 2 and not model[0].training_form


def test_ranks_add_up_and_products_too() -> None:
    layer = compressed()[0]
    before = layer.weight.clone()
    parts = [(torch.randn(64, r) * 0.1, torch.randn(r, 32) * 0.1) for r in (2, 3)]
    for left, right in parts:
        merge_lowrank(layer, left, right)
    want = before + sum(left @ right for left, right in parts)
    assert layer.layout.rank == 5 and float((layer.weight - want).abs().max()) < INT8 * float((want - before).abs().max())


@pytest.mark.parametrize("call, text", [
    (lambda m: rbe_torch.add_lowrank(m, 0), "rank: is 0"), (lambda m: rbe_torch.add_lowrank(nn.Linear(2, 2)), "no RBELinear"),
    (lambda m: rbe_torch.add_lowrank(rbe_torch.prepare_training(m)), "in training form already"),
    (lambda m: rbe_torch.add_lowrank(compressed("rbe8_g8+int8")), r"\+int8, whose residual is not low rank"),
    (lambda m: merge_lowrank(m[0], torch.zeros(64, 2), torch.zeros(3, 32)), r"\(64, 2\) and \(3, 32\)"),
    (lambda m: merge_lowrank(m[0], torch.full((64, 1), float("nan")), torch.zeros(1, 32)), "not finite"),
    (lambda m: merge_lowrank(compressed("rbe8_g8+sp0.1")[0], torch.zeros(64, 1), torch.zeros(1, 32)), "cannot hold a low-rank"),
])  # fmt: skip
def test_what_cannot_be_low_rank_is_named(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call(compressed())


# ---- peft ----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["rbe8_g8", "rbe22_g8+lr2"])
def test_lora_of_peft_attaches_trains_and_merges(layout: str) -> None:
    peft = pytest.importorskip("peft")
    import rbe_torch.peft as ours

    model = compressed(layout)
    inside = model[0]
    x = torch.randn(5, 32)
    before = model(x)
    lora = peft.get_peft_model(model, ours.lora_config(r=4, lora_alpha=8, target_modules=["0", "2"]))
    torch.testing.assert_close(lora(x), before)
    losses = fine_tune(lora)
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        want = lora(x)
        lora.merge_adapter()
        assert float((lora(x) - want).abs().max()) < INT8 * float(want.abs().max())
        lora.unmerge_adapter()
        torch.testing.assert_close(lora(x), want)
    merged = lora.merge_and_unload()
    assert type(merged[0]) is RBELinear and merged[0] is inside and merged[0].layout.rank == 4 + (2 if "lr2" in layout else 0)
    assert float((merged(x) - want).abs().max()) < INT8 * float(want.abs().max())
    assert lowrank_of(merged[0])[0].shape == (64, merged[0].layout.rank)


def test_a_variant_that_is_no_low_rank_term_is_not_merged() -> None:
    peft = pytest.importorskip("peft")
    import rbe_torch.peft as ours

    lora = peft.get_peft_model(compressed(), ours.lora_config(r=2, target_modules=["0"], lora_bias=True))
    with pytest.raises(ValueError, match="lora_bias"):
        lora.merge_and_unload()
