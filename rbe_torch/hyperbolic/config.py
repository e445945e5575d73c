"""HbBertConfig: BERT's configuration and where its representations lie."""

from __future__ import annotations

try:
    from huggingface_hub.dataclasses import strict
    from transformers import AutoConfig, BertConfig
except ImportError as error:
    raise ImportError(f"rbe_torch.hyperbolic needs transformers 5 (pip install 'rbe_torch[hyperbolic]'): {error}") from error

MODES = ("inner", "output")


@strict
class HbBertConfig(BertConfig):
    """BertConfig with four entries more.

    manifold: "lorentz" or "poincare". curvature: c >= 0 of the curvature -c; None is 1 / hidden_size, the ball whose radius is that of the
    cube that tanh-bounded outputs lie in (HiT, arXiv 2401.11374). learnable_curvature: c is trained, by its logarithm.
    mode: "inner", hyperbolic inner layers; "output", a Euclidean BERT whose mean-pooled output is read as a point (HiT's way).
    """

    model_type = "hb-bert"

    manifold: str = "lorentz"
    curvature: float | int | None = None
    learnable_curvature: bool = False
    mode: str = "inner"

    @property
    def c(self) -> float:
        """The curvature that the model starts with."""
        return 1 / self.hidden_size if self.curvature is None else float(self.curvature)


AutoConfig.register("hb-bert", HbBertConfig, exist_ok=True)
