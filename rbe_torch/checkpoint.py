"""save_pretrained and load_pretrained: a directory with model.safetensors and config.json, written so that a kill leaves a whole one.

model.safetensors holds, for a layer L: `L.packed` (the codes), `L.gain`, `L.bias`, the residual's tensors; `rbe.basis.<i>`, each distinct basis once;
and every other tensor of the model under its own name, once. Basis and gain are fp16 (float32 where fp16 would lose something, with a warning). Its
header's `rbe` entry is the JSON text that describes it: version, layers, the SHA-256 of every tensor, names that share one tensor, and the model's
own configuration. So the file is a checkpoint by itself: it is written to a temporary name in the same directory, synced and renamed, and that rename is the
moment at which the old checkpoint becomes the new one. config.json repeats the configuration where transformers looks for it; it is written after, and
where a kill left it behind the header counts.

Reading trusts nothing: names, shapes, dtypes, sizes and hashes are checked against the layouts before a tensor is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .layout import Layout
from .linear import RESIDUALS, RBELinear
from .manifest import BASIS_PREFIX, VERSION, LayerEntry, Manifest, content_id

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_MAX_JSON_BYTES = 64 * 2**20
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "F16": torch.float16, "F32": torch.float32}


# ---- writing ---------------------------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, directory: str | os.PathLike) -> None:
    """Writes `model`, whose linear layers were compressed, to `directory`, which is made if it is missing.

    For a transformers model config.json is its own configuration, so that from_pretrained finds the model (after `import rbe_torch.hf`).
    ValueError: no RBELinear in the model, a layer in training form, or tensors without values.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"directory: {directory} is a file, must be a directory or not exist")
    tensors, manifest = pack_model(model)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "rbe": manifest.to_json()}
    _replace_file(directory / WEIGHTS_FILE, lambda path: safetensors.torch.save_file(tensors, path, metadata))
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "to_json_string"):
        _replace_file(directory / "generation_config.json", _text(generation.to_json_string()))
    config = {**(manifest.model_config or {}), "quantization_config": manifest.quantization_config()}
    _replace_file(directory / CONFIG_FILE, _text(json.dumps(config, indent=2, sort_keys=True) + "\n"))


def pack_model(model: nn.Module) -> tuple[dict[str, Tensor], Manifest]:
    """What save_pretrained writes: tensors on the CPU by name, and the manifest that describes them."""
    layers: dict[str, LayerEntry] = {}
    tensors: dict[str, Tensor] = {}
    bases: dict[str, int] = {}  # hash of the stored table -> number
    first: dict[int, str] = {}
    wide: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, RBELinear):
            continue
        if id(module) in first:
            layers[name] = LayerEntry(same_as=first[id(module)])
            continue
        first[id(module)] = name
        if module.training_form:
            raise ValueError(f"model: layer {name!r} is in training form; call rbe_torch.finish_training(model) before saving, or keep training "
                             "states with torch.save(model.state_dict())")
        problem = "its tensors are on the meta device" if module.packed.is_meta else module.problem()
        if problem:
            raise ValueError(f"model: layer {name!r} cannot be saved: {problem}")
        prefix = f"{name}." if name else ""
        basis = _compact(module.basis, f"{prefix}basis", wide)
        number = bases.setdefault(f"{tuple(basis.shape)}{digest(basis)}", len(bases))
        tensors[f"{BASIS_PREFIX}{number}"] = basis
        tensors[prefix + "packed"] = module.packed.detach().cpu().contiguous()
        tensors[prefix + "gain"] = _compact(module.gain, f"{prefix}gain", wide)
        for key in RESIDUALS:
            if module._buffers[key] is not None:
                tensors[prefix + key] = module._buffers[key].detach().cpu().contiguous()
        layers[name] = LayerEntry(str(module.layout), module.in_features, module.out_features, number,
                                  int(module.seed) if module.layout.seeded else None, str(module.dtype).removeprefix("torch."),
                                  module.bias is not None)
    if not layers:
        raise ValueError("model: has no RBELinear; call rbe_torch.compress first")
    if wide:
        warnings.warn(f"{', '.join(wide[:3])}{' and more' if len(wide) > 3 else ''}: values that fp16 does not hold are stored as float32, at twice the "
                      "size; rbe_torch.finish_training(model) rounds them", UserWarning, stacklevel=3)
    aliases = _add_others(model, layers, tensors)
    hashes = {name: digest(tensor) for name, tensor in tensors.items()}
    return tensors, Manifest(layers, hashes, aliases, f"{type(model).__module__}.{type(model).__qualname__}", _model_config(model))


