"""The manifest of a checkpoint: the JSON text in the header of model.safetensors that says what its tensors are, and its SHA-256 beside it.

    {"version": 1, "layers": {name: {"layout", "in_features", "out_features", "basis", "seed", "basis_seed", "dtype", "bias"} or {"same_as": name}},
     "hashes": {tensor: SHA-256}, "aliases": {name: tensor}, "model_class": "package.Class", "model_config": transformers' or null}

Its `id` is the SHA-256 of version, layers and hashes; config.json repeats version, layers and id as `quantization_config`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from .layout import Layout

VERSION = 1
BASIS_PREFIX = "rbe.basis."
DTYPES = ("float32", "float16", "bfloat16", "float64")
_MAX_FEATURES = 2**31 - 1


@dataclass(frozen=True)
class LayerEntry:
    """One RBE layer; `same_as` names the entry of another name of the same module, and then the rest is unset."""

    layout: str = ""
    in_features: int = 0
    out_features: int = 0
    basis: int = 0
    seed: int | None = None
    dtype: str = "float32"
    bias: bool = False
    same_as: str | None = None
    basis_seed: int | None = None  # the basis is no tensor but drawn from it

    def to_dict(self) -> dict[str, Any]:
        if self.same_as is not None:
            return {"same_as": self.same_as}
        return {key: value for key, value in asdict(self).items() if value is not None}

    @staticmethod
    def from_dict(name: str, values: Any) -> LayerEntry:
        """The checked entry; ValueError names the layer and the value."""
        if not isinstance(values, dict):
            raise ValueError(f"layer {name!r}: is a {type(values).__name__} in the manifest, must be an object")
        if set(values) == {"same_as"} and isinstance(values["same_as"], str):
            return LayerEntry(same_as=values["same_as"])
        expected = {"layout": str, "in_features": int, "out_features": int, "basis": int, "dtype": str, "bias": bool}
        if set(values) - {"seed", "basis_seed"} != set(expected):
            raise ValueError(f"layer {name!r}: has the entries {sorted(values)} in the manifest, must have {sorted(expected)}")
        for key, kind in {**expected, "seed": int, "basis_seed": int}.items():
            if key in values and type(values[key]) is not kind:
                raise ValueError(f"layer {name!r}: {key} is {values[key]!r} in the manifest, must be of type {kind.__name__}")
        try:
            layout = Layout.parse(values["layout"])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        for key, low, high in (("in_features", 1, _MAX_FEATURES), ("out_features", 1, _MAX_FEATURES), ("basis", 0, _MAX_FEATURES), ("seed", 0, 2**32 - 1),
                               ("basis_seed", 0, 2**32 - 1)):
            if key in values and not low <= values[key] <= high:
                raise ValueError(f"layer {name!r}: {key} is {values[key]} in the manifest, must be {low} to {high}")
        if layout.seeded != ("seed" in values):
            raise ValueError(f"layer {name!r}: {'has no' if layout.seeded else 'has a'} seed in the manifest, which {layout} does not allow")
        if values["dtype"] not in DTYPES:
            raise ValueError(f"layer {name!r}: dtype is {values['dtype']!r} in the manifest, must be one of {', '.join(DTYPES)}")
        return LayerEntry(**values)


@dataclass(frozen=True)
class Manifest:
    layers: dict[str, LayerEntry]
    hashes: dict[str, str]
    aliases: dict[str, str]
    model_class: str
    model_config: dict[str, Any] | None

    @property
    def id(self) -> str:
        return content_id(self._layers(), self.hashes)

    def _layers(self) -> dict[str, Any]:
        return {name: entry.to_dict() for name, entry in self.layers.items()}

    def quantization_config(self) -> dict[str, Any]:
        """What config.json holds under `quantization_config`."""
        return {"quant_method": "rbe", "version": VERSION, "id": self.id, "layers": self._layers()}

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, "layers": self._layers(), "hashes": self.hashes, "aliases": self.aliases,
                           "model_class": self.model_class, "model_config": self.model_config}, sort_keys=True)

    def to_header(self) -> dict[str, str]:
        """The entries that the header of model.safetensors has for it."""
        text = self.to_json()
        return {"rbe": text, "rbe_sha256": hashlib.sha256(text.encode()).hexdigest()}

    @staticmethod
    def from_header(header: dict[str, str]) -> Manifest:
        """The checked manifest; ValueError says what is wrong with it."""
        if "rbe" not in header:
            raise ValueError("has no 'rbe' entry in its header; it was not written by rbe_torch.save_pretrained")
        text = header["rbe"]
        if hashlib.sha256(text.encode()).hexdigest() != header.get("rbe_sha256"):
            raise ValueError("its header was altered: the SHA-256 of the 'rbe' entry is not the one beside it")
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the 'rbe' entry of the header is not JSON ({error})") from error
        if not isinstance(values, dict) or type(values.get("version")) is not int:
            raise ValueError("the 'rbe' entry of the header has no version")
        if values["version"] != VERSION:
            raise ValueError(f"is of version {values['version']}; this rbe_torch reads version {VERSION}")
        kinds = {"layers": dict, "hashes": dict, "aliases": dict, "model_class": str, "model_config": (dict, type(None))}
        for key, kind in kinds.items():
            if not isinstance(values.get(key), kind) or key not in values:
                raise ValueError(f"the manifest's {key} is a {type(values.get(key)).__name__}")
        for key in ("hashes", "aliases"):
            if not all(isinstance(value, str) for value in values[key].values()):
                raise ValueError(f"the manifest's {key} must be strings")
        if not values["layers"]:
            raise ValueError("the manifest has no layers")
        layers = {name: LayerEntry.from_dict(name, entry) for name, entry in values["layers"].items()}
        return Manifest(layers, values["hashes"], values["aliases"], values["model_class"], values["model_config"])


def content_id(layers: dict[str, Any], hashes: dict[str, str]) -> str:
    """SHA-256 of what the weights are: version, layers and the hash of every tensor."""
    text = json.dumps([VERSION, layers, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
