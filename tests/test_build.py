"""The build: what a wheel is called and holds, what the library depends on, and that neither needs torch, CUDA or a network."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "rbe_torch" / ("librbe.dylib" if sys.platform == "darwin" else "librbe.so")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files with binutils")


def run(*command: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a command in the repository's root; stdout and stderr come back as one text."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built where importing torch or numpy fails and no index can be reached."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "poison").mkdir()
    for name in ("torch", "numpy"):
        (folder / "poison" / f"{name}.py").write_text(f"raise ImportError('the build imports {name}')\n")
    nowhere = "http://127.0.0.1:9"
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), ".")
    done = run(*command, PYTHONPATH=str(folder / "poison"), PIP_NO_INDEX="1", http_proxy=nowhere, https_proxy=nowhere)
    assert done.returncode == 0, done.stdout
    (made,) = folder.glob("*.whl")
    return made


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("rbe_torch", "py3", "none")
    assert platform != "any", "a wheel that holds machine code must say for which platform"


def test_wheel_holds_the_library_and_the_type_marker_and_no_sources(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert f"rbe_torch/{LIBRARY.name}" in names
    assert "rbe_torch/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    foreign = [name for name in names if not name.startswith(("rbe_torch/", "rbe_torch-"))]
    assert not foreign


def test_build_is_silent(wheel: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


@linux_only
def test_library_needs_only_the_c_runtime() -> None:
    dynamic = run("readelf", "-d", str(LIBRARY)).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed, dynamic
    stems = {name.split(".so")[0] for name in needed}
    # libstdc++: the launch stubs that nvcc writes, in a build with CUDA
    assert stems <= {"libc", "libm", "libpthread", "libdl", "librt", "libgcc_s", "libstdc++", "ld-linux-x86-64", "ld-linux-aarch64"}
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic


@linux_only
def test_library_exports_only_its_own_entry_points() -> None:
    symbols = run("nm", "-D", "--defined-only", str(LIBRARY)).stdout.split()[2::3]
    assert "rbe_torch_init" in symbols
    assert all(name.startswith("rbe_torch_") for name in symbols), symbols


def test_cuda_asked_for_without_nvcc_is_an_error_that_says_so(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert cmake, "the build needs cmake"
    done = run(cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DRBE_CUDA=1", CUDACXX=str(tmp_path / "no-nvcc"))
    assert done.returncode != 0
    assert "RBE_CUDA=1 asks for the CUDA kernels, but no working nvcc was found" in " ".join(done.stdout.split())
