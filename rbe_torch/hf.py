"""transformers: `import rbe_torch.hf` lets AutoModel.from_pretrained(directory) load what rbe_torch.save_pretrained wrote.

While transformers loads the model, the compressed layers are RBELinears without codes, so that it sees their biases alone; afterwards they are filled from
the checkpoint. No dense weight of theirs is made at any time. The model's own save_pretrained works too; rbe_torch.save_pretrained survives a kill. Needs
transformers 5.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .linear import RBELinear
from .manifest import VERSION
from .pack import pack_model
from .problems import RESIDUALS
from .reader import CONFIG_FILE, Checkpoint
from .replace import is_conv1d
from .skeleton import check_layer, find_layer
from .state import guard_loading

try:
    import transformers
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(f"rbe_torch.hf needs transformers 5 (pip install 'transformers>=5'): {error}") from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"rbe_torch.hf needs transformers 5; found transformers {transformers.__version__}")


@register_quantization_config("rbe")
class RBEConfig(QuantizationConfigMixin):
    """`quantization_config` of a checkpoint: version, id and layers of its manifest (rbe_torch/manifest.py)."""

    def __init__(self, version: int = VERSION, id: str = "", layers: dict[str, Any] | None = None, quant_method: str = "rbe") -> None:
        if quant_method != "rbe":
            raise ValueError(f"quant_method: is {quant_method!r}, must be 'rbe'")
        self.quant_method = quant_method
        self.version = version
        self.id = id
        self.layers = layers or {}


@register_quantizer("rbe")
class RBEQuantizer(HfQuantizer):
    """Puts RBELinears where the checkpoint has them, before the weights are loaded, and fills them after."""

    def __init__(self, quantization_config: RBEConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._pending: dict[str, tuple[str, RBELinear]] = {}  # name in the model -> name in the checkpoint, layer
        self._checkpoint: Checkpoint | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError("quantization_config: the model holds no RBE codes; load it without one and call rbe_torch.compress(model)")

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any) -> nn.Module:
        if not checkpoint_files or len(checkpoint_files) != 1:
            raise ValueError(f"checkpoint: has {len(checkpoint_files or [])} files of weights, an RBE checkpoint has one")
        checkpoint = self._checkpoint = Checkpoint(checkpoint_files[0])
        if self.quantization_config.id != checkpoint.manifest.id:
            raise ValueError(f"{checkpoint.file}: is not the file that {CONFIG_FILE} describes (a save was interrupted, or one of the two was replaced); "
                             "rbe_torch.load_pretrained loads what the file holds")
        if self.quantization_config.to_dict() != checkpoint.manifest.quantization_config():
            raise ValueError(f"{checkpoint.file}: {CONFIG_FILE} was altered: its quantization_config is not the one the file was written with")
        translate = _translation(model, checkpoint)
        made: dict[str, RBELinear] = {}
        for name, entry in checkpoint.layers.items():
            place = translate(name)
            if place is None:  # a head that this class does not have
                continue
            true_name = entry.same_as or name
            true = checkpoint.layers[true_name]
            old = find_layer(model, place)
            check_layer(place, old, true.in_features, true.out_features)
            if true_name not in made:
                layer = RBELinear(true.in_features, true.out_features, True, true.layout, "meta", getattr(torch, true.dtype), seed=true.seed)
                layer.register_parameter("bias", old._parameters.get("bias"))
                for key in ("packed", "seed", *RESIDUALS):
                    if key in layer._buffers:
                        layer._buffers[key] = None
                layer._parameters.update(basis=None, gain=None)
                layer._is_hf_initialized = True
                layer.stands_for_conv1d = is_conv1d(old)
                made[true_name] = layer
                self._pending[place] = (true_name, layer)
            parent = find_layer(model, place.rpartition(".")[0])
            parent._modules[place.rpartition(".")[2]] = made[true_name]
        own = r"\.(packed|gain|residual|residual_scale|residual_right|residual_right_scale)$"
        names = {form for name in (*checkpoint.layers, *self._pending) for form in (name, name.removeprefix(f"{model.base_model_prefix}."))}
        ignored = {r"(^|\.)rbe\.basis\.\d+$", rf"(^|\.)({'|'.join(map(re.escape, sorted(names)))}){own}"}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | ignored
        shared = {rf"(^|\.){re.escape(name)}$" for name in checkpoint.manifest.aliases}
        model._keys_to_ignore_on_load_missing = set(model._keys_to_ignore_on_load_missing or ()) | shared
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        checkpoint = self._checkpoint
        bases: dict[tuple[int, torch.device], nn.Parameter] = {}
        for place, (name, layer) in self._pending.items():
            device = _device_of(model, place, layer)
            full = checkpoint.layer(name, bias=False)
            dtype = layer.dtype if layer.bias is None else layer.bias.dtype
            full = full.to(device=device).to(dtype)
            key = (checkpoint.layers[name].basis, device)
            layer._parameters["basis"] = bases.setdefault(key, full.basis)
            layer._parameters["gain"] = full._parameters["gain"]
            layer._buffers.update(full._buffers)
            layer._options, layer._dtype, layer._basis_seed = full._options, dtype, full._basis_seed
        for alias, name in checkpoint.manifest.aliases.items():  # those that the model's class does not tie by itself
            here, there = translate_key(model, alias), translate_key(model, name)
            if here is not None and there is not None and here[0]._parameters.get(here[1]) is not None:
                here[0]._parameters[here[1]] = there[0]._parameters[there[1]]
        self._pending, self._checkpoint = {}, None
        guard_loading(model)
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What transformers' own save_pretrained writes: the same tensors and header as rbe_torch.save_pretrained."""
        tensors, manifest = pack_model(model)
        if set(revert_weight_conversion(model, dict(tensors))) != set(tensors):
            raise ValueError(f"model: transformers saves a {type(model).__name__} under other names than its modules have; "
                             "use rbe_torch.save_pretrained(model, directory)")
        model.config.quantization_config = RBEConfig(**manifest.quantization_config())
        return tensors, manifest.to_header()

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True  # after rbe_torch.prepare_training

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from .replace import decompress

        return decompress(model)


