"""Whole training steps: accumulated gradients, a compiled step, mixed precision, memory, and the benchmark's models at equal bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks" / "train"
STATE = 20  # times less than dense, at least: parameters, gradients and optimiser


def network(layout: str = "rbe22_g8") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 8))
    rbe_torch.convert(model, layout, seed=2)
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(16, 32, generator=generator), torch.randn(16, 8, generator=generator)


def optimiser_of(model: nn.Module, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(rbe_torch.param_groups(model), betas=(0.9, 0.98), **options)


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    x, y = data()
    whole, parts = network(), network()
    (whole(x) - y).square().mean().backward()
    for rows in torch.arange(16).split(4):
        ((parts(x[rows]) - y[rows]).square().mean() / 4).backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe4r_g4"])
def test_a_compiled_step_makes_the_same_steps(layout: str) -> None:
    """Forward, loss, backward and optimiser in one compiled function."""
    x, y = data()

    def run(compiled: bool) -> nn.Module:
        model = network(layout)
        optimiser = optimiser_of(model)

        def step() -> None:
            optimiser.zero_grad()
            (model(x) - y).square().mean().backward()
            optimiser.step()

        call = torch.compile(step, backend="aot_eager") if compiled else step
        for _ in range(3):
            call()
        torch._dynamo.reset()
        return model

    for (name, a), (_, b) in zip(run(False).named_parameters(), run(True).named_parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_mixed_precision_with_a_gradient_scaler_trains() -> None:
    x, y = data()
    model = network()
    optimiser, scaler = optimiser_of(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
        loss = (out.float() - y).square().mean()
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_parameters_gradients_and_optimiser_take_a_twentieth_of_dense() -> None:
    size = 4096
    model = nn.Sequential(nn.Linear(size, size, device="meta"))
    weights = size * size + size
    rbe_torch.convert(model.to_empty(device="cpu"), "rbe22_g64")
    optimiser = optimiser_of(model)
    model(torch.randn(2, size)).sum().backward()
    optimiser.step()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for entry in optimiser.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    assert STATE * sum(t.numel() * t.element_size() for t in tensors) < 4 * 4 * weights


# ---- the benchmark's models ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gpt():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpt

        yield gpt
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_contestants_have_the_bytes_they_say(gpt) -> None:
    """Of what is not zero, and about 100 kB each, or 280."""
    small = 0
    for contestant in gpt.CONTESTANTS:
        model, size = gpt.build(contestant, 65, 0)
        assert model(torch.zeros(1, gpt.CONTEXT, dtype=torch.long)).shape == (1, gpt.CONTEXT, 65)
        small += 95e3 < size < 105e3
        if contestant.kind in ("dense", "sparse"):
            bits = dict(contestant.options)["bits"]
            layers = [layer for block in model.blocks for layer in (block.qkv, block.out, block.up, block.down)]
            counted = sum(int((layer.quantised().detach() != 0).sum()) * bits / 8 + 2 * layer.weight.shape[0] for layer in layers)
            assert 0.8 * size < counted <= size * 1.001  # some weights are rounded to 0
    assert small >= 8


def test_the_table_takes_the_rate_with_most_seeds_and_no_run_is_repeated(gpt, tmp_path: Path) -> None:
    rows = [{"name": "a", "lr": lr, "seed": seed, "loss": loss} for lr, seed, loss in ((1, 0, 3.0), (1, 1, 2.0), (2, 0, 2.5), (2, 1, 2.4), (3, 0, 0.1))]
    best, tried = gpt.at_best_rate(rows, ("lr",), lambda row: row["loss"])
    assert [row["lr"] for row in best] == [2, 2] and tried == 3 and gpt.spread(best, "loss") == {"loss": "2.450", "from": "2.400", "to": "2.500"}
    (tmp_path / "runs.json").write_text('{"machine": {}, "rows": []}')
    first, second = (gpt.Runs(tmp_path / "runs.json", start=1.0) for _ in range(2))
    first.add(rows[0])
    second.add(rows[1])  # another process, which had read the file before
    again = gpt.Runs(tmp_path / "runs.json")
    assert again.rows == [{"start": 1.0, **rows[0]}, rows[1]] and again.holds(lr=1, seed=1) and not again.holds(lr=2)


def test_every_contestant_starts_alike(gpt) -> None:
    """A rival that starts with other activations than the rest loses for that reason."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    for contestant in gpt.CONTESTANTS:
        if contestant.d == 256:
            layer = gpt.build(contestant, 65, 0)[0].blocks[0].qkv
            variance = float(layer(x).detach().var())
            assert 0.75 < variance / contestant.start**2 < 1.25, (contestant.name, variance)


def test_a_layer_trains_as_the_dense_simulation_of_it(gpt) -> None:
    """One step of the benchmark's model against W = gain * scale * basis in plain torch: the loss and the gradient of every amplitude."""
    contestant = next(c for c in gpt.CONTESTANTS if "rbe4r_g9" in c.name)
    model, _ = gpt.build(contestant, 65, 0)
    x = torch.randint(0, 65, (2, gpt.CONTEXT), generator=torch.Generator().manual_seed(1))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
    loss.backward()
    simulated, _ = gpt.build(contestant, 65, 0)
    scales = []
    for block in simulated.blocks:
        for name in ("qkv", "out", "up", "down"):
            lin = getattr(block, name)
            scale = rbe_torch.reference.scale(lin.codes, lin.layout.fields)[..., 0].requires_grad_()
            vectors = lin.basis.detach()[0, lin.codes.long()[..., 0] >> 10 & 255]
            weight = (scale[..., None] * vectors).reshape(lin.out_features, -1)[:, : lin.in_features] * lin.gain.detach()[:, None]
            scales.append((lin, scale))
            lin.forward = lambda x, weight=weight, bias=lin.bias: nn.functional.linear(x, weight, bias)
    again = nn.functional.cross_entropy(simulated(x).flatten(0, 1), x.flatten())
    again.backward()
    assert abs(loss.item() - again.item()) < 1e-4
    trained = [layer for layer in model.modules() if isinstance(layer, rbe_torch.RBELinear)]
    for (lin, scale), layer in zip(scales, trained, strict=True):
        table, amp = rbe_torch.reference.curve_table(), lin.codes[..., 0].long() & 255
        slope = 256 * (table[10, amp + 1] - table[10, amp])  # 2 sinh(r/2)
        want = (scale.grad * slope)[..., None]
        assert float((layer.amplitude.grad - want).abs().max()) < 2e-3 * float(want.abs().max())
