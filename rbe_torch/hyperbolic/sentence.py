"""Hb-BERT as a module of sentence-transformers: SentenceTransformer(modules=[HbBertModule(directory)]).encode(texts) gives points of
`module.model.manifold`.

SentenceTransformer.save and its constructor work. Its constructor imports the module by the class name that modules.json has, so open only
directories that you trust (and say trust_remote_code=True where it asks).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..models import load_tokenizer, model_directory
from .model import HbBertModel

try:
    from sentence_transformers.base.modules.input_module import InputModule
except ImportError as error:
    raise ImportError(
        f"rbe_torch.hyperbolic.sentence needs sentence-transformers 6 (pip install sentence-transformers): {error}"
    ) from error


class HbBertModule(InputModule):
    """Texts -> points. `sentence_embedding` float [B, d] are the points' coordinates, `token_embeddings` the last hidden states.

    source: a directory with a tokenizer, or "minilm", loaded by HbBertModel.from_pretrained with the other arguments.
    max_length: of a text in tokens. Distances between embeddings: module.model.manifold.dist; a cosine means nothing here.
    """

    config_file_name = "hb_bert_module.json"
    config_keys = ["max_length"]

    def __init__(self, source: str, max_length: int = 128, **arguments: Any) -> None:
        super().__init__()
        directory = model_directory(str(source))
        self.max_length = max_length
        self.tokenizer = load_tokenizer(directory)
        self.model = HbBertModel.from_pretrained(directory, **arguments).eval()

    def preprocess(self, inputs: Any, prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        texts = [(prompt or "") + text for text in inputs]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        output = self.model(features["input_ids"], features["attention_mask"])
        return {**features, "sentence_embedding": output.embedding, "token_embeddings": output.last_hidden_state}

    def get_embedding_dimension(self) -> int:
        return self.model.config.hidden_size

    def save(self, output_path: str, *args: Any, **_: Any) -> None:
        self.model.save_pretrained(output_path)
        self.save_tokenizer(output_path)
        self.save_config(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **keywords: Any) -> HbBertModule:
        path = cls.load_dir_path(model_name_or_path, subfolder=subfolder, local_files_only=True) if subfolder else model_name_or_path
        return cls(path, **cls.load_config(model_name_or_path, subfolder=subfolder, local_files_only=True))
