"""RBELinear in training form, and in torch's tools."""

from __future__ import annotations

import pytest
import torch
from layer_cases import FLOAT32_SUM, LAYOUTS, made, parts
from operator_cases import random_codes
from torch import nn

import rbe_torch
from rbe_torch import Layout, RBELinear
from rbe_torch.codes import amplitude_of, with_amplitude

TRAINABLE = ["rbe22_g8", "rbe32_g5", "rbe9r_g7", "rbe4r_g3", "rbe2r_g5"]


# ---- training --------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_form_changes_nothing_but_what_can_be_trained(layout: str) -> None:
    lin = RBELinear.from_codes(**parts(layout))
    x = torch.randn(4, lin.in_features)
    before, codes = lin(x).detach(), lin.codes
    rbe_torch.prepare_training(lin)
    if lin.layout.has_amplitude:
        assert torch.equal(lin.codes, codes)
    torch.testing.assert_close(lin(x), before, rtol=1e-5, atol=FLOAT32_SUM * float(lin.weight.detach().abs().max()))
    lin(x).square().mean().backward()
    names = {"basis", "log_gain", "bias"} | ({"amplitude"} if lin.layout.has_amplitude else set())
    assert {name for name, p in lin.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0} == names
    rbe_torch.finish_training(lin)
    assert torch.equal(lin.codes, codes) and set(dict(lin.named_parameters())) == {"basis", "gain", "bias"}


@pytest.mark.parametrize("layout", [*TRAINABLE, "rbe8x2_g8"])
def test_a_converted_model_trains_and_finishing_keeps_what_was_evaluated(layout: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3))
    rbe_torch.convert(model, layout, seed=1)
    x, y = torch.randn(64, 20), torch.randn(64, 3)
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model, lr=1e-3))
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    evaluated = float((model(x) - y).square().mean().detach())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    rbe_torch.finish_training(model)
    assert float((model(x) - y).square().mean().detach()) == pytest.approx(evaluated, rel=0.02)  # basis and gain rounded to fp16
    for lin in (model[0], model[2]):
        assert lin.amplitude is None and not lin.training_form and not lin.basis.requires_grad
        assert torch.equal(lin.basis.half().float(), lin.basis) and torch.equal(lin.gain.half().float(), lin.gain)
    assert torch.equal(model[0].packed, state["0.packed"])  # the state_dict taken in training form had the amplitudes in its codes
    with pytest.raises(RuntimeError, match="prepare_training"):
        model.load_state_dict(state)
    rbe_torch.prepare_training(model)
    model.load_state_dict(state)
    assert float((model(x) - y).square().mean().detach()) == pytest.approx(evaluated, rel=1e-5)


def test_a_finished_state_dict_loads_into_training_form() -> None:
    lin, trained = made("rbe32_g8"), made("rbe32_g8", m=11)
    rbe_torch.prepare_training(trained)
    trained.load_state_dict(RBELinear(37, 11, layout="rbe32_g8", seed=9).state_dict())
    lin.load_state_dict(RBELinear(37, 11, layout="rbe32_g8", seed=9).state_dict())
    assert torch.equal(trained.codes, lin.codes)
    torch.testing.assert_close(trained.weight, lin.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fields", ["rbe22", "rbe32"])
def test_amplitudes_and_words_are_each_others_inverse(fields: str) -> None:
    layout = Layout.parse(f"{fields}_g8")
    words = random_codes(str(layout), 64, 64, torch.Generator().manual_seed(0))
    words[0] &= ~255 & 0x3FFFFF  # zero amplitude with either sign
    assert torch.equal(with_amplitude(words, amplitude_of(words), layout), words)


@pytest.mark.parametrize("layout", TRAINABLE)
def test_codes_are_those_that_the_forward_pass_uses(layout: str) -> None:
    """Amplitudes at, just below and just above every rounding border, and beyond 1."""
    lin = made(layout, n=260, m=40)
    rbe_torch.prepare_training(lin)
    with torch.no_grad():
        count = lin.amplitude.numel()
        border = (torch.arange(count) % 257 - 0.5) / 256
        border = torch.nextafter(border, border + torch.tensor([-1.0, 0.0, 1.0]).repeat(count)[:count])
        lin.amplitude.copy_((border * torch.where(torch.arange(count) % 2 == 0, 1.01, -1.0)).view_as(lin.amplitude))
        weight = lin.weight
        plain = torch.ops.rbe.decode(lin.codes, lin.basis, lin.gain, layout=layout, in_features=260, seed=lin._options["seed"])
    assert torch.equal(weight, plain)


def test_param_groups_cover_every_trainable_parameter_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    rbe_torch.convert(model, "rbe22_g8")
    groups = rbe_torch.param_groups(model, lr=2e-3)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters() if p.requires_grad}) and len(listed) == len(set(listed))
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["amplitude"] > 3 * rates["rest"] and rates["basis"] > 10 * rates["rest"] == 10 * 2e-3
    with pytest.raises(ValueError, match="lr"):
        rbe_torch.param_groups(model, lr=0)


