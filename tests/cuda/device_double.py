#!/usr/bin/env python3
"""Runs a Python program as if a GPU were there: torch's "cuda" is the CPU, and rbe_torch's library the one that runs its CUDA kernels there.

    device_double.py PROGRAM ARGUMENTS | -m MODULE ARGUMENTS | -c CODE

For programs that only a machine with a GPU runs otherwise (benchmarks/cuda_on_device.sh), so that they fail here rather than there. Streams
do nothing, events take the time of this machine, a captured graph is the list of its operators, run again by replay, a compiled function is
the function. RBE_EVERY=N leaves every Nth test of pytest.
"""

from __future__ import annotations

import contextlib
import functools
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FACTORIES = "arange empty eye full ones rand randint randn randperm tensor zeros ones_like rand_like randn_like zeros_like".split()


def is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.split(":")[0] == "cuda") or (isinstance(value, torch.device) and value.type == "cuda")


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with the CPU wherever an argument names a CUDA device."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return function(*("cpu" if is_cuda(a) else a for a in args), **{k: "cpu" if is_cuda(v) else v for k, v in keywords.items()})

    return call


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.timed, self.at = enable_timing, 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        assert self.timed and end.timed, "an event without enable_timing has no time"
        return (end.at - self.at) * 1e3


class Graph:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def replay(self) -> None:
        assert self.calls, "nothing was captured"
        with torch.no_grad():
            for function, args, keywords, held in self.calls:
                for old, new in zip(tree_leaves(held), tree_leaves(function(*args, **keywords)), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.copy_(new)


class Record(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204  torch's own signature
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def stream_context(_stream: Stream) -> Iterator[None]:
    yield


def install() -> None:
    """Puts the doubles in torch's place."""
    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    torch.Tensor.to = on_cpu(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *_, **__: self
    within = DeviceContext.__torch_function__

    def without_cuda(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
        return func(*args, **(kwargs or {})) if self.device.type == "cuda" else within(self, func, types, args, kwargs)

    DeviceContext.__torch_function__ = without_cuda
    mode = ["default"]
    doubles = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda *_: "this CPU in place of a device",
        "empty_cache": lambda: None, "memory_allocated": lambda *_: 0, "synchronize": lambda *_: None,
        "get_sync_debug_mode": lambda: mode[0], "set_sync_debug_mode": lambda value: mode.__setitem__(0, value),
        "Stream": Stream, "current_stream": lambda *_: Stream(), "stream": stream_context, "Event": Event, "CUDAGraph": Graph, "graph": Record,
    }  # fmt: skip
    for name, double in doubles.items():
        setattr(torch.cuda, name, double)
    torch.version.cuda = "none"
    torch.compile = lambda function, **_: function  # the compiler asks the driver


class Sample:
    """A plugin of pytest: every Nth test, and none that needs two devices or a compiler that asks the driver."""

    @pytest.hookimpl(trylast=True)  # of what -k leaves
    def pytest_collection_modifyitems(self, config, items) -> None:  # noqa: ANN001
        every = int(os.environ.get("RBE_EVERY", "1"))
        no_double = ("two_devices", "opcheck", "compile", "test_compiler")
        possible = [item for item in items if not any(word in item.nodeid for word in no_double)]
        config.hook.pytest_deselected(items=[item for item in items if item not in possible[::every]])
        items[:] = possible[::every]


def main() -> None:
    install()
    what, *rest = sys.argv[1:]
    if what == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "-c", "exec"), {"__name__": "__main__"})  # noqa: S102  what `python -c` does
    elif what == "-m" and rest[0] == "pytest":
        sys.path.insert(0, os.getcwd())
        sys.exit(pytest.main(rest[1:], plugins=[Sample()]))
    elif what == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        sys.path[0] = os.path.dirname(os.path.abspath(what))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    main()
