"""compress_checkpoint: a model that does not fit into memory, from a directory of shards to a compressed checkpoint, one layer at a time.

    1. a sample of all layers' weights is read and the basis fitted to it        OUT/.rbe-parts/basis.safetensors
    2. each layer is read, encoded and written                                   OUT/.rbe-parts/<layer>.safetensors
    3. the parts and what stays as it is become one file, which is renamed last  OUT/model.safetensors, OUT/config.json

A part is renamed into place when it is whole, so a run that was killed goes on where it was: finished layers are not encoded again. Under
torch.distributed (torchrun) the processes share the layers of step 2 through a directory that all of them see; process 0 does the other
steps. Memory: the largest tensor a few times, and a sample of at most 8 M weights. The result does not depend on kills or on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import calibrate_model
from .checkpoint import GENERATION_FILE, replace_file
from .codebook import fit_vectors, round_count, sample_sizes, sample_some
from .encode import encode_layer
from .layout import Layout
from .linear import RBELinear
from .manifest import BASIS_PREFIX, LayerEntry, Manifest
from .models import empty_model, load_config
from .offload import Offloaded, block_names, skeleton
from .pack import digest, model_config
from .progress import Progress
from .reader import CONFIG_FILE, WEIGHTS_FILE
from .replace import Found, Patterns, features, find_linears, is_conv1d, replace
from .shards import Shards, read_header, read_tensor, write_tensors
from .walk import Call, calls_of

PARTS = ".rbe-parts"


def compress_checkpoint(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str | Layout = "rbe8x2_g8",
    include: Patterns = None,
    exclude: Patterns = None,
    calibration: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Compresses the transformers model in `source` (config.json and safetensors) into `target` without ever loading it whole.

    calibration: batches, as for compress, for a model whose layers all lie in one chain of blocks; one process. Then a block twice (as it was, and
    on its way), what is outside the blocks, and the hidden states of all batches twice are in memory, too. None: from the weights alone.

    Returns layers, weights, bits_per_weight, bytes and how many layers this call encoded and found finished. ValueError: shards that are
    damaged or do not fit the configuration, a weight that is not finite (by name), or parts in `target` of a run with other arguments.
    """
    source, target, layout = Path(source), Path(target), Layout.parse(layout)
    shards = Shards(source)
    model = empty_model(load_config(source)) if calibration is None else skeleton(load_config(source))
    found = [entry for entry in find_linears(model, include, exclude) if entry.convertible]
    stored = _stored_names(model, shards)
    rank, count = _process()
    calls = None if calibration is None else calls_of(calibration, torch.device("cpu"))
    if calls is not None and count > 1:
        raise ValueError("calibration: layers see what those before them lose, so they cannot be shared; run one process, or leave it out")
    parts = target / PARTS
    job = {
        "layout": str(layout),
        "seed": seed,
        "layers": [entry.name for entry in found],
        "source": shards.fingerprint,
        "calibration": _digest_of(calls),
    }
    if rank == 0:
        _claim(parts, job)
    _barrier(count)
    basis_file = parts / "basis.safetensors"
    if rank == 0 and not basis_file.is_file():
        table = _fit(found, stored, shards, layout, seed, progress)
        replace_file(basis_file, lambda path: write_tensors(path, [("basis", torch.float16, tuple(table.shape), table.half)], {}))
    _barrier(count)
    basis = nn.Parameter(read_tensor(read_header(basis_file)[0]["basis"]).float(), requires_grad=False)
    seeds = torch.randint(0, 2**32, (len(found),), generator=torch.Generator().manual_seed(seed)).tolist()
    mine = list(zip(found, seeds, strict=True))[rank::count]
    finished = sum(_part(parts, entry.name).is_file() for entry, _ in mine)
    encoded = len(mine) - finished
    sizes = sum(features(entry.module)[0] * features(entry.module)[1] for entry, _ in mine)
    with Progress(f"compress to {layout}", sizes, progress and rank == 0) as bar:

        def tick(entry: Found) -> None:
            bar.step(features(entry.module)[0] * features(entry.module)[1], entry.name)

        if calls is not None:
            _calibrate(
                model,
                found,
                dict(zip((entry.name for entry in found), seeds, strict=True)),
                stored,
                shards,
                layout,
                basis,
                calls,
                parts,
                tick,
            )
        else:
            for entry, layer_seed in mine:
                part = _part(parts, entry.name)
                if not part.is_file():
                    _encode(entry, _weight(entry, stored, shards), layout, basis, layer_seed, part)
                tick(entry)
    _barrier(count)
    if rank == 0:
        _assemble(model, found, seeds, stored, shards, layout, parts, target)
    _barrier(count)
    places = read_header(target / WEIGHTS_FILE)[0]
    weights = sum(features(entry.module)[0] * features(entry.module)[1] for entry in found)
    own = sum(layout.bytes(*reversed(features(entry.module)), basis=False) for entry in found) + layout.basis_bytes
    return {
        "layers": len(found),
        "encoded": encoded,
        "finished_before": finished,
        "weights": weights,
        "bits_per_weight": 8 * own / weights,
        "compressed_bytes": own,
        "file_bytes": sum(place.bytes for place in places.values()),
        "processes": count,
    }


