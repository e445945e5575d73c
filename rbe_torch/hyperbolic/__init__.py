"""Hyperbolic layers and Hb-BERT, a BERT in hyperbolic space, on geoopt: `pip install 'rbe_torch[hyperbolic]'`. docs/hb-bert.md describes
them."""

from __future__ import annotations

from .config import HbBertConfig
from .layers import HypActivation, HypAttention, HypLayerNorm, HypLinear, attend
from .lorentz import Lorentz
from .model import HbBertModel, HbBertOutput
from .poincare import PoincareBall
from .sequence_classification import HbBertForSequenceClassification

__all__ = [
    "HbBertConfig", "HbBertForSequenceClassification", "HbBertModel", "HbBertOutput", "HypActivation", "HypAttention", "HypLayerNorm",
    "HypLinear", "Lorentz", "PoincareBall", "attend",
]  # fmt: skip
