"""Timing side by side: contestants take turns in one process, thread CPU time for one thread, minimum and median of many turns.

A benchmark verifies its contestants against float64 first, then times them. `Machine` measures what bounds them: the rate of a large
float32 matrix product (multiply-adds) and of reading memory that no cache holds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


def cache_bytes() -> int:
    """The largest cache of the first CPU; 64 MiB where the system does not say."""
    sizes = [64 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        digits, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1]
        sizes.append(int(digits) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes)


COLD_BYTES = min(max(512 << 20, 3 * cache_bytes()), 2 << 30)  # what rotates through memory so that no cache holds it


def cpu_name() -> str:
    """The model that the kernel names, with what it can do since a virtual machine often hides the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    read = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wanted = ("avx2", "avx512f", "avx512vbmi", "avx512_vnni", "avx512_fp16", "amx_tile", "asimd")
    flags = [flag for flag in wanted if flag in read.get("flags", read.get("Features", "")).split()]
    return f"{read.get('model name', platform.machine())} [{' '.join(flags)}]"


def clock() -> Callable[[], float]:
    """CPU seconds of this thread when torch has one thread (steady on a busy machine), else wall-clock seconds."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass
class Timing:
    """Seconds a call."""

    minimum: float
    median: float


def race(contestants: dict[str, Sequence[Callable[[], object]]], seconds: float, flush: bool = False) -> dict[str, Timing]:
    """Times each contestant, turn by turn, until `seconds` are used up (at least five turns).

    A contestant is a list of calls that do the same work on different memory: with many, each finds its data cold. Contestants are that far apart in
    their lists that none finds what another one, which shares its memory, has just read. flush: reads more memory than the caches hold before every
    call, outside the clock, for contestants that cannot be copied.
    """
    now = clock()
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    other = torch.zeros(COLD_BYTES // 4) if flush else torch.zeros(0)
    for calls in contestants.values():
        calls[0]()
    stop, turn = time.perf_counter() + seconds, 0
    while turn < 5 or time.perf_counter() < stop:
        for place, (name, calls) in enumerate(contestants.items()):
            call = calls[(turn + place * len(calls) // len(contestants)) % len(calls)]
            other.sum()
            start = now()
            call()
            samples[name].append(now() - start)
        turn += 1
    return {name: Timing(min(s), statistics.median(s)) for name, s in samples.items()}


@dataclass
class Machine:
    """What a result was measured on, and the two rates that bound it."""

    cpu: str
    isa: str
    threads: int
    torch: str
    fma_per_second: float = field(default=0.0)
    read_bytes_per_second: float = field(default=0.0)

    @classmethod
    def measure(cls) -> "Machine":
        from rbe_torch import _ops

        a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
        big = torch.zeros(COLD_BYTES // 4)
        timings = race({"mm": [lambda: torch.mm(a, b)], "read": [lambda: torch.sum(big)]}, seconds=2.0)
        return cls(
            cpu_name(), _ops.isa(), torch.get_num_threads(), torch.__version__,
            1536**3 / timings["mm"].minimum, COLD_BYTES / timings["read"].minimum,
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.cpu}, isa {self.isa}, threads {self.threads}, torch {self.torch}\n"
            f"measured: float32 products {self.fma_per_second / 1e9:.0f} G multiply-adds/s, memory read {self.read_bytes_per_second / 1e9:.1f} GB/s"
        )


def copies_for_cold(bytes_each: int) -> int:
    """How many buffers of this size no cache holds together."""
    return max(2, math.ceil(COLD_BYTES / max(1, bytes_each)))


def table(rows: list[dict], columns: Sequence) -> str:
    """A Markdown table."""
    head = [str(column) for column in columns]
    body = [[str(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in body), 1) for i, name in enumerate(head)]
    lines = [head, ["-" * w for w in widths], *body]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines)


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files; None, said in a line, where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON and the picture")
    result.add_argument("--threads", type=int, default=1)
    result.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    result.add_argument("--full", action="store_true", help="every size, token count and layout (tens of minutes)")
    result.add_argument("--only", default="", help="only cases whose name contains this")
    return result


def run_cases(arguments: argparse.Namespace, name: str, cases: dict[str, Callable[[Machine], dict | list[dict]]]) -> tuple[list, Path]:
    """Measures the machine, runs the cases that --only leaves (a row each, or some), prints them and the table, writes the JSON. Returns rows and path."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    chosen = [case for text, case in cases.items() if arguments.only in text]
    if not chosen:
        raise SystemExit(f"--only {arguments.only!r} leaves no case")
    machine, rows = Machine.measure(), []
    print(machine)
    for case in chosen:
        made = case(machine)
        for row in made if isinstance(made, list) else [made]:
            rows.append(row)
            print(*row.values(), sep="  ", flush=True)
    print("\n" + table(rows, list(rows[0])))
    path = write(arguments.out, f"{name}_threads{arguments.threads}", machine, rows)
    print(f"\nwritten: {path}")
    return rows, path


def write(out: Path, name: str, machine: Machine, rows: list[dict[str, object]]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"machine": asdict(machine), "rows": rows}, indent=1) + "\n")
    return path
