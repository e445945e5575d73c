"""Hb-BERT: a BERT encoder whose representations are points of a hyperbolic space. With curvature 0 it computes what BERT computes.

mode "inner"    hidden states are points. With t = log0(h), + the manifold's addition and LN, f and the linear layers BERT's, a layer is
                    h <- exp0 LN log0 (h + exp0 out(attend(query(t), key(t), value(t))))                      (layers.py has attend)
                    h <- exp0 LN log0 (h + exp0 dense(f(dense(log0 h))))
                and the embedding of a text is the weighted mean of its points.
mode "output"   BERT as it is; the embedding is the mean of its last hidden states over the attention mask, read as coordinates of a point.

Modules and parameters have BERT's names, so BERT checkpoints load, and every linear layer can be an RBELinear.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import MODES, HbBertConfig
from .curvature import Curvature
from .layers import attend, manifold_of, merge_heads, split_heads

try:
    from transformers import AutoModel, AutoModelForSequenceClassification, BertModel, BertPreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.bert.modeling_bert import BertLayer
except ImportError as error:
    raise ImportError(f"rbe_torch.hyperbolic needs transformers 5 (pip install 'rbe_torch[hyperbolic]'): {error}") from error


@dataclass
class HbBertOutput(BaseModelOutputWithPooling):
    """last_hidden_state [B, L, d] (mode "inner": tangent vectors at the origin), pooler_output [B, d], hidden_states, and
    embedding [B, d]: a point of `model.manifold` for each text."""

    embedding: Tensor | None = None


class HbBertLayer(BertLayer):
    """BertLayer's parameters between points of `manifold`."""

    def __init__(self, config: HbBertConfig, manifold: Curvature, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._manifold = [manifold]  # in a list: it belongs to the model, not to each layer

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """hidden_states: points [B, L, d]; mask: bool [B, 1, 1, L]."""
        space, attention, out, last = self._manifold[0], self.attention.self, self.attention.output, self.output
        tangent = space.logmap0(hidden_states)
        q, k, v = (
            split_heads(layer(tangent), attention.num_attention_heads) for layer in (attention.query, attention.key, attention.value)
        )
        mixed = merge_heads(attend(space, q, k, v, mask, attention.dropout.p if self.training else 0.0))
        points = space.add(hidden_states, space.expmap0(out.dropout(out.dense(mixed))))
        tangent = out.LayerNorm(space.logmap0(points))
        update = last.dropout(last.dense(self.intermediate(tangent)))
        points = space.add(space.expmap0(tangent), space.expmap0(update))
        return space.expmap0(last.LayerNorm(space.logmap0(points)))


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
        if isinstance(encoder, HbBertModel):
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


class HbBertModel(FromBert, BertModel):
    """The encoder. `model.manifold` is a geoopt manifold; `model(...).embedding` are its points."""

    config_class = HbBertConfig

    def __init__(self, config: HbBertConfig, add_pooling_layer: bool = True) -> None:
        if config.mode not in MODES:
            raise ValueError(
                f"mode: is {config.mode!r}, must be 'inner' (hyperbolic layers) or 'output' (BERT's mean-pooled output as a point)"
            )
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("config: is that of a decoder; Hb-BERT is an encoder")
        space = manifold_of(config.manifold, config.c, config.learnable_curvature)
        super().__init__(config, add_pooling_layer)
        self.manifold = space
        if config.mode == "inner":
            self.encoder.layer = nn.ModuleList(HbBertLayer(config, space, i) for i in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_curvature(module, self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **keywords: Any,
    ) -> HbBertOutput | tuple:
        """input_ids [B, L] or inputs_embeds [B, L, d]; attention_mask [B, L], 1 for tokens. keywords: refused in mode "inner" unless they
        are None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either input_ids or inputs_embeds")
        shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask: has shape {tuple(attention_mask.shape)}, must be {tuple(shape)}")
        states = None
        if self.config.mode == "output":
            done = super().forward(
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                output_hidden_states=output_hidden_states,
                **keywords,
            )
            hidden, pooled, states = done.last_hidden_state, done.pooler_output, done.hidden_states
            embedding = self.manifold.projx(_mean(hidden, attention_mask))
        else:
            unknown = [name for name, value in keywords.items() if value not in (None, False)]
            if unknown:
                raise ValueError(f"{unknown[0]}: is not available in mode 'inner'")
            points = self.manifold.expmap0(self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds))
            seen = torch.ones(shape, dtype=torch.bool, device=points.device) if attention_mask is None else attention_mask.bool()
            stages = [points]
            for layer in self.encoder.layer:
                stages.append(layer(stages[-1], seen[:, None, None, :]))
            if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
                states = tuple(self.manifold.logmap0(stage) for stage in stages)
            hidden = self.manifold.logmap0(stages[-1])
            pooled = self.pooler(hidden) if self.pooler is not None else None
            embedding = self.manifold.midpoint(stages[-1], seen[:, None, :].to(hidden.dtype)).squeeze(1)
        output = HbBertOutput(last_hidden_state=hidden, pooler_output=pooled, hidden_states=states, embedding=embedding)
        return output if return_dict or return_dict is None else output.to_tuple()


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


@torch.no_grad()
def _init_curvature(module: nn.Module, config: HbBertConfig) -> None:
    """The learned curvature of a model whose checkpoint has none (a BERT's)."""
    if isinstance(module, Curvature) and module.log_c is not None and not getattr(module.log_c, "_is_hf_initialized", False):
        module.log_c.fill_(torch.tensor(config.c, dtype=torch.float64).log().item())


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


class HbBertForSequenceClassification(FromBert, BertPreTrainedModel):
    """Classes of texts: dropout and a linear layer on log0 of the embedding."""

    config_class = HbBertConfig
    accepts_loss_kwargs = False  # the Trainer then divides by the number of batches it accumulates, as cross_entropy's mean wants it

    def __init__(self, config: HbBertConfig) -> None:
        super().__init__(config)
        self.bert = HbBertModel(config, add_pooling_layer=False)
        rate = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        self.dropout = nn.Dropout(rate)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_curvature(module, self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        """labels [B]: classes; the output then has the cross-entropy as `loss`. Returns transformers' SequenceClassifierOutput."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        keywords.pop("return_dict", None)
        output = self.bert(input_ids, attention_mask, token_type_ids, **keywords)
        logits = self.classifier(self.dropout(self.bert.manifold.logmap0(output.embedding)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


AutoModel.register(HbBertConfig, HbBertModel, exist_ok=True)
AutoModelForSequenceClassification.register(HbBertConfig, HbBertForSequenceClassification, exist_ok=True)
