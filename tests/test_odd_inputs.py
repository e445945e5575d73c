"""Inputs that the product was not made for: each is computed right or refused by name. Risks: a silent wrong answer, a crash, an error about something else."""

from __future__ import annotations

import pytest
import torch
from layer_cases import made


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
