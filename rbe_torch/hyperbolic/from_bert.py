"""What Hb-BERT models have in common: how they are made, from a BERT, dense or in RBE codes, or from a saved Hb-BERT."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertModel

from .config import HbBertConfig
from .curvature import Curvature


class FromBert:
    """from_pretrained for Hb-BERT models: from BERT, dense or RBE, or from what their save_pretrained wrote."""

    @classmethod
    def from_pretrained(
        cls,
        bert: str | os.PathLike | nn.Module,
        *arguments: Any,
        manifold: str | None = None,
        curvature: float | None = None,
        layout: str | None = None,
        mode: str | None = None,
        learnable_curvature: bool | None = None,
        **keywords: Any,
    ) -> nn.Module:
        """bert: a directory of a BERT or Hb-BERT model, or a BertModel in memory (copied, RBE layers included; with its encoder alone).

        manifold ("lorentz"), curvature (1 / hidden_size), mode ("inner"), learnable_curvature (False): see HbBertConfig; those given
        replace a saved Hb-BERT's. layout: compresses the linear layers to this RBE layout (rbe_torch.compress); None leaves them as they
        are. Other arguments go to transformers' from_pretrained. ValueError or TypeError names the argument.
        """
        given = {"manifold": manifold, "curvature": curvature, "mode": mode, "learnable_curvature": learnable_curvature}
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(bert, nn.Module):
            model = cls._from_module(bert, given)
        else:
            if given or not isinstance(keywords.get("config"), HbBertConfig):
                if keywords.get("config") is not None and not isinstance(keywords["config"], HbBertConfig):
                    raise TypeError(f"config: is a {type(keywords['config']).__name__}, must be an HbBertConfig")
                keywords["config"] = _config_of(bert, keywords.get("config"), given)
            if getattr(keywords["config"], "quantization_config", None) is not None:
                from .. import hf as _hf  # noqa: F401  registers the RBE quantiser
            model = super().from_pretrained(bert, *arguments, **keywords)
        if layout is not None:
            from ..compress import compress

            compress(model, layout, progress=False)
        return model

    @classmethod
    def _from_module(cls, bert: nn.Module, given: dict[str, Any]) -> nn.Module:
        from ..models import base_model
        from ..replace import note_for_transformers

        encoder = base_model(bert)
        if not isinstance(encoder, BertModel):
            raise TypeError(f"bert: is a {type(bert).__name__}, must be a directory, a BertModel or a model with one inside")
        if isinstance(encoder.config, HbBertConfig):
            given = {"curvature": float(torch.as_tensor(encoder.manifold.c).detach()), **given}  # as it was trained
        encoder = copy.deepcopy(encoder)
        config = HbBertConfig.from_dict({**_plain(encoder.config.to_dict()), **given})
        model = cls(config)
        target = base_model(model)
        target.embeddings = encoder.embeddings
        if target.pooler is not None:
            target.pooler = encoder.pooler  # None where it has none
        for new, old in zip(target.encoder.layer, encoder.encoder.layer, strict=True):
            new._modules.update(old._modules)
        example = next(encoder.parameters())
        model.to(example.device, example.dtype).train(bert.training)
        if any(type(module).__name__ == "RBELinear" for module in model.modules()):
            note_for_transformers(model, True)
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """transformers' rule; and the learned curvature of a model whose checkpoint has none (a BERT's)."""
        super()._init_weights(module)
        if isinstance(module, Curvature) and module.log_c is not None and not getattr(module.log_c, "_is_hf_initialized", False):
            module.log_c.fill_(torch.tensor(self.config.c, dtype=torch.float64).log().item())


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A BERT's configuration without what says which class it belongs to."""
    return {key: value for key, value in values.items() if key not in ("model_type", "architectures")}


def _config_of(directory: str | os.PathLike, config: HbBertConfig | None, given: dict[str, Any]) -> HbBertConfig:
    if config is None:
        from ..models import load_config

        config = load_config(Path(directory))
        if config.model_type not in ("bert", "hb-bert"):
            raise ValueError(f"bert: {directory} holds a model of type {config.model_type!r}, must be 'bert' or 'hb-bert'")
    return HbBertConfig.from_dict({**_plain(config.to_dict()), **given})
