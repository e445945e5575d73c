"""Text as batches that a model is called with: sentences for encoders, stretches of running text for causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SENTENCE_TOKENS = 128  # of an encoder's sequence, at most
CONTEXT_TOKENS = 512  # of a language model's sequence; fewer where the model has fewer positions
_BATCH_TOKENS = 2048


def is_causal(model: nn.Module) -> bool:
    """Whether the model predicts the next token: a transformers class for that, by its name."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file that are not blank. ValueError: no such file, or not one line."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"text: {file} is no file, must be a text file with a sentence or paragraph a line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"text: {file} has no line that is not blank")
    return lines


def calibration_batches(model: nn.Module, tokenizer: Any, lines: Sequence[str], samples: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """`samples` sequences drawn from the lines, as batches of about 2048 tokens."""
    generator = torch.Generator().manual_seed(seed)
    if is_causal(model):
        windows = text_windows(tokenizer, "\n".join(lines), context_of(model))
        chosen = torch.randperm(len(windows), generator=generator)[:samples]
        step = max(1, _BATCH_TOKENS // windows.shape[1])
        return [{"input_ids": windows[part]} for part in chosen.split(step)]
    chosen = [lines[i] for i in torch.randperm(len(lines), generator=generator)[:samples].tolist()]
    return sentence_batches(tokenizer, chosen)


def sentence_batches(tokenizer: Any, sentences: Sequence[str], size: int = 64) -> list[dict[str, Tensor]]:
    """Padded batches of sentences of similar length, at most 128 tokens each."""
    ordered = sorted(sentences, key=len)
    return [
        dict(tokenizer(ordered[i : i + size], padding=True, truncation=True, max_length=SENTENCE_TOKENS, return_tensors="pt"))
        for i in range(0, len(ordered), size)
    ]


def text_windows(tokenizer: Any, text: str, context: int) -> Tensor:
    """The text's tokens cut into windows, int64 [N, context]; a last part that does not fill one is dropped unless there is no other."""
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(tokens) < 2:
        raise ValueError(f"text: is {len(tokens)} tokens, must be at least 2")
    context = min(context, len(tokens))
    return tokens[: len(tokens) // context * context].view(-1, context)


def context_of(model: nn.Module) -> int:
    """Tokens of a sequence: 512, or the model's positions where it has fewer."""
    positions = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None) or CONTEXT_TOKENS
    return min(CONTEXT_TOKENS, positions)
