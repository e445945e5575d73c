"""Calibrated compression. Risks: a layer that is worse on its inputs than without, a half-changed model, hooks left behind, inputs that
are not those of
the compressed prefix, results that change from run to run, and a budget that is exceeded."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import budget, calibrate, codebook, encode, moments, shards, tune, walk
from rbe_torch.layout import Layout
from rbe_torch.linear import RBELinear
from rbe_torch.replace import dense_weight, find_linears

ROUNDING = 1e-3  # float32 moments of a few thousand tokens
LAYOUTS = [
    "rbe8_g8",
    "rbe8x2_g8",
    "rbe16s_g8",
    "rbe16sx2_g8",
    "rbe22_g8",
    "rbe32_g8",
    "rbe9r_g16",
    "rbe4r_g8",
    "rbe8x2_g8+lr4",
    "rbe8x2_g8+sp0.02",
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, n: int, seed: int = 0) -> torch.Tensor:
    """Inputs with a few strong directions, as activations have."""
    return draw(tokens, n, seed=seed) @ (draw(n, n, seed=7) * torch.logspace(0, -1.5, n)[:, None])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        h = self.norm(x)
        return x + scale * self.down(torch.nn.functional.gelu(self.up(h)) * self.gate(h))


class Net(nn.Module):
    """A layer before the chain, three blocks, one after."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(13, width), nn.ModuleList(Block(width) for _ in range(3)), nn.Linear(width, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.last(x)


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def batches(count: int = 6) -> list[torch.Tensor]:
    return [correlated(16 * 10, 13, seed=i).view(16, 10, 13) for i in range(count)]


def run(model: nn.Module, layout: str = "rbe8x2_g8", **options) -> rbe_torch.Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return rbe_torch.compress(model, layout, progress=False, **options)


def output_error(model: nn.Module, dense: nn.Module) -> float:
    x = correlated(64 * 10, 13, seed=99).view(64, 10, 13)
    with torch.no_grad():
        return float((model(x) - dense(x)).square().sum() / dense(x).square().sum())


