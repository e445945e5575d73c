"""One layer from several Python threads, and from a forked process: the same bits as from one thread."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from rbe_torch import RBELinear

LAYOUTS = ["rbe22_g16", "rbe8x2_g8", "rbe16s_g8"]
TOKENS = (1, 9, 70)  # byte tables, a narrow tile, several tiles
THREADS, ROUNDS = 4, 25


def layer(layout: str) -> RBELinear:
    return RBELinear(256, 192, layout=layout, seed=1)


def outputs(lin: RBELinear, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Products of every size in both classes, and the gradient of x of the largest."""
    results = []
    for accuracy in ("exact", "fast"):
        lin.accuracy = accuracy
        results += [lin(x).detach() for x in inputs]
    x = inputs[-1].clone().requires_grad_()
    lin(x).sin().sum().backward()
    return [*results, x.grad]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_share_a_layer(layout: str) -> None:
    lin = layer(layout)
    lin.requires_grad_(False)
    inputs = [torch.randn(tokens, 256) for tokens in TOKENS]
    want = [lin(x) for x in inputs]
    failures: list[str] = []
    start = threading.Barrier(THREADS)

    def work() -> None:
        start.wait()
        for _ in range(ROUNDS):
            for x, right in zip(inputs, want, strict=True):
                if not torch.equal(lin(x), right):
                    failures.append(f"{x.shape[0]} tokens")

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_forked_process_computes_the_same(layout: str, tmp_path) -> None:
    lin = layer(layout)
    inputs = [torch.randn(tokens, 256) for tokens in TOKENS]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own pool does not survive a fork
    try:
        want = outputs(lin, inputs)
        child = os.fork()
        if not child:
            status = 1
            try:
                torch.save(outputs(lin, inputs), tmp_path / "outputs.pt")
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
    for got, right in zip(torch.load(tmp_path / "outputs.pt", weights_only=True), want, strict=True):
        assert torch.equal(got, right)
