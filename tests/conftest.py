"""What tests share: the devices that tests of the operators run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=_NO_CUDA)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device in turn, as torch's default: ``pytestmark = pytest.mark.usefixtures("device")`` runs a module's tests on all."""
    if request.param == "cpu":
        yield "cpu"
        return
    with torch.device(request.param):
        yield request.param