def test_training_refuses_what_it_cannot_do() -> None:
    lin = made()
    with pytest.raises(ValueError, match="method: is 'hybrid'"):
        rbe_torch.prepare_training(lin, method="hybrid")
    for verb in (rbe_torch.prepare_training, rbe_torch.finish_training):
        with pytest.raises(ValueError, match="no RBELinear"):
            verb(nn.Linear(3, 3))
    rbe_torch.prepare_training(lin)
    lin.log_gain.data[0] = float("nan")
    with pytest.raises(ValueError, match="log_gain"):
        rbe_torch.finish_training(lin)


# ---- tools ------------------------------------------------------------------------------------------------------------------------
def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    lin = made(n=64, m=32)
    with FlopCounterMode(display=False) as counter:
        lin(torch.randn(5, 64))
    assert counter.get_total_flops() > 0


def test_compiles_without_graph_breaks_in_either_form() -> None:
    lin = made("rbe9r_g8", n=64, m=32)
    for _ in range(2):
        compiled = torch.compile(lin, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (3, 7):
            x = torch.randn(tokens, 64, requires_grad=True)
            torch.testing.assert_close(compiled(x), lin(x))
            compiled(x).sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), lin(x))
        rbe_torch.prepare_training(lin)
        torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["rbe9r_g8", "rbe8_g8+sp0.1", "rbe9r_g8+int8", "rbe22_g8+lr2"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_export_trace_and_functional_calls_take_the_layer(layout: str, train: bool) -> None:
    lin = made(layout, n=64, m=32)
    if train:
        rbe_torch.prepare_training(lin)
    x = torch.randn(5, 64)
    tokens = torch.export.Dim("tokens")
    for strict in (False, True):
        program = torch.export.export(lin, (x,), dynamic_shapes=({0: tokens},), strict=strict).module()
        assert torch.equal(program(x[:3]), lin(x[:3]))
    assert torch.equal(torch.jit.trace(lin, x)(x[:3]), lin(x[:3]))
    own = {name: p.detach() for name, p in lin.named_parameters()}
    gradients = torch.func.grad(lambda values: torch.func.functional_call(lin, values, (x,)).square().sum())(own)
    lin.requires_grad_(True)
    lin(x).square().sum().backward()
    for name, p in lin.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_show_config_prints_what_it_holds() -> None:
    config = rbe_torch.show_config()
    text = str(config)
    for name in ("rbe_torch", "torch", "isa", "threads", "cuda", "kernels"):
        assert name in config and f"{name}:" in text
    assert config["torch"] == torch.__version__ and all(config["kernels"].values())


def test_import_is_light() -> None:
    import subprocess
    import sys

    code = ("import sys, warnings; warnings.simplefilter('error'); import torch; had = set(sys.modules); import rbe_torch; "
            "new = set(sys.modules) - had; bad = [m for m in new if m.split('.')[0] in ('transformers', 'safetensors', 'numpy', 'accelerate')]; "
            "assert not bad, bad; assert callable(rbe_torch.compress); import rbe_torch.compress; assert callable(rbe_torch.compress) and rbe_torch.show_config")
    subprocess.run([sys.executable, "-c", code], check=True)
