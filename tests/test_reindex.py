"""Moving codes: the gradient it goes by is right, only the codes it says move, an exchange never raises the loss, and a run with it
resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear, Reindexer
from rbe_torch.reindex import layer_idx, vector_gradients

FLOAT32_SUM = 1e-4  # of the largest value


def network(layout: str = "rbe22_g8") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 8))
    rbe_torch.convert(model, layout, seed=2)
    return model


def batch(seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 20, generator=generator)
    return x, torch.sin(x[:, :8] * 2)


def loss_of(model: nn.Module) -> torch.Tensor:
    x, y = batch()
    return (model(x) - y).square().mean()


def run(model: nn.Module, steps: int, optimiser=None, reindexer=None) -> list[float]:
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimiser.step()
        reindexer.step()
        losses.append(loss.item())
    return losses


def made(model: nn.Module, **options):
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model), betas=(0.9, 0.98))
    options = {"until": 100, "interval": 4, "fraction": 0.3, "method": "gradient", **options}
    return optimiser, Reindexer(model, optimiser, **options)


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe22x2_g7", "rbe32_g5"])
def test_gradients_along_every_vector_are_those_of_the_dense_weight(layout: str) -> None:
    lin = rbe_torch.prepare_training(RBELinear(20, 6, layout=layout, seed=1))
    x, dy = torch.randn(9, 20), torch.randn(9, 6)
    codes = torch.randperm(lin.amplitude.numel())[:7]
    got = vector_gradients(lin, [(x[:4], dy[:4]), (x[4:], dy[4:])], codes)
    dw = (dy.double().t() @ x.double()) * lin.gain.detach().double()[:, None]
    _, groups, stages = lin.amplitude.shape
    g = lin.layout.group
    padded = nn.functional.pad(dw, (0, groups * g - 20)).view(6, groups, g)
    for row, code in enumerate(codes.tolist()):
        i, k, s = code // (groups * stages), code // stages % groups, code % stages
        want = lin.basis.detach().double()[s] @ padded[i, k]
        assert float((got[row].double() - want).abs().max()) < FLOAT32_SUM * float(want.abs().max())


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe32x2_g5"])
def test_only_the_codes_of_least_amplitude_move_and_start_at_zero(layout: str) -> None:
    model = network(layout)
    optimiser, reindexer = made(model, interval=2)
    run(model, 1, optimiser, reindexer)
    loss_of(model).backward()
    optimiser.step()
    lin = model[0]
    before, amplitude = layer_idx(lin), lin.amplitude.detach().clone()
    assert float(optimiser.state[lin.amplitude]["exp_avg"].abs().min()) > 0
    reindexer.step()
    zero = lin.amplitude.detach() == 0
    count = round(reindexer.fraction_now() * zero.numel())
    assert int(zero.sum()) == count > 0 and float(amplitude[zero].abs().max()) <= float(amplitude[~zero].abs().min())
    assert torch.equal(layer_idx(lin)[~zero], before[~zero]) and not torch.equal(layer_idx(lin)[zero], before[zero])
    for key in ("exp_avg", "exp_avg_sq"):
        state = optimiser.state[lin.amplitude][key]
        assert bool((state[zero] == 0).all()) and bool((state[~zero] != 0).all())
    assert lin.problem() == ""


def test_an_exchange_is_kept_only_where_the_loss_falls() -> None:
    model = network()
    optimiser, reindexer = made(model, method="exchange", closure=lambda: loss_of(model), interval=2)
    for _ in range(30):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
        before = float(loss_of(model).detach())
        reindexer.step()
        assert float(loss_of(model).detach()) <= before
    assert reindexer.accepted > 0 and reindexer.moved > 0


def test_a_refused_exchange_changes_nothing() -> None:
    model = network()
    values = iter(range(1000))
    optimiser, reindexer = made(model, method="exchange", closure=lambda: float(next(values)), interval=1)  # every loss is above the one before
    loss_of(model).backward()
    before = copy.deepcopy(model.state_dict())
    reindexer.step()
    assert reindexer.refused == 2 and reindexer.moved == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_it_stops_at_until_and_takes_its_hooks_away() -> None:
    model = network()
    optimiser, reindexer = made(model, until=6, interval=2)
    run(model, 6, optimiser, reindexer)
    moved = reindexer.moved
    idx = layer_idx(model[0])
    run(model, 6, optimiser, reindexer)
    assert reindexer.moved == moved > 0 and torch.equal(layer_idx(model[0]), idx) and not model[0]._forward_hooks


def test_an_interrupted_run_resumes_on_the_same_bits() -> None:
    model = network()
    optimiser, reindexer = made(model)
    run(model, 6, optimiser, reindexer)
    state = copy.deepcopy((model.state_dict(), optimiser.state_dict(), reindexer.state_dict()))
    rest = run(model, 6, optimiser, reindexer)
    again = network()
    optimiser, reindexer = made(again)
    again.load_state_dict(state[0])
    optimiser.load_state_dict(state[1])
    reindexer.load_state_dict(state[2])
    assert run(again, 6, optimiser, reindexer) == rest
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_trainer_of_transformers_calls_it() -> None:
    transformers = pytest.importorskip("transformers")
    _, reindexer = made(network())
    callback = reindexer.transformers_callback()
    assert isinstance(callback, transformers.TrainerCallback)
    callback.on_step_end(None, None, None, model=None)
    assert reindexer.count == 1


def test_the_trainer_of_lightning_calls_it_once_a_step() -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            return self.inner(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(rbe_torch.param_groups(self))

    module = Module()
    reindexer = rbe_torch.Reindexer(module, until=100, interval=4, method="gradient")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(24, module.inner[0].in_features)), batch_size=2)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                                accumulate_grad_batches=2, callbacks=[reindexer.lightning_callback()])
    trainer.fit(module, data)
    assert reindexer.count == trainer.global_step == 6 and reindexer.moved > 0


@pytest.mark.parametrize("options, text", [
    ({"until": 0}, "until: is 0"), ({"interval": True}, "interval: is True"), ({"fraction": 0.0}, "fraction: is 0.0"), ({"batches": 9}, "batches: is 9"),
    ({"method": "best"}, "method: is 'best'"), ({"method": "exchange"}, "closure: is None"),
])  # fmt: skip
def test_bad_arguments_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made(network(), **options)


@pytest.mark.parametrize("layout", ["rbe9r_g8", "rbe8x2_g8"])
def test_codes_that_cannot_move_are_refused(layout: str) -> None:
    with pytest.raises(ValueError, match="codes can be moved"):
        made(network(layout))