# ---- the operator ----------------------------------------------------------------------------------------------------------------
def problem(m: int = 20, n: int = 43, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight, hessian and factor on a device; the same on every one."""
    with torch.device("cpu"):
        x = correlated(2000, n)
        hessian = x.t() @ x / 2000 + 0.01 * torch.eye(n)
        made = draw(m, n), hessian, torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()
    return tuple(t.to(device) for t in made)


def plain(weight: torch.Tensor, layout: str, fitted_to: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """codes, basis and gain: encoded from the weight alone with a basis that other weights were fitted to."""
    with torch.device("cpu"):
        basis = codebook.fit_basis([draw(400, 48, seed=11) if fitted_to is None else fitted_to.cpu()], layout)
        made = encode.encode_layer(weight.cpu(), Layout.parse(layout), basis)
    return tuple(t.detach().to(weight.device) for t in (made.codes, made.basis, made.gain))


def decoded_loss(weight, hessian, codes, basis, gain, layout) -> float:
    decoded = torch.ops.rbe.decode(codes, basis, gain, layout=layout, in_features=weight.shape[1])
    rest = (weight - decoded).double()
    return float(((rest @ hessian.double()) * rest).sum())


@pytest.mark.parametrize("layout", ["rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe16sx2_g8", "rbe22_g8", "rbe32_g16", "rbe9r_g16"])
def test_feedback_loses_less_than_plain_encoding_and_sweeps_never_lose(layout, device):
    weight, hessian, factor = problem(device=device)
    made, basis, gain = plain(weight, layout)
    place = {"layout": layout, "in_features": weight.shape[1]}
    losses = [decoded_loss(weight, hessian, made, basis, gain, layout)]
    for sweeps in (0, 1, 2, 4):
        codes = torch.ops.rbe.encode_calibrated(weight, basis, gain, hessian, factor, **place, sweeps=sweeps)
        losses.append(decoded_loss(weight, hessian, codes, basis, gain, layout))
    assert losses[1] < 0.9 * losses[0] and losses[2] < losses[1]
    assert losses[3] <= losses[2] * (1 + 1e-5) and losses[4] <= losses[3] * (1 + 1e-5)


@pytest.mark.parametrize("layout", ["rbe8_g8", "rbe16s_g8", "rbe8x2_g8"])
def test_with_an_identity_hessian_it_is_no_worse_than_plain_encoding(layout, device):
    weight, *_ = problem(10, 24, device)
    made, basis, gain = plain(weight, layout)
    eye = torch.eye(24)
    codes = torch.ops.rbe.encode_calibrated(weight, basis, gain, eye, eye, layout=layout, in_features=24, sweeps=0)
    loss, plain_loss = (decoded_loss(weight, eye, found, basis, gain, layout) for found in (codes, made))
    assert loss <= 1.01 * plain_loss


def test_one_group_is_the_best_of_all_codes_under_the_metric(device):
    """One group and one stage: sweeps find the minimum over 256 vectors, by brute force."""
    weight, hessian, factor = problem(30, 8, device)
    basis, gain = plain(weight, "rbe8_g8", problem(200, 8)[0])[1], torch.ones(30)
    codes = torch.ops.rbe.encode_calibrated(weight, basis, gain, hessian, factor, layout="rbe8_g8", in_features=8, sweeps=1)
    rest = (weight[:, None] - basis[0][None]).double()
    every = torch.einsum("mji,ik,mjk->mj", rest, hessian.double(), rest)
    taken = every.gather(1, (codes[:, 0] >> 10 & 255).long())[:, 0]
    torch.testing.assert_close(taken, every.min(1).values, rtol=1e-5, atol=1e-7)


def test_threads_do_not_change_codes():
    weight, hessian, factor = problem(150, 40)
    made = encode.encode_layer(weight, Layout.parse("rbe8x2_g8"))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(
                torch.ops.rbe.encode_calibrated(weight, made.basis, made.gain, hessian, factor, layout="rbe8x2_g8", in_features=40)
            )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize(("change", "message"), [
    ({"hessian": torch.eye(42)}, "hessian.*shape"), ({"factor": None}, "exactly one"), ({"codes": torch.zeros(20, 6, 2, dtype=torch.int32)}, "exactly one"),
    ({"hessian": torch.full((43, 43), float("nan"))}, "not finite"), ({"hessian": -torch.eye(43)}, "not positive"), ({"gain": torch.zeros(20)}, "gain"),
    ({"sweeps": -1}, "sweeps"), ({"codes": torch.full((20, 6, 2), 1, dtype=torch.int32), "factor": None}, "codes"),
    ({"hessian": torch.ones(43, 43)}, "positive definite"),
])  # fmt: skip
def test_the_operator_refuses_bad_input_by_name(change, message, device):
    weight, hessian, factor = problem(device=device)
    change = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    values = {
        "weight": weight,
        "basis": problem(512, 8, device)[0].view(2, 256, 8),
        "gain": torch.ones(20),
        "hessian": hessian,
        "factor": factor,
        "codes": None,
        "sweeps": 1,
    } | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.rbe.encode_calibrated(**values, layout="rbe8x2_g8", in_features=43)


def test_opcheck(device):
    weight, hessian, factor = problem(6, 16, device)
    arguments = (weight, problem(512, 8, device)[0].view(2, 256, 8), torch.ones(6), hessian[:16, :16].contiguous(), factor[:16, :16].contiguous())
    torch.library.opcheck(
        torch.ops.rbe.encode_calibrated.default,
        arguments,
        {"layout": "rbe8x2_g8", "in_features": 16},
        test_utils=("test_schema", "test_faketensor"),
    )


# ---- moments ---------------------------------------------------------------------------------------------------------------------
def test_moments_give_the_loss_of_the_outputs():
    x, weight, decoded, shift = correlated(500, 20), draw(7, 20), draw(7, 20, seed=1), draw(7, seed=2)
    z = x + 0.1 * draw(500, 20, seed=5)
    held = moments.Moments.empty(20, torch.device("cpu"), judging=True)
    held.add(x[:200], z[:200])
    held.add(x[200:], z[200:])
    token = 1 / x.square().mean(1)
    lost = ((x @ weight.t() - z @ decoded.t() - shift).square().sum(1) * token).sum() / ((x @ weight.t()).square().sum(1) * token).sum()
    assert held.loss(weight, decoded, shift) == pytest.approx(float(lost), rel=ROUNDING)


def test_the_target_undoes_what_the_prefix_changed():
    """Where z is an invertible change of x the target is W times its inverse."""
    x, change, weight = draw(5000, 12), torch.eye(12) + 0.2 * draw(12, 12, seed=3), draw(5, 12)
    fit = moments.Moments.empty(12, torch.device("cpu"), judging=False)
    fit.add(x, x @ change.t())
    target = moments.problem_of(weight, fit, 1e-6, centred=False).target
    torch.testing.assert_close(target, weight @ torch.linalg.inv(change), rtol=1e-2, atol=1e-2)


def test_a_dead_channel_and_a_dead_layer_keep_finite_codes():
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), correlated(256, 16)
    data[:, 3] = 0
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # nothing passes the ReLU
    run(model, calibration=[data])
    assert all(bool(torch.isfinite(layer.weight).all()) for layer in model if isinstance(layer, RBELinear))


@pytest.mark.parametrize("suffix", ["lr4", "sp0.05"])
def test_a_residual_is_fitted_under_the_hessian(suffix):
    weight, hessian, factor = problem()
    layout = Layout.parse(f"rbe8_g8+{suffix}")

    def lost(residual) -> float:
        codes, basis, gain = torch.zeros(20, 6, 1, dtype=torch.int32), torch.zeros(1, 256, 8), torch.ones(20)
        rest = (weight - torch.ops.rbe.decode(codes, basis, gain, None, **residual, layout=str(layout), in_features=43)).double()
        return float(((rest @ hessian.double()) * rest).sum())

    assert lost(encode.fit_residual(weight, layout, hessian, factor)) < 0.95 * lost(encode.fit_residual(weight, layout))


# ---- walking ---------------------------------------------------------------------------------------------------------------------
def test_stretches_come_in_order_and_share_inputs():
    model = net()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    visits = list(walk.walk(model, walk.calls_of(batches(1), torch.device("cpu")), names))
    assert [visit.stretch.name for visit in visits] == ["", "blocks.0", "blocks.1", "blocks.2", ""]
    assert visits[0].stretch.phases == [["first"]] and visits[-1].stretch.phases == [["last"]]
    assert visits[1].stretch.phases == [["up", "gate"], ["down"]]


def test_what_reaches_a_block_is_what_the_model_sends_it():
    model, data = net(), batches(1)
    expected = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, i=i: expected.__setitem__(i, args[0])) for i, block in enumerate(model.blocks)
    ]
    with torch.no_grad():
        model(data[0])
    for handle in handles:
        handle.remove()
    visits = walk.walk(model, walk.calls_of(data, torch.device("cpu")), ["blocks.0.up", "blocks.1.up", "blocks.2.up"])
    for i, visit in enumerate(visits):
        torch.testing.assert_close(visit.calls[0].args[0], expected[i], rtol=0, atol=0)
    assert i == 2 and not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_no_chain_is_walked_whole():
    class Skips(Net):
        def forward(self, x):
            x = start = self.first(x)
            for block in self.blocks:
                x = block(x) + start
            return self.last(x)

    torch.manual_seed(3)
    model = Skips().eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert [visit.stretch.name for visit in walk.walk(model, walk.calls_of(batches(1), torch.device("cpu")), names)] == [""]
    dense = copy.deepcopy(model)
    run(model, calibration=batches())
    assert output_error(model, dense) < 0.5


@pytest.mark.parametrize("bad", ["text", torch.zeros(2, 13), 5, [], ["text"], [torch.zeros(2, 99)]])
def test_calibration_that_cannot_be_used_is_refused_and_nothing_is_changed(bad):
    model = net()
    before = [id(module) for module in model.modules()]
    with pytest.raises((ValueError, TypeError), match="calibration"):
        run(model, calibration=bad)
    assert [id(module) for module in model.modules()] == before


def test_padding_is_not_gathered():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 7:] = 0
    other = ids.clone()
    other[:, 7:] = 3
    models = []
    for tokens in (ids, other):
        models.append(copy.deepcopy(model))
        run(models[-1], calibration=[{"input_ids": tokens, "attention_mask": mask}])
    first, second = (m.state_dict() for m in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_decoder_with_a_cache_sees_its_tokens_once():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    visits = list(walk.walk(model, walk.calls_of([{"input_ids": ids}], torch.device("cpu")), names))
    assert [visit.stretch.name for visit in visits] == ["transformer.h.0", "transformer.h.1"] and model.config.use_cache
    for visit, expected in zip(visits, hidden[1:], strict=True):
        for _ in range(2):
            got = walk.output_tensor(visit.calls[0].run(visit.stretch.module)).detach()
            if visit is visits[0]:
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            else:  # the last hidden state is after the final norm
                torch.testing.assert_close(model.transformer.ln_f(got), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_dtypes_are_calibrated_and_tuned(dtype):
    model = net().to(dtype)
    report = run(model, "rbe8_g8", calibration=[batch.to(dtype) for batch in batches(8)], tune=0.01)
    assert model.blocks[0].up.weight.dtype == model.blocks[0].up.bias.dtype == model.blocks[0].norm.weight.dtype == dtype
    assert report.tuning["steps"] > 0 and model(batches(1)[0].to(dtype)).dtype == dtype


# ---- whole models ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibration_loses_less_than_none(layout):
    dense, free, fitted = net(), net(), net()
    run(free, layout)
    report = run(fitted, layout, calibration=batches())
    assert output_error(fitted, dense) < 0.9 * output_error(free, dense)
    assert all(row.output_error is not None and row.damping in calibrate.DAMPINGS for row in report.converted)


def test_it_is_the_same_every_time_and_leaves_modes_and_hooks():
    states = []
    for _ in range(2):
        model = net().train()
        torch.manual_seed(len(states))  # the global generator must not matter
        run(model, calibration=batches(), seed=5)
        assert all(module.training for module in model.modules()) and not any(module._forward_pre_hooks for module in model.modules())
        states.append({name: layer.packed for name, layer in model.named_modules() if isinstance(layer, RBELinear)})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_error_midway_puts_everything_back(monkeypatch):
    model = net()
    before, state, true, count = [id(m) for m in model.modules()], copy.deepcopy(model.state_dict()), calibrate.calibrate_layer, []

    def failing(*arguments):
        count.append(1)
        if len(count) == 5:
            raise RuntimeError("out of luck")
        return true(*arguments)

    monkeypatch.setattr(calibrate, "calibrate_layer", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(model, calibration=batches())
    assert [id(m) for m in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_layer_that_nothing_reaches_is_encoded_and_said_so():
    model = net()
    model.spare = nn.Linear(16, 16)
    report = run(model, calibration=batches())
    assert "no calibration batch" in next(row.note for row in report.converted if row.name == "spare")
    assert isinstance(model.spare, RBELinear)


def test_the_full_form_is_exact_to_a_hundredth_on_minilm():
    """`rbe8x2_g8+int8` on layers of a trained encoder: |W - Q| <= 1e-2 |W|, on the rows whose largest weight stands out most, as they set
    int8's step."""
    from rbe_torch import models

    try:
        directory = models.model_directory("minilm")
    except ValueError as error:
        pytest.skip(str(error))
    layout, places = Layout.parse("rbe8x2_g8+int8"), shards.Shards(directory)
    weights = [
        places.tensor(f"encoder.layer.{name}.weight").float()
        for name in ("0.output.dense", "5.intermediate.dense", "3.attention.self.query")
    ]
    extreme = [weight[(weight.abs().amax(1) / weight.square().mean(1).sqrt()).topk(24).indices] for weight in weights]
    table = codebook.fit_basis([*(weight[::16] for weight in weights), *extreme], layout)  # compress shows it all rows, which takes longer
    for weight in extreme:
        made = encode.encode_layer(weight, layout, table)
        decoded = torch.ops.rbe.decode(
            made.codes, made.basis, made.gain, None, **made.residual, layout=str(layout), in_features=weight.shape[1]
        )
        assert float((weight - decoded).norm() / weight.norm()) < 1e-2


@pytest.mark.parametrize("suffix", ["int8", "fp8", "lr4", "sp0.05"])
def test_every_residual_is_encoded_stored_run_and_differentiated(suffix, tmp_path):
    model = net()
    run(model, f"rbe8x2_g8+{suffix}", calibration=batches())
    x = batches(1)[0].requires_grad_()
    model(x).square().sum().backward()
    rbe_torch.save_pretrained(model, tmp_path)
    loaded, dense = rbe_torch.load_pretrained(tmp_path, net()), net()
    y = x.detach().clone().requires_grad_()
    loaded(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for name, layer in list(loaded.named_modules()):
        if isinstance(layer, RBELinear):
            parent, _, child = name.rpartition(".")
            setattr(dense.get_submodule(parent), child, layer.to_linear())
    dense.load_state_dict({k: v for k, v in loaded.state_dict().items() if "norm" in k}, strict=False)
    z = x.detach().clone().requires_grad_()
    dense(z).square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad, rtol=1e-3, atol=1e-4)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------------------
def test_tuning_lowers_the_loss_keeps_fp16_and_saves_what_it_measured(tmp_path):
    dense, model = net(), net()
    report = run(model, "rbe8_g8", calibration=batches(16), tune=0.05)
    assert [block["block"] for block in report.tuning["blocks"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(not block["kept"] or block["after"] <= block["before"] for block in report.tuning["blocks"])
    assert report.tuning["kept"] and report.tuning["after"] < report.tuning["before"] and report.tuning["steps"] > 0
    plain = net()
    run(plain, "rbe8_g8", calibration=batches(16))
    assert output_error(model, dense) < output_error(plain, dense)
    layer = model.blocks[0].up
    assert torch.equal(layer.basis.half().float(), layer.basis) and "forward" not in layer.__dict__ and not layer.basis.requires_grad
    rbe_torch.save_pretrained(model, tmp_path)
    x = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(rbe_torch.load_pretrained(tmp_path, net())(x), model(x))


def test_an_error_while_tuning_puts_norms_and_biases_back(monkeypatch):
    from rbe_torch import tune

    model = net()
    before, state = [id(m) for m in model.modules()], copy.deepcopy(model.state_dict())

    def failing(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(tune, "tune_model", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        run(model, "rbe8_g8", calibration=batches(8), tune=0.02)
    assert [id(m) for m in model.modules()] == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe16s_g8", "rbe22_g16", "rbe9rx2_g16"])
def test_the_gradient_of_a_decoded_weight_is_that_of_the_layer(layout):
    from rbe_torch.tune import _Student

    layer = RBELinear(20, 12, layout=layout, seed=1)
    x, dy = draw(6, 20), draw(6, 12, seed=1)
    _, dbasis, dgain, _, _ = torch.ops.rbe.linear_backward(dy, x, layer.packed, layer.basis, layer.gain, **layer._options, wanted=6)
    for codes in (layer.packed, layer.codes):
        got = torch.ops.rbe.decode_backward(dy.t() @ x, codes, layer.basis, layer.gain, **layer._options)
        torch.testing.assert_close(got[0], dbasis, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], dgain, rtol=1e-4, atol=1e-5)
    if not layer.layout.has_amplitude:
        student = _Student(layer, basis=True)
        with student.running():
            layer(x).backward(dy)
            torch.testing.assert_close(student.basis[0].grad, dbasis, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(student.log_gain[0].grad, dgain * layer.gain, rtol=1e-4, atol=1e-5)


# ---- budget ----------------------------------------------------------------------------------------------------------------------
CHEAP = ("rbe8_g8", "rbe16s_g8")  # their tables are quick to fit


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_budget_is_met_and_used(monkeypatch, calibrated):
    monkeypatch.setattr(budget.choose, "__defaults__", (*budget.choose.__defaults__[:-1], CHEAP))
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    report = run(model, calibration=[correlated(512, 256).view(8, 64, 256)] if calibrated else None, bits=2.2)
    assert 1.9 < report.bits_per_weight <= 2.2
    chosen = [row for row in report.frontier if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["bytes"] == report.compressed_bytes
    json.loads(report.to_json())


def test_max_megabytes_counts_the_whole_model(monkeypatch):
    monkeypatch.setattr(budget.choose, "__defaults__", (*budget.choose.__defaults__[:-1], CHEAP))
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    report = run(model, max_megabytes=0.045)
    assert report.compressed_bytes + report.other_bytes <= 45000


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"bits": 0.01}, "bits"),
        ({"max_megabytes": 1e-6}, "max_megabytes"),
        ({"bits": -1}, "bits"),
        ({"bits": "2"}, "bits"),
        ({"bits": 2.0, "max_megabytes": 1.0}, "bits"),
        ({"tune": 1.0}, "tune"),
        ({"tune": 0}, "tune"),
    ],
)
def test_impossible_budgets_are_refused_by_name(options, name):
    model = net()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=name):
        run(model, **options)
    assert [id(module) for module in model.modules()] == before


def test_a_measured_loss_counts_the_bias_correction():
    """Inputs far from zero: without the correction the mean that the codes lose is nearly all that is measured."""
    torch.manual_seed(0)
    model, layout = nn.Sequential(nn.Linear(64, 96)), Layout.parse("rbe8_g8")
    calls = walk.calls_of([correlated(512, 64, seed).view(8, 64, 64) + 3 for seed in range(2)], torch.device("cpu"))
    entries, dense = find_linears(model), copy.deepcopy(model)
    table = codebook.fit_basis([dense_weight(entries[0].module)], layout)
    with torch.no_grad():
        measured = budget._model_losses(model, entries, [layout], {"rbe8_g8": table}, calls, 0, False)["0"]["rbe8_g8"]
    assert torch.equal(model[0].weight, dense[0].weight) and torch.equal(model[0].bias, dense[0].bias)
    run(model, "rbe8_g8", calibration=[call.args for call in calls])
    with torch.no_grad():
        real = sum(float(tune.distance(call.run(model), call.run(dense), None)) for call in calls) / len(calls)
    assert 0.8 * real < measured < 2 * real


def test_the_frontier_shows_no_mix_that_takes_more_and_loses_more():
    rows = [{"bytes": size, "loss": loss} for size, loss in ((9, 1.0), (4, 7.0), (5, 9.0), (7, 7.0), (8, 3.0))]
    assert [row["bytes"] for row in budget.undominated(rows)] == [4, 8, 9]


def test_the_frontier_is_the_hull_of_all_mixes():
    """Three layers with made-up losses: at every price no mix of all 27 beats the frontier."""
    layouts = [Layout.parse(text) for text in ("rbe8_g8", "rbe8x2_g8", "rbe8x3_g8")]
    values = draw(3, 3).abs()
    options = {
        str(i): [budget.Option(layout, (j + 1) * (100 + 10 * i), float(values[i, j:].sum())) for j, layout in enumerate(layouts)]
        for i in range(3)
    }
    mixes = [(sum(o.bytes for o in mix.values()), sum(o.loss for o in mix.values())) for mix in budget.frontier(options)]
    every = [(a.bytes + b.bytes + c.bytes, a.loss + b.loss + c.loss) for a in options["0"] for b in options["1"] for c in options["2"]]
    for price in torch.logspace(-5, 1, 40).tolist():
        assert min(loss + price * size for size, loss in mixes) <= min(loss + price * size for size, loss in every) + 1e-9


# ---- the report ------------------------------------------------------------------------------------------------------------------
def test_a_seed_makes_the_same_report(tmp_path):
    """The page byte for byte, the JSON but for its times."""
    pages, facts = [], []
    for turn in range(2):
        report = run(net(), bits=20.0, calibration=batches(), seed=5)
        report.to_html(tmp_path / f"{turn}.html")
        pages.append((tmp_path / f"{turn}.html").read_bytes())
        facts.append(json.loads(report.to_json()))
        for part in (facts[-1], *facts[-1]["layers"]):
            part.pop("seconds")
    assert pages[0] == pages[1] and facts[0] == facts[1] and facts[0]["frontier"]


def test_the_report_names_the_worst_layers_and_draws_a_page(tmp_path):
    model = net()
    report = run(model, calibration=batches())
    worst = report.worst(2)
    assert [row.output_error for row in worst] == sorted((row.output_error for row in report.converted), reverse=True)[:2]
    assert worst[0].name in str(report).split("lose most:")[1]
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert all(row.name in text for row in report.converted) and "<script" not in text
