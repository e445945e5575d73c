"""CUDA: the operators with the kernels run on the CPU, and what only a device shows: graphs, streams, no waiting, memory given back."""

from __future__ import annotations

import copy
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
DRY_RUN_EVERY = 23  # of some hundred tests that the script for a GPU runs, here by kernels on the CPU
KERNELS, STANDIN = ON_HOST / "librbe_on_host.so", ON_HOST / "libcublaslt_standin.so"
SECONDS = 600

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# bfloat16 tables and weights (docs/cuda.md), largest error over the largest output; float32 differs in the order of its sums
PARITY = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}
LAYOUTS = ["rbe22_g64", "rbe32_g16", "rbe9r_g16", "rbe8x2_g8", "rbe16s_g8", "rbe8x2_g8+int8"]


needs_kernels_on_the_host = pytest.mark.skipif(
    not (KERNELS.exists() and STANDIN.exists()), reason="needs librbe_on_host.so: make test-c (Linux, x86-64)"
)


@needs_kernels_on_the_host
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


@needs_kernels_on_the_host
def test_the_script_for_a_machine_with_a_gpu_runs_to_its_end_with_kernels_on_the_host() -> None:
    """tests/cuda/dry_run.py: what is only run on a device must not fail there for want of having been run."""
    command = [sys.executable, str(ROOT / "tests" / "cuda" / "dry_run.py"), str(ON_HOST), "--every", str(DRY_RUN_EVERY)]
    command += ["--divide", "64", "--only", "rbe22_g64 4096"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for line in ("largest difference: 0.00", "== compute-sanitizer racecheck", "gates", "f + b", "written: "):
        assert line in done.stdout, done.stdout[-4000:]


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
@pytest.mark.parametrize("layout", ["rbe22_g16", "rbe9r_g16", "rbe8x2_g8", "rbe16s_g8", "rbe22x2_g5"])
def test_encoded_words_are_those_of_the_cpu(layout: str) -> None:
    case = make_case(layout, 70, 150, ())
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(70, 150, generator=generator) / 12, torch.randn(400, 150, generator=generator)
    hessian = x.T @ x / 400 + 0.01 * torch.eye(150)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()
    given = (weight, case.basis, case.gain)
    moved = [t.cuda() for t in given]
    want = torch.ops.rbe.encode(*given, **case.keywords)
    assert torch.equal(torch.ops.rbe.encode(*moved, **case.keywords).cpu(), want)
    want = torch.ops.rbe.encode_calibrated(*given, hessian, factor, **case.keywords, sweeps=1)
    assert torch.equal(torch.ops.rbe.encode_calibrated(*moved, hessian.cuda(), factor.cuda(), **case.keywords, sweeps=1).cpu(), want)


@needs_device
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe22_g16", "rbe16s_g8+lr2", "rbe8x2_g8+int8"])
def test_a_model_on_a_device_is_compressed_as_on_the_cpu(layout: str, calibrated: bool) -> None:
    torch.manual_seed(2)
    models = [torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 16)).eval()]
    models.append(copy.deepcopy(models[0]).to("cuda"))
    batches = [torch.randn(64, 24) for _ in range(3)]
    outputs, reports = [], []
    for model, device in zip(models, ("cpu", "cuda"), strict=True):
        calibration = [batch.to(device) for batch in batches] if calibrated else None
        reports.append(rbe_torch.compress(model, layout, calibration=calibration, progress=False))
        with torch.no_grad():
            outputs.append(model(batches[0].to(device)).cpu())
    converted = [[row.name for row in report.rows if row.layout] for report in reports]
    assert isinstance(models[1][0], rbe_torch.RBELinear) and converted[0] == converted[1]
    assert all(tensor.device.type == models[1][0].gain.device.type for tensor in models[1].state_dict().values())
    if not calibrated:  # moments are float32 sums in another order
        assert torch.equal(models[0][0].codes, models[1][0].codes.cpu())
    limit = (0.2 if calibrated else 1e-4) * outputs[0].abs().max()
    assert (outputs[0] - outputs[1]).abs().max() < limit


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
