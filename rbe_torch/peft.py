"""LoRA of the `peft` package on RBELinear layers: attaches, trains beside frozen codes, and merges into the layer's `+lr` residual.

    config = rbe_torch.peft.lora_config(r=8, target_modules=["query", "value"])
    model = peft.get_peft_model(model, config)
    ...
    model = model.merge_and_unload()          # RBELinears in rbe22_g64+lr8 and the like: rbe_torch.save_pretrained(model, ...)

peft knows nn.Linear alone; `lora_config` registers the layer below for RBELinear, by peft's own hook for other modules.
"""

from __future__ import annotations

from typing import Any

import torch

from .linear import RBELinear
from .lowrank import _set_residual, lowrank_of, merge_lowrank

try:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as error:
    raise ImportError("rbe_torch.peft needs peft: pip install peft") from error


class LoraRBELinear(LoraLinear):
    """peft's LoRA layer around an RBELinear. merge adds B A * scaling to the layer's low-rank residual (int8); unmerge puts the residual of
    before back."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: RBELinear = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A.keys():
                continue
            if name in self.lora_variant:
                raise ValueError(f"adapter {name!r}: is a variant of LoRA (DoRA or the like), which is no low-rank term; only plain LoRA merges "
                                 "into an RBELinear")
            if self.lora_bias[name]:
                raise ValueError(f"adapter {name!r}: has a bias of its own (lora_bias=True), which cannot be merged into an RBELinear")
            self.__dict__.setdefault("_residuals", []).append(self._residual(layer))
            scale = float(self.scaling[name])
            merge_lowrank(layer, self.lora_B[name].weight.detach().float() * scale, self.lora_A[name].weight.detach().float())
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        layer: RBELinear = self.get_base_layer()
        while self.merged_adapters:
            self.merged_adapters.pop()
            _set_residual(layer, self.__dict__["_residuals"].pop())

    @staticmethod
    def _residual(layer: RBELinear) -> dict[str, torch.Tensor] | None:
        if not lowrank_of(layer)[0].shape[1]:
            return None
        return {name: layer._buffers[name] for name in ("residual", "residual_scale", "residual_right", "residual_right_scale")}


def lora_config(**options: Any) -> LoraConfig:
    """peft.LoraConfig(**options) that can be attached to RBELinear as well."""
    config = LoraConfig(**options)
    config._register_custom_module({RBELinear: LoraRBELinear})
    return config
