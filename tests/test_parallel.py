"""Two processes train as one: DDP, FSDP2 and tensor parallelism give the gradients, the steps and the checkpoints of a single process."""

from __future__ import annotations

import copy
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.multiprocessing.spawn import ProcessException

import rbe_torch

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
WORLD, SECONDS = 2, 120
CLOSE = 1e-4  # sums over tokens or rows in another order, after Adam's first steps


def network(layout: str = "rbe22_g8", basis: str = "trained") -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    rbe_torch.convert(model, layout, seed=2, basis=basis)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 32, generator=generator), torch.randn(8, 16, generator=generator)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, optimiser=None, steps: int = 3) -> torch.optim.Optimizer:
    optimiser = optimiser or torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - y).square().mean().backward()
        optimiser.step()
    return optimiser


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def same_as_single(model: nn.Module, single: nn.Module) -> None:
    found = {name.removeprefix("module."): full(p) for name, p in model.named_parameters()}
    wanted = dict(single.named_parameters())
    assert set(found) == set(wanted)
    for name, p in wanted.items():
        torch.testing.assert_close(found[name], p.detach(), rtol=CLOSE, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# ---- what each process does --------------------------------------------------------------------------------------------------------
def data_parallel(rank: int) -> None:
    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    single, model = network(), network()
    train(single, x, y)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, x[mine], y[mine])
    same_as_single(wrapped, single)


def fully_sharded(rank: int) -> None:
    import rbe_torch.parallel as parallel

    x, y = batch()
    mine = slice(4 * rank, 4 * rank + 4)
    for basis in ("trained", "seeded"):
        single, model = network(basis=basis), network(basis=basis)
        train(single, x, y)
        parallel.fully_shard(model)
        assert hasattr(model[0].amplitude, "full_tensor") and model[0].amplitude.to_local().shape[0] == 32
        assert not hasattr(model[0].basis, "full_tensor") and model[0].basis is model[2].basis
        train(model, x[mine], y[mine])
        same_as_single(model, single)
        states = model.state_dict()  # its packed codes hold the whole amplitude of now
        whole = network(basis=basis)
        whole.load_state_dict({key: full(value) for key, value in states.items()})
        assert torch.equal(whole[0].codes, rbe_torch.codes.with_amplitude(single[0].codes, full(model[0].amplitude), single[0].layout))
        watch = rbe_torch.TrainingWatch(model)
        watch.step(1.0)
        if rank == 1:
            model[2].amplitude.grad.to_local()[0] = float("nan")
        with pytest.raises(rbe_torch.TrainingDiverged, match="step 2: the gradient of amplitude of layer '2'"):
            watch.step(1.0)  # in both processes, or one would wait for the other


def resumed(rank: int) -> None:
    """A sharded run that is stopped and goes on gives the bits of one that is not."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    import rbe_torch.parallel as parallel

    def make():
        model = parallel.fully_shard(network())
        return model, torch.optim.AdamW(rbe_torch.param_groups(model), betas=(0.9, 0.98))

    x, y = batch()
    model, optimiser = make()
    train(model, x, y, optimiser)
    states = copy.deepcopy(get_state_dict(model, optimiser))
    train(model, x, y, optimiser)
    again, other = make()
    train(again, x, y, other, 1)
    set_state_dict(again, other, model_state_dict=states[0], optim_state_dict=states[1])
    train(again, x, y, other)
    for (name, a), (_, b) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(full(a), full(b)), name


def tensor_parallel(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from rbe_torch.parallel import ColumnParallel, RowParallel

    mesh = init_device_mesh("cpu", (WORLD,))
    x, y = batch()
    for layout in ("rbe22_g8", "rbe9r_g4", "rbe8x2_g8", "rbe4r_g4"):
        single, model = network(layout), network(layout)
        parallelize_module(model, mesh, {"0": ColumnParallel(), "2": RowParallel()})
        assert model[0].packed.to_local().shape[0] == 32 and model[2].packed.to_local().shape[1] * 2 == single[2].packed.shape[1]
        torch.testing.assert_close(model(x), single(x), rtol=1e-5, atol=1e-5)
        for index in (0, 2):  # before sums in another order move an amplitude across the border of its cell
            assert torch.equal(full(model[index].codes), single[index].codes)
        train(single, x, y)
        train(model, x, y)
        same_as_single(model, single)


def refusals(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    import rbe_torch.parallel as parallel

    mesh = init_device_mesh("cpu", (WORLD,))
    for module, style, text in (
        (rbe_torch.RBELinear(32, 63), parallel.ColumnParallel(), "has 63 out_features"),
        (rbe_torch.RBELinear(24, 8, layout="rbe22_g8"), parallel.RowParallel(), "cannot have whole groups"),
        (rbe_torch.RBELinear(32, 8, layout="rbe22_g8+int8"), parallel.RowParallel(), "with a residual"),
        (nn.Linear(8, 8), parallel.RowParallel(), "is a Linear"),
    ):
        with pytest.raises((ValueError, TypeError), match=text):
            parallelize_module(nn.Sequential(module), mesh, {"0": style})
    with pytest.raises(ValueError, match="no RBELinear"):
        parallel.fully_shard(nn.Linear(2, 2))


# ---- running them ------------------------------------------------------------------------------------------------------------------
WORK: dict[str, Callable[[int], None]] = {work.__name__: work for work in (data_parallel, fully_sharded, resumed, tensor_parallel, refusals)}


def process(rank: int, port: int, folder: str) -> None:
    """All of the work, one after another, since starting a process takes longer than any of it; what fails writes its trace."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS))
    for name, work in WORK.items():
        try:
            work(rank)
            result = ""
        except BaseException:
            result = traceback.format_exc()
        Path(folder, f"{name}{rank}").write_text(result)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(process, (port, str(folder)), nprocs=WORLD, join=False)
    try:
        while not context.join(timeout=SECONDS):
            pass
    except ProcessException as error:  # a process that died leaves no file for what it was at
        (folder / "died").write_text(str(error))
    return folder


@pytest.mark.parametrize("name", WORK)
def test_two_processes_train_as_one(name: str, results: Path) -> None:
    found = [results / f"{name}{rank}" for rank in range(WORLD)]
    died = results / "died"
    assert all(path.is_file() for path in found), died.read_text() if died.is_file() else "a process wrote no result"
    traces = "\n".join(path.read_text() for path in found)
    assert not traces.strip(), traces
