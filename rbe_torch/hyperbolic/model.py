"""Hb-BERT: a BERT encoder whose representations are points of a hyperbolic space. With curvature 0 it computes what BERT computes.

mode "inner"    hidden states are points. With t = log0(h), + the manifold's addition and LN, f and the linear layers BERT's, a layer is
                    h <- exp0 LN log0 (h + exp0 out(attend(query(t), key(t), value(t))))                      (layers.py has attend)
                    h <- exp0 LN log0 (h + exp0 dense(f(dense(log0 h))))
                and the embedding of a text is the weighted mean of its points.
mode "output"   BERT as it is; the embedding is the mean of its last hidden states over the attention mask, read as coordinates of a point.

Modules and parameters have BERT's names, so BERT checkpoints load, and every linear layer can be an RBELinear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.bert.modeling_bert import BertLayer

from .config import MODES, HbBertConfig
from .curvature import Curvature
from .from_bert import FromBert
from .layers import attend, manifold_of, merge_heads, split_heads
from .packing import mean_by_owner, together


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        owner: Tensor | None = None,
        **keywords: Any,
    ) -> HbBertOutput | tuple:
        """input_ids [B, L] or inputs_embeds [B, L, d]; attention_mask [B, L], 1 for tokens. owner [B, L]: several texts in a row, as
        packing.pack lays them out; instead of attention_mask, and there is an embedding for each text. keywords: refused in mode "inner"
        unless they are None."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: give either input_ids or inputs_embeds")
        shape = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask: has shape {tuple(attention_mask.shape)}, must be {tuple(shape)}")
        if owner is not None and (attention_mask is not None or owner.shape != shape):
            reason = "cannot be given with attention_mask" if attention_mask is not None else f"must have shape {tuple(shape)}"
            raise ValueError(f"owner: has shape {tuple(owner.shape)}, {reason}")
        states = None
        if self.config.mode == "output":
            done = super().forward(
                input_ids,
                attention_mask if owner is None else self._bias(owner),
                token_type_ids,
                position_ids,
                inputs_embeds,
                output_hidden_states=output_hidden_states,
                **keywords,
            )
            hidden, pooled, states = done.last_hidden_state, done.pooler_output, done.hidden_states
            embedding = self.manifold.projx(_mean(hidden, attention_mask) if owner is None else mean_by_owner(hidden, owner))
        else:
            unknown = [name for name, value in keywords.items() if value not in (None, False)]
            if unknown:
                raise ValueError(f"{unknown[0]}: is not available in mode 'inner'")
            points = self.manifold.expmap0(self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds))
            seen = torch.ones(shape, dtype=torch.bool, device=points.device) if attention_mask is None else attention_mask.bool()
            stages, mask = [points], seen[:, None, None, :] if owner is None else together(owner)
            for layer in self.encoder.layer:
                stages.append(layer(stages[-1], mask))
            if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
                states = tuple(self.manifold.logmap0(stage) for stage in stages)
            hidden = self.manifold.logmap0(stages[-1])
            pooled = self.pooler(hidden) if self.pooler is not None else None
            if owner is None:
                embedding = self.manifold.midpoint(stages[-1], seen[:, None, :].to(hidden.dtype)).squeeze(1)
            else:
                of = owner.flatten() == torch.arange(int(owner.max()) + 1, device=owner.device)[:, None]
                embedding = self.manifold.midpoint(stages[-1].flatten(0, 1), of.to(hidden.dtype))
        output = HbBertOutput(last_hidden_state=hidden, pooler_output=pooled, hidden_states=states, embedding=embedding)
        return output if return_dict or return_dict is None else output.to_tuple()

    def _bias(self, owner: Tensor) -> Tensor:
        """What keeps texts of a row apart, as transformers' attention takes it: added to scores, in their type."""
        kind = owner.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        same = together(owner)
        return torch.zeros(same.shape, dtype=dtype, device=owner.device).masked_fill(~same, torch.finfo(dtype).min)


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return hidden.mean(1)
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


AutoModel.register(HbBertConfig, HbBertModel, exist_ok=True)