def _add_others(model: nn.Module, layers: dict[str, LayerEntry], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Adds every tensor that is no part of an RBE weight; returns the names that share another name's tensor."""
    own = {f"{name}." if name else "" for name in layers}
    aliases: dict[str, str] = {}
    stored: dict[tuple, str] = {}
    for name, value in model.state_dict().items():
        prefix, _, key = name.rpartition(".")
        if (f"{prefix}." if prefix else "") in own and key != "bias":
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"model: {name!r} of its state_dict is a {type(value).__name__}; only tensors can be saved")
        if value.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device and has no values")
        if name in tensors or name.startswith(BASIS_PREFIX):
            raise ValueError(f"model: the name {name!r} is taken by rbe_torch's own tensors")
        place = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and place in stored:
            aliases[name] = stored[place]
            continue
        stored[place] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return aliases


def _compact(tensor: Tensor, name: str, wide: list[str]) -> Tensor:
    """fp16 where that loses nothing, else float32 and the name noted."""
    full = tensor.detach().cpu().contiguous().clone()
    half = full.half()
    if torch.equal(half.float(), full):
        return half
    wide.append(name)
    return full


def _model_config(model: nn.Module) -> dict[str, Any] | None:
    """A transformers model's configuration as from_pretrained wants it; None for another model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string") or not hasattr(config, "model_type"):
        return None
    plain = json.loads(config.to_json_string())
    plain.pop("quantization_config", None)
    plain["architectures"] = [type(model).__name__]
    dtypes = [p.dtype for m in model.modules() if not isinstance(m, RBELinear) for p in m._parameters.values() if p is not None and p.is_floating_point()]
    dtypes += [m.dtype for m in model.modules() if isinstance(m, RBELinear)]
    plain["dtype"] = str(dtypes[0]).removeprefix("torch.")
    return plain


def _text(text: str) -> Callable[[Path], None]:
    return lambda path: Path(path).write_text(text, encoding="utf-8")


def _replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a temporary file beside `path`, syncs it and renames it over `path`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---- reading ---------------------------------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"").hexdigest()


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
        if "rbe" not in metadata:
            raise ValueError(f"{self.file}: has no 'rbe' entry in its header; it was not written by rbe_torch.save_pretrained")
        with self._named():
            self.manifest = Manifest.from_json(metadata["rbe"])
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
            self._bases[number] = nn.Parameter(self.tensor(f"{BASIS_PREFIX}{number}").float(), requires_grad=False)
        return self._bases[number]

    def layer(self, name: str, bias: bool = True) -> RBELinear:
        """The layer, on the CPU, every value checked; layers with the same basis share it."""
        entry = self.layers[name]
        if entry.same_as is not None:
            return self.layer(entry.same_as, bias)
        prefix = f"{name}." if name else ""
        layout = Layout.parse(entry.layout)
        with self._named(f"layer {name!r}: "):
            return RBELinear.from_codes(
                self.tensor(prefix + "packed"), self.basis(entry.basis), self.tensor(prefix + "gain").float(),
                self.tensor(prefix + "bias") if entry.bias and bias else None, layout=layout, in_features=entry.in_features, seed=entry.seed,
                residual={key: self.tensor(prefix + key) for key in layout.residual_shapes(entry.out_features, entry.in_features)},
                dtype=getattr(torch, entry.dtype),
            )

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

    def _named(self, what: str = "") -> "_Prefixed":
        return _Prefixed(f"{self.file}: {what}")

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
            expected[f"{BASIS_PREFIX}{entry.basis}"] = (layout.basis_shape, ("float16", "float32"))
            for key, (shape, dtype) in layout.residual_shapes(m, n).items():
                expected[prefix + key] = (shape, (dtype,))
            if entry.bias and prefix + "bias" not in self.shapes and prefix + "bias" not in manifest.aliases:
                raise ValueError(f"tensor {prefix + 'bias'!r} is missing")
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


class _Prefixed:
    """Puts the file's name before the text of a ValueError, TypeError or RuntimeError, and makes it a ValueError."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (ValueError, TypeError, RuntimeError)):
            text = str(error)
            raise ValueError(text if text.startswith(self.prefix.partition(": ")[0]) else self.prefix + text) from error


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


def load_pretrained(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """The model saved at `path`, bit-exact, without the original weights.

    model: an instance of the architecture (its weights do not matter and may be on the meta device); it is changed in place and returned. Not needed for
    transformers models, which are built from their configuration. ValueError: a checkpoint that is damaged or does not fit the model.
    """
    checkpoint = Checkpoint(path)
    if model is None:
        if checkpoint.manifest.model_config is None:
            raise ValueError(f"model: is None, but {checkpoint.file} holds a {checkpoint.manifest.model_class} and no transformers "
                             "configuration; pass an instance of that class")
        from .hf import load_transformers

        return load_transformers(checkpoint)
    from .skeleton import fill_model

    with checkpoint._named():
        return fill_model(model, checkpoint)


__all__ = ["CONFIG_FILE", "VERSION", "WEIGHTS_FILE", "Checkpoint", "content_id", "load_pretrained", "pack_model", "save_pretrained"]