# ---- processes -------------------------------------------------------------------------------------------------------------------
def _process() -> tuple[int, int]:
    """(rank, number) of this process; starts torch.distributed with gloo where torchrun asks for it and nobody has."""
    if not torch.distributed.is_available():
        return 0, 1
    if not torch.distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return 0, 1
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _barrier(count: int) -> None:
    if count > 1:
        torch.distributed.barrier()


def _claim(parts: Path, job: dict[str, Any]) -> None:
    """Makes the folder of parts, or checks that the one there is of the same run."""
    note = parts / "job.json"
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")) != job:
            raise ValueError(
                f"{parts}: holds parts of a run with another model, layout, seed or choice of layers; remove it, or name another directory"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    replace_file(note, lambda path: Path(path).write_text(json.dumps(job), encoding="utf-8"))


# ---- tensors of the model and of the file ----------------------------------------------------------------------------------------
def _stored_names(model: nn.Module, shards: Shards) -> dict[str, str]:
    """Name in the model -> name in the shards, for every tensor that the file must have; those that share one have one name in the
    shards."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    stored: dict[str, str] = {}
    for names in groups.values():
        forms = [form for name in names for form in (name, prefix + name, name.removeprefix(prefix)) if form in shards.places]
        if not forms:
            raise ValueError(f"{shards.directory}: tensor {names[0]!r} of the model is in no shard; either the directory is not whole, or transformers "
                             "renames this model's tensors as it loads them: compress it in memory, without stream")
        shape = tuple(model.state_dict()[names[0]].shape)
        if shards.places[forms[0]].shape != shape:
            raise ValueError(
                f"{shards.directory}: tensor {forms[0]!r} has shape {shards.places[forms[0]].shape}, must be {shape} by {CONFIG_FILE}"
            )
        stored |= dict.fromkeys(names, forms[0])
    return stored


def _weight(entry: Found, stored: dict[str, str], shards: Shards) -> Tensor:
    weight = shards.tensor(stored[f"{entry.name}.weight"])
    return weight.t() if is_conv1d(entry.module) else weight


def _fit(found: list[Found], stored: dict[str, str], shards: Shards, layout: Layout, seed: int, progress: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = sample_sizes([tuple(reversed(features(entry.module))) for entry in found], layout.group)
    vectors = []
    with Progress("basis", len(found) + round_count(layout), progress) as bar:
        for entry, wanted in zip(found, sizes, strict=True):
            vectors.append(sample_some(_weight(entry, stored, shards), layout.group, wanted, generator))
            bar.step(1, f"sample of {entry.name}")
        return fit_vectors(torch.cat(vectors), layout, generator, lambda what: bar.step(1, what))


def _part(parts: Path, name: str) -> Path:
    """A file name of any layer's name: readable where it can be, unique by its hash."""
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-80:]
    return parts / f"{safe}.{hashlib.sha256(name.encode()).hexdigest()[:12]}.safetensors"


def _encode(entry: Found, weight: Tensor, layout: Layout, basis: nn.Parameter, seed: int, part: Path) -> None:
    try:
        made = encode_layer(weight, layout, basis, None, seed)
    except (ValueError, TypeError, RuntimeError) as error:
        raise type(error)(f"{entry.name}: {error}") from error
    packed = torch.ops.rbe.pack(made.codes, layout=str(layout), in_features=weight.shape[1], seed=seed if layout.seeded else 0)
    _write_part(part, {"packed": packed, "gain": made.gain.half(), **made.residual})


