#!/usr/bin/env python3
"""Runs benchmarks/cuda_on_device.sh to its end on a machine without a GPU: every line but what only a GPU or a compiler does.

    dry_run.py LIBRARIES [--every N] [OPTIONS OF benchmarks/on_cuda.py]

LIBRARIES holds librbe_on_host.so and libcublaslt_standin.so. A copy of the repository stands in for the repository, whose setup.py and
tests/cuda/gates.py are replaced (they compile; CI runs them as they are), and programs of the name of nvidia-smi, compute-sanitizer and
cmake for those. Everything else is the script's own: device_double.py gives it torch with the CPU as device.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUP = """\
import os, shutil, sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"] and os.environ["RBE_CUDA"] == "1" and os.environ["RBE_CUDA_ARCHITECTURES"] == "native"
shutil.copyfile("{libraries}/librbe_on_host.so", "rbe_torch/librbe.so")
"""
GATES = 'import sys\nassert sys.argv[1:] == ["--arch", "90"], sys.argv\nprint("gates of sm_90")\n'
PROGRAMS = {
    "nvidia-smi": "#!/bin/sh\n[ \"$1\" = --query-gpu=compute_cap ] && [ \"$2\" = --format=csv,noheader ] && echo 9.0\n",
    "compute-sanitizer": """\
#!/bin/sh
[ "$1" = --help ] && exec echo "  --kernel-name arg"
while :; do case $1 in --tool | --error-exitcode | --target-processes | --kernel-name) shift 2 ;; -*) exit 2 ;; *) break ;; esac; done
exec "$@"
""",
    "cmake": """\
#!/bin/sh
case $1 in
-S) mkdir -p build/on_host ;;
--build) mkdir -p build/on_host/tests/cuda && cp {libraries}/librbe_on_host.so {libraries}/libcublaslt_standin.so build/on_host/tests/cuda/ ;;
*) exit 2 ;;
esac
""",
    "python": '#!/bin/sh\nexec {python} {double} "$@"\n',
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", type=Path)
    parser.add_argument("--every", type=int, default=1, help="runs every Nth test and layout")
    arguments, rest = parser.parse_known_args()
    libraries = arguments.libraries.resolve()
    words = {"libraries": libraries, "python": sys.executable, "double": ROOT / "tests" / "cuda" / "device_double.py"}
    with tempfile.TemporaryDirectory() as folder:
        stage, programs = Path(folder, "repository"), Path(folder, "programs")
        for part in ("rbe_torch", "tests", "benchmarks", "docs"):
            shutil.copytree(ROOT / part, stage / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
        shutil.copyfile(ROOT / "pyproject.toml", stage / "pyproject.toml")
        (stage / "setup.py").write_text(SETUP.format(**words))
        (stage / "tests" / "cuda" / "gates.py").write_text(GATES)
        programs.mkdir()
        for name, text in PROGRAMS.items():
            (programs / name).write_text(text.format(**words) if "{" in text else text)
            (programs / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(programs / "python"), "OMP_NUM_THREADS": "1",
            "RBE_CUBLASLT": str(libraries / "libcublaslt_standin.so"), "RBE_CUDA_ON_HOST": "1", "RBE_EVERY": str(arguments.every),
        }  # fmt: skip
        environment.pop("RBE_CUDA_ARCHITECTURES", None)
        done = subprocess.run(["bash", stage / "benchmarks" / "cuda_on_device.sh", stage / "out", *rest], env=environment, check=False)
        made = sorted(path.name for path in (stage / "out").glob("*"))
        print("made:", *made)
        return done.returncode or not {"cuda.json", "cuda_gates.txt"} <= set(made)


if __name__ == "__main__":
    sys.exit(main())
