"""Builds rbe_torch/librbe with CMake. The library uses neither Python's nor libtorch's ABI: one wheel serves every Python >= 3.10."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"
LIBRARY = "librbe.dylib" if sys.platform == "darwin" else "librbe.so"


def run(*command: str) -> None:
    """Runs cmake of this Python's environment, or else of PATH; what it says is shown only where it fails."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    env = {**os.environ, "PATH": path, "MAKEFLAGS": "--no-print-directory"}  # and no flags of a make that runs pip
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise SystemExit(f"rbe_torch: building needs {command[0]} >= 3.20 (pip install cmake)") from None
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nrbe_torch: {' '.join(command)} failed with status {done.returncode}")


class BuildLibrary(build_ext):
    """Compiles with CMake, then puts the library where setuptools looks for the extension."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)  # setuptools asks with the package and without

    def build_extension(self, ext: Extension) -> None:
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        options = [f"-DRBE_CUDA={os.environ.get('RBE_CUDA') or 'AUTO'}", f"-DRBE_CUDA_ARCHITECTURES={os.environ.get('RBE_CUDA_ARCHITECTURES', '')}"]
        run("cmake", "-S", str(ROOT), "-B", str(BUILD), *options)
        run("cmake", "--build", str(BUILD), "--parallel", jobs, "--target", "rbe")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old library open keeps it
        shutil.copyfile(BUILD / LIBRARY, target)


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension("rbe_torch.librbe", sources=[])], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
