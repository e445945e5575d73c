"""Safetensors of any size: reading one tensor at a time from a model's shards, and writing a file whose tensors never are in memory
together.

A file is 8 bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape, data_offsets; and __metadata__), then the
tensors' bytes.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .reader import read_json

INDEX_FILE = "model.safetensors.index.json"
_HEADER_LIMIT = 100 * 2**20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its bytes in the file
    bytes: int


class Shards:
    """The tensors of a directory with model.safetensors, or with an index and shards. ValueError names the file that is missing or
    damaged."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / INDEX_FILE
        single = directory / "model.safetensors"
        if index.is_file():
            mapping = read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not all(isinstance(value, str) and "/" not in value for value in mapping.values()):
                raise ValueError(f"{index}: has no weight_map of file names")
            files = [directory / name for name in dict.fromkeys(mapping.values())]
        elif single.is_file():
            mapping, files = None, [single]
        else:
            raise ValueError(f"{directory}: has neither {INDEX_FILE} nor model.safetensors")
        self.places: dict[str, Place] = {}
        for file in files:
            self.places.update(read_header(file)[0])
        absent = sorted(set(mapping or ()) - set(self.places))
        if absent:
            raise ValueError(f"{index}: names {absent[0]!r}, which {mapping[absent[0]]} does not hold")
        self.fingerprint = hashlib.sha256(json.dumps(sorted((f.name, f.stat().st_size) for f in files)).encode()).hexdigest()

    def tensor(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        return read_tensor(self.places[name])


def read_header(file: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """(places, metadata) of one file."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if not 2 <= length <= min(size - 8, _HEADER_LIMIT):
                raise ValueError("its header is longer than the file")
            header = json.loads(handle.read(length))
        metadata = header.pop("__metadata__", {})
        places = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not 0 <= begin <= end <= size - 8 - length or end - begin != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"tensor {name!r} does not fit the file")
            places[name] = Place(file, dtype, shape, 8 + length + begin, end - begin)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({error})") from error
    return places, metadata


def read_tensor(place: Place) -> Tensor:
    data = bytearray(place.bytes)
    with open(place.file, "rb") as handle:
        handle.seek(place.begin)
        if handle.readinto(data) != place.bytes:
            raise ValueError(f"{place.file}: ends within a tensor")
    if not place.bytes:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(place.dtype).view(place.shape)


def write_tensors(
    file: Path, entries: Iterable[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]], metadata: dict[str, str]
) -> None:
    """A safetensors file from (name, dtype, shape, function that gives the tensor), one tensor in memory at a time."""
    entries = sorted(entries, key=lambda entry: (-entry[1].itemsize, entry[0]))  # the alignment that readers expect
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name, dtype, shape, _ in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape, make in entries:
            tensor = make().contiguous()
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, must be {dtype} {tuple(shape)}")
            if tensor.numel():
                handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