def load_transformers(checkpoint: Checkpoint) -> nn.Module:
    """The transformers model of a checkpoint, every tensor in the dtype it was saved in. ValueError: a class that transformers does not have."""
    config_values = dict(checkpoint.manifest.model_config)
    name = checkpoint.manifest.model_class.rpartition(".")[2]
    if checkpoint.manifest.model_class.startswith("rbe_torch.hyperbolic."):
        from . import hyperbolic as library
    else:
        library = transformers
    cls = getattr(library, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f"{checkpoint.file}: its model_class {checkpoint.manifest.model_class!r} is no model of transformers {transformers.__version__}; "
                         "pass an instance: load_pretrained(path, model)")
    config_values.pop("architectures", None)
    try:
        config = cls.config_class.from_dict({**config_values, "quantization_config": checkpoint.manifest.quantization_config()})
        depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if depth > len(checkpoint.shapes):
            raise ValueError(f"it has {depth} layers, the file {len(checkpoint.shapes)} tensors")
        model = cls.from_pretrained(checkpoint.file.parent, config=config, dtype="auto", local_files_only=True, use_safetensors=True)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.file}: its model_config and its tensors make no {name} ({str(error).splitlines()[0]})") from error
    for key in checkpoint.other_names():
        parent = find_layer(model, key.rpartition(".")[0])
        tensors = {} if parent is None else {**parent._parameters, **parent._buffers}
        tensor = tensors.get(key.rpartition(".")[2])
        if tensor is None or tensor.shape != checkpoint.shapes[checkpoint.manifest.aliases.get(key, key)][0]:
            raise ValueError(f"{checkpoint.file}: tensor {key!r} has no place in {name}")
        kind = checkpoint.tensor(key).dtype
        if kind.is_floating_point != tensor.dtype.is_floating_point:
            raise ValueError(f"{checkpoint.file}: tensor {key!r} is {kind}, must be {tensor.dtype} as in {name}, or of its kind")
        tensor.data = checkpoint.tensor(key).to(tensor.device)
    for layer_name, entry in checkpoint.layers.items():
        find_layer(model, layer_name)._dtype = getattr(torch, checkpoint.layers[entry.same_as or layer_name].dtype)
    return model


def attach(model: nn.Module) -> None:
    """Lets the own save_pretrained of transformers models in `model` write RBE layers."""
    for module in model.modules():
        if isinstance(module, transformers.PreTrainedModel) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = RBEQuantizer(RBEConfig(), pre_quantized=True)


def detach(model: nn.Module) -> None:
    """Forgets that transformers models in `model` were quantised; they no longer are."""
    for module in model.modules():
        if isinstance(getattr(module, "hf_quantizer", None), RBEQuantizer):
            module.hf_quantizer.remove_quantization_config(module)


def translate_key(model: nn.Module, key: str) -> tuple[nn.Module, str] | None:
    """(module, attribute) of a tensor of the checkpoint, with or without the base model's prefix; None if the model has no such module."""
    name, _, attribute = key.rpartition(".")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for form in (name, prefix + name, name.removeprefix(prefix)):
        module = find_layer(model, form)
        if module is not None:
            return module, attribute
    return None


def _translation(model: nn.Module, checkpoint: Checkpoint) -> Any:
    """Names of the checkpoint -> names in the model: a base model loads into one with a head, and the other way round."""
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""

    def translate(name: str) -> str | None:
        if find_layer(model, name) is not None:
            return name
        if prefix and find_layer(model, prefix + name) is not None:
            return prefix + name
        if prefix and name.startswith(prefix) and find_layer(model, name.removeprefix(prefix)) is not None:
            return name.removeprefix(prefix)
        inside = prefix and any(key.startswith(prefix) for key in checkpoint.layers) and not name.startswith(prefix)
        if inside:
            return None
        raise ValueError(f"layer {name!r}: {type(model).__name__} has no such module")

    return translate


def _device_of(model: nn.Module, name: str, layer: RBELinear) -> torch.device:
    """Where transformers put the layer."""
    if layer.bias is not None and not layer.bias.is_meta:
        return layer.bias.device
    places = getattr(model, "hf_device_map", None) or {}
    for key in sorted(places, key=len, reverse=True):
        if not key or name == key or name.startswith(f"{key}."):
            return torch.device(places[key]) if not isinstance(places[key], int) else torch.device("cuda", places[key])
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
