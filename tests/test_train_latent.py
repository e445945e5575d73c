"""Latent training and distillation: the forward pass is what the codes give, the gradient goes straight through, and what is finished is
what was evaluated."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rbe_torch
from rbe_torch import Distillation, RBELinear
from rbe_torch.latent import LatentLinear, set_amplitude_bits

LAYOUTS = ["rbe22_g8", "rbe8x2_g8", "rbe9r_g4", "rbe8_g8+lr2"]


def network(layout: str = "rbe22_g8", **options) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 96), nn.Tanh(), nn.Linear(96, 4, bias=False))  # more groups than basis vectors: codes lose something
    rbe_torch.compress(model, layout, progress=False)
    return rbe_torch.prepare_training(model, method="latent", **options)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(4))
    return x, torch.sin(x[:, :4] * 2)


def train(model: nn.Module, steps: int, optimiser: torch.optim.Optimizer | None = None) -> list[float]:
    optimiser = optimiser or torch.optim.Adam(model.parameters(), lr=1e-2)
    x, y = data()
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (model(x) - y).square().mean()
        (loss + rbe_torch.latent_loss(model, 1e-3, 1e-3)).backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*loses .* of the weights:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_learns_and_what_is_finished_is_what_was_evaluated(layout: str) -> None:
    model = network(layout)
    losses = train(model, 60)
    assert losses[-1] < 0.6 * losses[0]
    x, _ = data()
    with torch.no_grad():
        want = model.eval()(x)
    rbe_torch.finish_training(model)
    assert type(model[0]) is RBELinear and not model[0].training_form and "latent" not in model.state_dict()
    assert float((model(x).detach() - want).abs().max()) < 2e-3 * float(want.abs().max())  # the basis was fp16 already; another order of sums


def test_the_forward_pass_is_the_codes_and_the_gradient_is_the_dense_one() -> None:
    lin = network()[0]
    lin.latent.data += 0.05 * torch.randn(lin.latent.shape)
    x = torch.randn(5, 16)
    lin(x).square().sum().backward()
    weight = torch.ops.rbe.decode(lin.packed, lin.basis, lin.gain, **lin._options)
    assert not torch.allclose(weight, lin.latent)
    dense = weight.clone().requires_grad_()
    F.linear(x, dense, lin.bias.detach()).square().sum().backward()
    torch.testing.assert_close(lin.latent.grad, dense.grad, rtol=1e-5, atol=1e-5)


def test_between_encodings_the_codes_stay() -> None:
    model = network(interval=3)
    seen = []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(7):
        train(model, 1, optimiser)
        seen.append(model[0].packed.clone())
    same = [torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, True, False]


def test_fewer_amplitude_bits_are_kept_to_the_end() -> None:
    model = network()
    set_amplitude_bits(model, 3)
    train(model, 3)
    rbe_torch.finish_training(model)
    assert int((model[0].codes & 31).max()) == 0 and int((model[0].codes & 255).max()) > 0


def test_a_temperature_draws_other_codes_and_evaluation_does_not() -> None:
    model = network(temperature=0.3)
    x, _ = data()
    torch.manual_seed(0)
    first, second = (model(x) for _ in range(2))
    assert not torch.equal(first, second)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))


def test_an_interrupted_run_resumes_on_the_same_bits() -> None:
    model = network(interval=4)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    train(model, 6, optimiser)
    state = copy.deepcopy((model.state_dict(), optimiser.state_dict()))
    rest = train(model, 5, optimiser)
    again = network(interval=4)
    train(again, 2)
    optimiser = torch.optim.Adam(again.parameters(), lr=1e-2)
    again.load_state_dict(state[0])
    optimiser.load_state_dict(state[1])
    assert train(again, 5, optimiser) == rest


@pytest.mark.parametrize("options, text", [
    ({"basis": "trained"}, "basis: is 'trained'"), ({"interval": 0}, "interval: is 0"), ({"temperature": -1.0}, "temperature: is -1.0"),
])  # fmt: skip
def test_bad_arguments_are_named(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        network(**options)


def test_forms_do_not_mix() -> None:
    model = rbe_torch.prepare_training(rbe_torch.finish_training(network()))
    with pytest.raises(ValueError, match="in direct training form"):
        rbe_torch.prepare_training(model, method="latent")
    with pytest.raises(ValueError, match="temperature: is 0.5, but"):
        network("rbe8x2_g8", temperature=0.5)
    with pytest.raises(ValueError, match="latent: has 1 values"):
        broken = network()
        broken[0].latent.data.view(-1)[0] = float("nan")
        rbe_torch.finish_training(broken)
    with pytest.raises(ValueError, match="no layer in latent training form"):
        rbe_torch.latent_loss(model)
    assert not isinstance(model[0], LatentLinear)


# ---- distillation ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, lr", [("logits", 1e-4), ("embeddings", 3e-4)])
def test_a_compressed_model_comes_nearer_to_its_teacher(kind: str, lr: float) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 6))
    teacher = Distillation.of(model, kind)
    rbe_torch.compress(model, "rbe22_g8", progress=False)
    rbe_torch.prepare_training(model)
    assert not any(p.requires_grad and any(p is q for q in teacher.teacher.parameters()) for p in model.parameters()) and not list(teacher.parameters())
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model, lr))
    x, _ = data()
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = teacher(model(x), x)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_that_of_the_formula_and_padding_does_not_count() -> None:
    class Echo(nn.Module):
        def forward(self, hidden, attention_mask=None):
            return {"last_hidden_state": hidden}

    hidden, got = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = Distillation(Echo(), "embeddings")({"last_hidden_state": got}, hidden=hidden, attention_mask=mask)
    a, b = got[mask.bool()], hidden[mask.bool()]
    want = 1 - F.cosine_similarity(a, b).mean() + (a - b).square().mean() / b.square().mean()
    torch.testing.assert_close(loss, want)
    logits = Distillation(nn.Identity(), "logits", temperature=3.0)(got, hidden)
    p, q = torch.softmax(hidden / 3, -1), torch.softmax(got / 3, -1)
    torch.testing.assert_close(logits, 9 * (p * (p / q).log()).sum(-1).mean())


def test_what_a_teacher_cannot_teach_is_named() -> None:
    with pytest.raises(ValueError, match="kind: is 'hidden'"):
        Distillation(nn.Identity(), "hidden")
    with pytest.raises(ValueError, match=r"student: gives \(2, 3\), must give \(2, 4\)"):
        Distillation(nn.Identity())(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="output: the model gives a tuple without a tensor 'logits'"):
        Distillation(nn.Identity())((torch.zeros(2),), torch.zeros(2))
