"""Checkpoint: an RBE checkpoint opened for reading. It trusts nothing: names, shapes, dtypes, sizes and hashes are checked before a tensor is used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from .layout import Layout
from .linear import RBELinear
from .manifest import BASIS_PREFIX, LayerEntry, Manifest
from .pack import digest
from .problems import RESIDUALS
from .seeded import seeded_basis

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_MAX_JSON_BYTES = 64 * 2**20
_FLOATS = ("F16", "BF16", "F32", "F64")
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "F32": torch.float32}


class Checkpoint:
    """A checkpoint opened for reading, its structure checked; tensors are read, and their hashes checked, when they are asked for.

    path: the directory or the model.safetensors file. ValueError, naming the file and what is wrong with it, where it is not a whole and
    consistent checkpoint; FileNotFoundError where there is none.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        self.file = path / WEIGHTS_FILE if path.is_dir() else path
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: there is no such file; a checkpoint is a directory with {WEIGHTS_FILE}")
        try:
            self._handle = safetensors.safe_open(self.file, framework="pt", device="cpu")
            metadata = self._handle.metadata() or {}
            self.shapes = {name: self._handle.get_slice(name) for name in self._handle.keys()}
            self.shapes = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in self.shapes.items()}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self.file}: is not a whole safetensors file ({error})") from error
        with self.naming():
            self.manifest = Manifest.from_header(metadata)
            self._drawn_bases: dict[int, tuple[Layout, int] | None] = {}  # None: a tensor
            self._check_structure()
        self._bases: dict[int, nn.Parameter] = {}
        self._check_config(path if path.is_dir() else path.parent)

    @property
    def layers(self) -> dict[str, LayerEntry]:
        return self.manifest.layers

    def tensor(self, name: str) -> Tensor:
        """The stored tensor, its hash checked. Names that share a tensor read the same one."""
        name = self.manifest.aliases.get(name, name)
        try:
            tensor = self._handle.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{self.file}: tensor {name!r} cannot be read ({error})") from error
        if digest(tensor) != self.manifest.hashes[name]:
            raise ValueError(f"{self.file}: tensor {name!r} was altered: its SHA-256 is not the one in the header")
        return tensor

    def basis(self, number: int) -> nn.Parameter:
        """Basis `number` as a float32 parameter, the same object at each call."""
        if number not in self._bases:
            drawn = self._drawn_bases.get(number)
            table = self.tensor(f"{BASIS_PREFIX}{number}").float() if drawn is None else seeded_basis(*drawn)
            self._bases[number] = nn.Parameter(table, requires_grad=False)
        return self._bases[number]

    def layer(self, name: str, bias: bool = True) -> RBELinear:
        """The layer, on the CPU, every value checked; layers with the same basis share it."""
        entry = self.layers[name]
        if entry.same_as is not None:
            return self.layer(entry.same_as, bias)
        prefix = f"{name}." if name else ""
        layout = Layout.parse(entry.layout)
        with self.naming(f"layer {name!r}: "):
            layer = RBELinear.from_codes(
                self.tensor(prefix + "packed"), self.basis(entry.basis), self.tensor(prefix + "gain").float(),
                self.tensor(prefix + "bias") if entry.bias and bias else None, layout=layout, in_features=entry.in_features, seed=entry.seed,
                residual={key: self.tensor(prefix + key) for key in layout.residual_shapes(entry.out_features, entry.in_features)},
                dtype=getattr(torch, entry.dtype),
            )
            if entry.basis_seed is not None:
                layer.draw_basis_from(entry.basis_seed, "cpu")
            return layer

    def other_names(self) -> list[str]:
        """Names of the model's tensors that are no part of an RBE weight, shared ones included; biases of RBE layers are among them."""
        weights = {f"{name}.{key}" if name else key for name in self.layers for key in ("packed", "gain", *RESIDUALS)}
        return [name for name in (*self.shapes, *self.manifest.aliases) if name not in weights and not name.startswith(BASIS_PREFIX)]

    def verify(self) -> None:
        """Reads everything and checks every hash and value. ValueError names the first thing that is wrong."""
        for name in self.layers:
            self.layer(name)
        for name in self.other_names():
            self.tensor(name)

    def bytes_of(self, names: list[str]) -> int:
        """Bytes that the named tensors take in the file."""
        return sum(self.tensor_bytes(name) for name in names)

    def tensor_bytes(self, name: str) -> int:
        shape, dtype = self.shapes[name]
        bits = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}.get(dtype) or int("".join(c for c in dtype.split("_")[0] if c.isdigit()) or 8)
        return torch.Size(shape).numel() * bits // 8

    def naming(self, what: str = "") -> contextlib.AbstractContextManager[None]:
        """For a block whose errors are about this file: they become ValueErrors that name it."""
        return _naming(f"{self.file}: {what}")

    def _check_structure(self) -> None:
        manifest, expected = self.manifest, {}
        if set(manifest.hashes) != set(self.shapes):
            odd = sorted(set(manifest.hashes) ^ set(self.shapes))
            raise ValueError(f"tensors and the header's hashes differ: {odd[:3]}")
        for alias, name in manifest.aliases.items():
            if name not in self.shapes or alias in self.shapes:
                raise ValueError(f"the name {alias!r} shares tensor {name!r}, which is not there or clashes")
        for name, entry in manifest.layers.items():
            if entry.same_as is not None:
                if entry.same_as not in manifest.layers or manifest.layers[entry.same_as].same_as is not None:
                    raise ValueError(f"layer {name!r} is the same as {entry.same_as!r}, which is not a layer of its own")
                continue
            prefix, m, n, layout = f"{name}." if name else "", entry.out_features, entry.in_features, Layout.parse(entry.layout)
            expected[prefix + "packed"] = ((m, layout.packed_row_bytes(n)), ("uint8",))
            expected[prefix + "gain"] = ((m,), ("float16", "float32"))
            table = None if entry.basis_seed is None else (layout, entry.basis_seed)
            other = self._drawn_bases.setdefault(entry.basis, table)
            if (other is None) != (table is None) or (table is not None and (other[0].basis_shape, other[1]) != (layout.basis_shape, table[1])):
                raise ValueError(f"layer {name!r}: basis {entry.basis} is another layer's, drawn from another seed, in another shape or stored")
            if table is None:
                expected[f"{BASIS_PREFIX}{entry.basis}"] = (layout.basis_shape, ("float16", "float32"))
            for key, (shape, dtype) in layout.residual_shapes(m, n).items():
                expected[prefix + key] = (shape, (dtype,))
            if entry.bias and prefix + "bias" not in self.shapes and prefix + "bias" not in manifest.aliases:
                raise ValueError(f"tensor {prefix + 'bias'!r} is missing")
            if entry.bias:
                kind = self.shapes[manifest.aliases.get(prefix + "bias", prefix + "bias")][1]
                if kind not in _FLOATS:
                    raise ValueError(f"tensor {prefix + 'bias'!r} is {kind}, must be floating-point")
            strays = [key for key in ("weight", *RESIDUALS) if prefix + key in self.shapes and prefix + key not in expected]
            if strays or (not entry.bias and prefix + "bias" in self.shapes):
                raise ValueError(f"tensor {prefix + (strays or ['bias'])[0]!r} does not belong to layer {name!r} of {layout}")
        for name, (shape, dtypes) in expected.items():
            found_shape, found_dtype = self.shapes.get(name, (None, None))
            if found_shape is None:
                raise ValueError(f"tensor {name!r} is missing")
            found = str(_DTYPES.get(found_dtype, found_dtype)).removeprefix("torch.")
            if found_shape != tuple(shape) or found not in dtypes:
                raise ValueError(f"tensor {name!r} is {found} {found_shape}, must be {' or '.join(dtypes)} {tuple(shape)}")
        strays = [name for name in self.shapes if name.startswith(BASIS_PREFIX) and name not in expected]
        if strays:
            raise ValueError(f"tensor {strays[0]!r} is the basis of no layer")

    def _check_config(self, directory: Path) -> None:
        """Refuses a config.json that claims to describe this file and differs; one that describes another file was left behind by a kill."""
        path = directory / CONFIG_FILE
        self.config_is_stale = True
        if self.file.name != WEIGHTS_FILE or not path.is_file():
            return
        config = read_json(path)
        claimed = config.get("quantization_config")
        if isinstance(claimed, dict) and claimed.get("id") == self.manifest.id:
            self.config_is_stale = False
            if claimed != self.manifest.quantization_config():
                raise ValueError(f"{path}: was altered: its quantization_config is not the one that {self.file.name} was written with")


@contextlib.contextmanager
def _naming(prefix: str) -> Iterator[None]:
    """Makes an error that says what is wrong a ValueError that says in which file, too."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(prefix.partition(": ")[0]) else prefix + text) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError naming the file where there is none."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: is {path.stat().st_size} bytes, a configuration has at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, must hold a JSON object")
    return value