def _write_part(part: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    hashes = {name: digest(tensor) for name, tensor in tensors.items()}
    entries = [(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()]
    replace_file(part, lambda path: write_tensors(path, entries, {"hashes": json.dumps(hashes)}))


# ---- calibrated ------------------------------------------------------------------------------------------------------------------
def _digest_of(calls: list[Call] | None) -> str | None:
    """SHA-256 of the batches' tensors."""
    if calls is None:
        return None
    found = hashlib.sha256()
    for call in calls:
        for value in (*call.args, *(call.kwargs[key] for key in sorted(call.kwargs))):
            found.update(digest(value).encode() if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


def _calibrate(
    model: nn.Module,
    found: list[Found],
    seeds: dict[str, int],
    stored: dict[str, str],
    shards: Shards,
    layout: Layout,
    basis: nn.Parameter,
    calls: list[Call],
    parts: Path,
    tick: Callable[[Found], None],
) -> None:
    """Block after block: read, encoded behind the compressed prefix, written, forgotten. Parts that are there are read instead."""
    offloaded = Offloaded(model, block_names(model, [entry.name for entry in found]), stored, shards)

    @contextmanager
    def around(name: str, block: nn.Module) -> Iterator[None]:
        with offloaded.pinned(name, block):
            try:
                yield
            finally:
                for entry in found:
                    if entry.name.startswith(f"{name}."):
                        replace(entry, entry.module)

    def ready(entry: Found) -> RBELinear | None:
        part = _part(parts, entry.name)
        if not part.is_file():
            return None
        tensors = {key: read_tensor(place) for key, place in read_header(part)[0].items()}
        packed, gain, bias = tensors.pop("packed"), tensors.pop("gain").float(), tensors.pop("bias", None)
        return RBELinear.from_codes(
            packed,
            basis,
            gain,
            bias,
            layout=layout,
            in_features=features(entry.module)[0],
            seed=seeds[entry.name] if layout.seeded else None,
            residual=tensors,
            dtype=entry.module.weight.dtype,
        )

    def put(entry: Found, layer: RBELinear) -> None:
        replace(entry, layer)
        part = _part(parts, entry.name)
        if not part.is_file():
            residual = {key: layer._buffers[key] for key in layout.residual_shapes(layer.out_features, layer.in_features)}
            bias = {} if layer.bias is None else {"bias": layer.bias}
            _write_part(part, {"packed": layer.packed, "gain": layer.gain.half(), **bias, **residual})

    try:
        calibrate_model(
            model,
            calls,
            found,
            lambda entry: basis,
            lambda entry: layout,
            seeds,
            put,
            lambda entry, made: tick(entry),
            ready=ready,
            around=around,
        )
    finally:
        offloaded.close()


# ---- the checkpoint --------------------------------------------------------------------------------------------------------------
def _assemble(
    model: nn.Module,
    found: list[Found],
    seeds: list[int],
    stored: dict[str, str],
    shards: Shards,
    layout: Layout,
    parts: Path,
    target: Path,
) -> None:
    entries: list[tuple[str, torch.dtype, tuple[int, ...], Callable[[], Tensor]]] = []
    hashes: dict[str, str] = {}
    layers: dict[str, LayerEntry] = {}

    def add(name: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor], known: str | None = None) -> None:
        entries.append((name, dtype, shape, make))
        hashes[name] = known if known is not None else digest(make())

    basis = read_header(parts / "basis.safetensors")[0]["basis"]
    add(f"{BASIS_PREFIX}0", basis.dtype, basis.shape, lambda: read_tensor(basis))
    for entry, seed in zip(found, seeds, strict=True):
        places, metadata = read_header(_part(parts, entry.name))
        known = json.loads(metadata["hashes"])
        for key, place in places.items():
            add(f"{entry.name}.{key}", place.dtype, place.shape, lambda place=place: read_tensor(place), known[key])
        n, m = features(entry.module)
        dtype = shards.places[stored[f"{entry.name}.weight"]].dtype
        layers[entry.name] = LayerEntry(
            str(layout), n, m, 0, seed if layout.seeded else None, str(dtype).removeprefix("torch."), entry.module.bias is not None
        )
    own = {f"{name}.weight" for name in layers} | set(hashes)
    aliases: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, there in stored.items():
        if name in own:
            continue
        if there in first:
            aliases[name] = first[there]
            continue
        first[there] = name
        place = shards.places[there]
        add(name, place.dtype, place.shape, lambda place=place: read_tensor(place))
    config = model_config(model)
    config["dtype"] = str(next(shards.places[there].dtype for there in stored.values())).removeprefix("torch.")
    manifest = Manifest(layers, hashes, aliases, f"{type(model).__module__}.{type(model).__qualname__}", config)
    replace_file(target / WEIGHTS_FILE, lambda path: write_tensors(path, entries, {"format": "pt", **manifest.to_header()}))
    generation = shards.directory / GENERATION_FILE
    if generation.is_file():
        replace_file(target / GENERATION_FILE, lambda path: shutil.copyfile(generation, path))
    text = json.dumps({**config, "quantization_config": manifest.quantization_config()}, indent=2, sort_keys=True) + "\n"
    replace_file(target / CONFIG_FILE, lambda path: Path(path).write_text(text, encoding="utf-8"))
    shutil.rmtree(parts)
