"""Inputs that the product was not made for: each is computed right or refused by name. Risks: a silent wrong answer, a crash, an error about something else."""

from __future__ import annotations

import pytest
import torch
from layer_cases import made
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import rbe_torch


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_and_the_advice_works(layout: torch.layout, grad: bool) -> None:
    lin, rows = made(n=8), [torch.randn(2, 8), torch.randn(3, 8)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"x: is a nested tensor.*x\.values\(\)"):
        lin(x)
    if layout is torch.jagged:
        y = torch.nested.nested_tensor_from_jagged(lin(x.values()), x.offsets())
        for got, row in zip(y.unbind(), rows, strict=True):
            torch.testing.assert_close(got, lin(row))


def test_a_tangent_is_not_lost_where_no_gradient_is_wanted() -> None:
    """torch.no_grad leaves forward-mode AD on, and the operator without autograd would drop the tangent."""
    x = torch.randn(2, 37)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        made()(forward_ad.make_dual(x, x))


class Double(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


@pytest.mark.parametrize("name", ["gain", "basis", "bias", "log_gain", "amplitude"])
def test_a_parametrised_tensor_is_used_and_is_not_lost_in_a_checkpoint(name: str, tmp_path) -> None:
    lin, x = made(), torch.randn(2, 37)
    if name in ("log_gain", "amplitude"):
        rbe_torch.prepare_training(lin)
    before = lin(x) - lin.bias
    parametrize.register_parametrization(lin, name, Double())
    after = lin(x) - lin.bias
    torch.testing.assert_close(after, nn.functional.linear(x, lin.weight))
    assert torch.allclose(after, before) == (name == "bias")
    lin.load_state_dict(lin.state_dict())
    assert torch.equal(lin(x) - lin.bias, after)
    with pytest.raises(ValueError, match="remove_parametrizations" if "_" not in name and name != "amplitude" else "training form"):
        rbe_torch.save_pretrained(nn.Sequential(lin), tmp_path)
    parametrize.remove_parametrizations(lin, name)
    torch.testing.assert_close(lin(x) - lin.bias, after)
