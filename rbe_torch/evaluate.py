"""How well a model does: Spearman's rank correlation of a sentence encoder with scores of sentence pairs, accuracy of a linear probe of its embeddings on
sentences of two classes, perplexity of a language model, and what the outputs of every layer have of those of another model.

Sentence embeddings: mean of the last hidden states over the attention mask, divided by their length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .linear import RBELinear
from .progress import Progress

PROJECT_PAIRS = Path(__file__).resolve().parent.parent / "benchmarks" / "pairs.tsv"
_STSB_FILES = ("stsb/sts-dev.csv", "sts-dev.csv", "stsb/dev.tsv", "dev.tsv")
_MAX_TOKENS = 128
_BATCH = 64


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs with the similarity 0 to 5 that people gave them."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]

    @property
    def sentences(self) -> list[str]:
        return self.first + self.second

    def __len__(self) -> int:
        return len(self.scores)


def read_pairs(path: str | Path | None = None) -> Pairs:
    """Pairs of a file or of a directory that holds STS-B (stsb/sts-dev.csv or sts-dev.csv); None: the project's own pairs.

    A line is tab-separated: `score sentence sentence`, or STS-B's seven columns with the score in the fifth. ValueError names the line.
    """
    file = PROJECT_PAIRS if path is None else Path(path)
    if path is None and not file.is_file():
        raise ValueError("data: the project's own pairs are not installed with the package; pass --data with a file of "
                         "score<TAB>sentence<TAB>sentence lines or a directory that holds STS-B")
    if file.is_dir():
        found = [file / name for name in _STSB_FILES if (file / name).is_file()]
        if not found:
            raise ValueError(f"data: {file} holds none of {', '.join(_STSB_FILES)}")
        file = found[0]
    if not file.is_file():
        raise ValueError(f"data: {file} is no file and no directory")
    first, second, scores = [], [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        cells = line.split("\t")
        chosen = cells if len(cells) == 3 else cells[4:7]
        try:
            score, a, b = float(chosen[0]), chosen[1].strip(), chosen[2].strip()
        except (IndexError, ValueError):
            if number == 1:
                continue  # a header
            raise ValueError(f"data: {file} line {number} is not score<TAB>sentence<TAB>sentence nor a line of STS-B: {line[:60]!r}") from None
        scores.append(score)
        first.append(a)
        second.append(b)
    if len(scores) < 2:
        raise ValueError(f"data: {file} holds {len(scores)} pairs, must hold at least 2")
    return Pairs(file.name, first, second, scores)


@dataclass(frozen=True)
class Sentences:
    """Sentences of two classes, labels 0 and 1."""

    texts: list[str]
    labels: Tensor


def read_sst2(directory: str | Path | None) -> tuple[Sentences, Sentences] | None:
    """(train, dev) of DIR/sst2/train.tsv and dev.tsv: a header, then `label<TAB>sentence` lines. None where the directory has no such pair of files.
    ValueError names a line that is none."""
    files = [Path(directory) / "sst2" / name for name in ("train.tsv", "dev.tsv")] if directory is not None else []
    if not files or not all(file.is_file() for file in files):
        return None
    return _read_classes(files[0]), _read_classes(files[1])


def _read_classes(file: Path) -> Sentences:
    texts, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()[1:], 2):
        label, _, sentence = line.partition("\t")
        if label not in ("0", "1") or not sentence.strip():
            raise ValueError(f"data: {file} line {number} is not 0<TAB>sentence or 1<TAB>sentence: {line[:60]!r}")
        texts.append(sentence)
        labels.append(int(label))
    if not texts:
        raise ValueError(f"data: {file} holds no sentence")
    return Sentences(texts, torch.tensor(labels))


def fit_probe(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Ridge regression of labels 0 and 1 on embeddings [N, d] and a constant: float64 [d + 1]."""
    x = torch.cat([embeddings.double(), torch.ones(len(embeddings), 1, dtype=torch.float64)], 1)
    ridge = 1e-3 * len(x) / x.shape[1] * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(x.t() @ x + ridge, x.t() @ (2.0 * labels.double() - 1))


def probe_accuracy(probe: Tensor, embeddings: Tensor, labels: Tensor) -> float:
    """Share of the sentences whose class the probe tells from their embeddings."""
    guess = embeddings.double() @ probe[:-1] + probe[-1] > 0
    return float((guess.long() == labels).double().mean())


@torch.inference_mode()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str], progress: bool = False, title: str = "encode sentences") -> Tensor:
    """Unit embeddings [N, d] in float32 of an encoder (a module whose output has last_hidden_state), on the device it is on."""
    device = next(model.parameters()).device
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    parts = []
    with Progress(title, len(sentences), progress) as bar:
        for start in range(0, len(order), _BATCH):
            batch = tokenizer([sentences[i] for i in order[start : start + _BATCH]], padding=True, truncation=True, max_length=_MAX_TOKENS,
                              return_tensors="pt").to(device)
            hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            parts.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).cpu())
            bar.step(len(parts[-1]))
    embeddings = torch.cat(parts)
    return torch.empty_like(embeddings).index_copy_(0, torch.tensor(order), embeddings)


def pair_similarity(embeddings: Tensor) -> Tensor:
    """Cosine [N] of each pair, from the embeddings [2 N, d] of Pairs.sentences."""
    first, second = embeddings.chunk(2)
    return (first * second).sum(1)


def spearman(a: Any, b: Any) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank. NaN where one side is constant."""
    x, y = (_ranks(torch.as_tensor(values, dtype=torch.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / norm if norm > 0 else float("nan")


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, progress: bool = False, batch: int = 4) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window; windows int64 [N, context], a causal language model."""
    device, total = next(model.parameters()).device, 0.0
    with Progress("perplexity", len(windows), progress) as bar:
        for part in windows.split(batch):
            part = part.to(device)
            scores = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            total += float(torch.nn.functional.cross_entropy(scores.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
            bar.step(len(part))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.inference_mode()
def layer_errors(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """For every RBELinear of `model`: mean cosine over tokens, and |difference|^2 / |dense|^2, of its outputs to those of the same layer of `dense`, each
    model on its own way through the batches."""
    names = [name for name, module in model.named_modules() if isinstance(module, RBELinear)]
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in names}  # cosines, tokens, lost, dense
    for batch in batches:
        got, wanted = _outputs(model, names, batch), _outputs(dense, names, batch)
        mask = batch.get("attention_mask")
        for name in names:
            a, b = got.get(name), wanted.get(name)
            if a is None or b is None:
                continue
            if mask is not None and a.shape[:-1] == mask.shape:
                a, b = a[mask.bool()], b[mask.bool()]
            a, b = a.flatten(0, -2).double(), b.flatten(0, -2).double()
            cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).sum()
            sums[name] += torch.stack([cosine, torch.tensor(float(len(a))).double(), (a - b).square().sum(), b.square().sum()])
    return [{"name": name, "cosine": float(s[0] / s[1]), "relative_error": float(s[2] / s[3])} for name, s in sums.items() if s[1] > 0]


def _outputs(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: found.__setitem__(name, output)) for name in names]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]
