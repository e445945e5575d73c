"""Classes of texts by Hb-BERT: a linear layer on the tangent vector of a text's point."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .config import HbBertConfig
from .from_bert import FromBert
from .model import HbBertModel


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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        """labels [B]: classes; the output then has the cross-entropy as `loss`. Returns transformers' SequenceClassifierOutput."""
        keywords.pop("return_dict", None)
        output = self.bert(input_ids, attention_mask, token_type_ids, **keywords)
        logits = self.classifier(self.dropout(self.bert.manifold.logmap0(output.embedding)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


AutoModelForSequenceClassification.register(HbBertConfig, HbBertForSequenceClassification, exist_ok=True)
