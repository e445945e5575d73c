"""CUDA: the operators with the kernels run on the CPU, and what only a device shows: graphs, streams, no waiting, memory given back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_cases import make_case

import rbe_torch
from rbe_torch import _ops

ROOT = Path(__file__).resolve().parent.parent
ON_HOST = ROOT / "build" / "tests" / "tests" / "cuda"  # made by `make test-c`
KERNELS, STANDIN = ON_HOST / "librbe_on_host.so", ON_HOST / "libcublaslt_standin.so"
SECONDS = 600

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# bfloat16 tables and weights (docs/cuda.md), largest error over the largest output; float32 differs in the order of its sums
PARITY = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}
LAYOUTS = ["rbe22_g64", "rbe32_g16", "rbe9r_g16", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+int8"]


@pytest.mark.skipif(not (KERNELS.exists() and STANDIN.exists()), reason="needs librbe_on_host.so: make test-c (Linux, x86-64)")
@pytest.mark.parametrize(
    "selected",
    [
        ["test_operators.py"],
        ["test_gradients.py", "-k", "kernels_give and (g16 or 8x2 or 16s or 4r)"],
        ["test_calibrate.py", "-k", "one_group or operator_refuses"],
    ],
    ids=["operators", "gradients", "calibration"],
)
def test_operators_the_way_of_cuda_with_kernels_on_the_host(tmp_path: Path, selected: list[str]) -> None:
    """The operators' own tests with a library that takes CPU tensors for CUDA tensors and runs the CUDA kernels on the CPU."""
    shutil.copytree(ROOT / "rbe_torch", tmp_path / "rbe_torch", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copyfile(KERNELS, tmp_path / "rbe_torch" / "librbe.so")
    # the installed package is found by a finder of its own: this makes the copy the one that is imported
    start = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / 'tests')!r}]; import rbe_torch, pytest; "
    start += f"assert rbe_torch.__file__.startswith({str(tmp_path)!r}), rbe_torch.__file__; "
    first, *rest = selected
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
        f"--rootdir={ROOT}",
        str(ROOT / "tests" / first),
        *rest,
    ]
    command = [sys.executable, "-c", start + f"sys.exit(pytest.main({arguments!r}))"]
    environment = {**os.environ, "RBE_CUBLASLT": str(STANDIN), "RBE_CUDA_ON_HOST": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_a_library_without_cuda_kernels_says_so() -> None:
    if _ops.has_cuda():
        pytest.skip("the library has CUDA kernels")
    assert "not built" in rbe_torch.show_config()["cuda"]


@needs_device
@pytest.mark.parametrize("dtype", PARITY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_moved_to_a_device_computes_what_it_did(layout: str, dtype: torch.dtype) -> None:
    layer = rbe_torch.RBELinear(300, 513, layout=layout, seed=1).to(dtype)
    for tokens in (1, 3, 16, 40, 200):
        x = torch.randn(tokens, 300, dtype=dtype)
        want = layer(x.float()).double()
        moved = layer.to("cuda")
        got = moved(x.cuda()).cpu().double()
        layer = moved.to("cpu")
        assert (got - want).abs().max() < PARITY[dtype] * want.abs().max(), tokens


@needs_device
def test_tensors_on_two_devices_are_refused() -> None:
    case = make_case()
    with pytest.raises(RuntimeError, match="x: is on cpu|must be on"):
        case.run(codes=case.codes.cuda())
    with pytest.raises(RuntimeError, match="codes: is on cpu; must be on cuda:0"):
        case.run(x=case.x.cuda())


def training_step(case) -> list[torch.Tensor]:
    y = case.run()
    return [y, *torch.autograd.grad(y.float().square().sum(), [case.x, case.basis, case.gain, case.bias])]


def on_device(layout: str, dtype: torch.dtype, tokens: int):
    with torch.device("cuda"):
        return make_case(layout, 300, 260, (tokens,), dtype).require_grad()


@needs_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(layout: str) -> None:
    case = on_device(layout, torch.bfloat16, 40)
    training_step(case)  # the first call loads libraries
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(case)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@needs_device
@pytest.mark.parametrize("tokens", [1, 16, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_captured_graph_computes_the_same_bits(layout: str, tokens: int) -> None:
    case = on_device(layout, torch.bfloat16, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training_step(case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = training_step(case)
    with torch.no_grad():
        case.x.copy_(torch.randn_like(case.x))
    graph.replay()
    for got, want in zip(captured, training_step(case), strict=True):
        assert torch.equal(got, want)


@needs_device
def test_workspaces_are_given_back() -> None:
    case = on_device("rbe22_g64", torch.bfloat16, 40)
    training_step(case)
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        training_step(case)
    assert torch.cuda.memory_allocated() == before
