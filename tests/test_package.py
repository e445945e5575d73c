"""Importing the package: which torch it refuses, and that a name it lacks is an ordinary AttributeError."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rbe_torch


def in_a_fresh_process(code: str) -> None:
    """Runs `code` with this process's path; its own assertions decide."""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("found", ["2.9.1+cpu", "1.13.0"])
def test_an_older_torch_is_refused_with_what_was_found_and_what_is_needed(found: str) -> None:
    in_a_fresh_process(f"""
import torch
torch.__version__ = {found!r}
try:
    import rbe_torch
except ImportError as error:
    assert "needs torch >= 2.10" in str(error) and "found torch {found}" in str(error), error
else:
    raise AssertionError("imported")
""")


@pytest.mark.parametrize("found", ["2.10.0", "2.10.0a0+git123abc", "3.0.0"])
def test_the_oldest_and_newer_versions_are_taken(found: str) -> None:
    in_a_fresh_process(f"import torch; torch.__version__ = {found!r}; import rbe_torch")


@pytest.mark.parametrize("name", ["no_such_thing", "linear_"])
def test_a_name_that_is_not_there_is_an_attribute_error(name: str) -> None:
    assert not hasattr(rbe_torch, name) and name not in dir(rbe_torch) and name not in rbe_torch.__all__
    with pytest.raises(AttributeError, match=f"module 'rbe_torch' has no attribute '{name}'"):
        getattr(rbe_torch, name)


def test_the_hyperbolic_package_is_there_and_is_imported_only_when_it_is_asked_for() -> None:
    assert "hyperbolic" in dir(rbe_torch)
    in_a_fresh_process("""
import sys, rbe_torch
assert not {"geoopt", "transformers", "rbe_torch.hyperbolic"} & set(sys.modules)
sys.modules["geoopt"] = sys.modules["geoopt.manifolds"] = sys.modules["geoopt.manifolds.base"] = None  # as if it were not installed
try:
    rbe_torch.hyperbolic
except ImportError as error:
    assert "needs geoopt (pip install 'rbe_torch[hyperbolic]')" in str(error), error
else:
    raise AssertionError("imported")
""")


def test_every_public_name_is_there() -> None:
    assert set(rbe_torch.__all__) <= set(dir(rbe_torch)) and all(callable(getattr(rbe_torch, name)) for name in rbe_torch.__all__)


def test_show_config_names_the_class_that_activations_of_a_dtype_take() -> None:
    shapes = [("rbe8x2_g8", 512, 512, 4, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    exact, *fast, reference = rbe_torch.show_config(shapes)["kernels"].values()
    assert ", exact, " in exact and all(", fast, " in text for text in fast) and reference == "reference, float64"


@pytest.mark.parametrize("shape, message", [
    (("rbe8x2_g8", 512, 512, 4, torch.int8), "dtype: is torch.int8"),
    (("rbe8x2_g8", 0, 512, 4, torch.float32), "out_features: is 0"),
    (("rbe7_g8", 512, 512, 4, torch.float32), "layout"),
])
def test_show_config_refuses_a_shape_that_cannot_be(shape: tuple, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        rbe_torch.show_config([shape])
