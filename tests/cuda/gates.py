#!/usr/bin/env python3
"""What the compiler made of the CUDA kernels, without a GPU: no spills, instructions where meant, registers in a table.

    gates.py [--arch 80 86 89 90 120] [--jobs N]

Needs nvcc; instructions are looked at where nvdisasm is too. Exit status 0 passed, 1 a gate failed, 77 skipped because there is no nvcc.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-O3", "-std=c++17", "-fmad=false", f"-I{ROOT}"]  # as CMakeLists.txt
SKIPPED = 77
# instruction -> kernels (start of the name) that must hold it
MEANT = {
    "HMMA": ["tiles_half", "decode_mma", "fragments"],
    "LDSM": ["tiles_half", "decode_mma"],
    "LDGSTS": ["tiles_half", "decode_mma", "gather_f32"],  # cp.async
    "LDS.128": ["tiles_half", "fragments"],
    "LDG.E.128": ["lookup"],
}
COLUMNS = ["registers", "shared", "spilled", *MEANT]


def run(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def plain(mangled: str) -> str:
    """The kernel's name with its template arguments, as c++filt gives it."""
    if not shutil.which("c++filt"):
        return mangled
    return re.sub(r"^void |\(.*$", "", run("c++filt", mangled).strip()).replace("(int)", "")


def report(source: Path, arch: str, folder: Path) -> list[dict[str, object]]:
    """Compiles one file for one architecture and returns a row for each kernel."""
    cubin = folder / f"{source.stem}.{arch}.cubin"
    said = run("nvcc", *FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", str(source), "-o", str(cubin))
    code = run("nvdisasm", "-c", str(cubin)) if shutil.which("nvdisasm") else ""
    bodies = dict(re.findall(r"^\s*\.section\s+\.text\.(\w+),.*?$(.*?)(?=^\s*\.section\s|\Z)", code, re.MULTILINE | re.DOTALL))
    rows = []
    for name, text in re.findall(r"Compiling entry function '(\w+)' for.*?$(.*?)(?=Compiling entry|\Z)", said, re.MULTILINE | re.DOTALL):
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        )
        shared = re.search(r"(\d+) bytes smem", text)
        row = {
            "kernel": plain(name), "sm": arch, "registers": re.search(r"Used (\d+) registers", text).group(1),
            "shared": shared.group(1) if shared else "0", "spilled": stack + stores + loads,
        }  # fmt: skip
        body = bodies.get(name, "")
        row.update({meant: len(re.findall(rf"\b{re.escape(meant)}\b", body)) if code else "-" for meant in MEANT})
        if code:
            row["spilled"] += len(re.findall(r"\b(?:LDL|STL)\b", body))
        rows.append(row)
    return rows


def failures(rows: list[dict[str, object]]) -> list[str]:
    found = [f"{r['kernel']} for sm_{r['sm']} spills registers or has a stack" for r in rows if r["spilled"]]
    for meant, kernels in MEANT.items():
        found += [
            f"{r['kernel']} for sm_{r['sm']} has no {meant}" for r in rows if str(r["kernel"]).startswith(tuple(kernels)) and r[meant] == 0
        ]
    missing = [kernel for kernels in MEANT.values() for kernel in kernels if not any(str(r["kernel"]).startswith(kernel) for r in rows)]
    return found + [f"there is no kernel {kernel}" for kernel in dict.fromkeys(missing)]


def table(rows: list[dict[str, object]], architectures: list[str]) -> str:
    """A row a kernel; of what differs between architectures a value for each, in their order."""
    text = ["| kernel | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1)]
    for kernel in dict.fromkeys(str(row["kernel"]) for row in rows):
        found = [next(row for row in rows if row["kernel"] == kernel and row["sm"] == sm) for sm in architectures]
        cells = [[str(row[column]) for row in found] for column in COLUMNS]
        text.append(f"| {kernel} | " + " | ".join(cell[0] if len(set(cell)) == 1 else "/".join(cell) for cell in cells) + " |")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["90"], help="architectures, without sm_")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if not shutil.which("nvcc"):
        print("skipped: needs nvcc")
        return SKIPPED
    if not shutil.which("nvdisasm"):
        print("instructions are not looked at: needs nvdisasm (pip install nvidia-cuda-nvdisasm)")
    sources = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(report, source, arch, Path(folder)) for arch in arguments.arch for source in sources]
        rows = [row for job in jobs for row in job.result()]
    versions = [run(tool, "--version").strip().splitlines()[-2].split("release ")[-1] for tool in ("nvcc", "nvdisasm") if shutil.which(tool)]
    print("nvcc, nvdisasm " + ", ".join(versions) + "; sm_" + "/".join(arguments.arch) + "\n")
    print(table(rows, arguments.arch))
    found = failures(rows)
    print("\n".join(["", *found]) if found else f"\n{len(rows)} kernels pass (each architecture counted)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
