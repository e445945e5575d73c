"""Whole models, dense against compressed: the MiniLM encoder at batch 1 and 32, a decoder of GPT-2 small's shape at one token and at prefill.

Speed and memory alone: codes are random (benchmarks/quality.py measures what they hold), so both sides do the work of a real model of that shape. The decoder's
one token follows a cache of CONTEXT tokens. Models are timed in turn; tokens a second by the smallest time. Memory counts parameters and buffers.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable

import harness
import torch
from torch import nn

import rbe_torch

os.environ["HF_HUB_OFFLINE"] = "1"

LAYOUTS = [("rbe8x2_g8", "exact"), ("rbe8x2_g8", "fast"), ("rbe8x4_g8", "fast"), ("rbe22_g64", "exact")]
SENTENCE, CONTEXT, PREFILL = 24, 128, 512
ENCODER_BATCHES = (1, 32)


def encoder() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)).eval()


def decoder() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config()).eval()


def compressed(model: nn.Module, layout: str, accuracy: str) -> nn.Module:
    """A copy whose linear layers have random codes; the output head stays dense, as compress leaves it."""
    model = copy.deepcopy(model)
    rbe_torch.convert(model, layout=layout)
    rbe_torch.finish_training(model)
    for module in model.modules():
        if isinstance(module, rbe_torch.RBELinear):
            module.accuracy = accuracy
    return model


def megabytes(model: nn.Module) -> float:
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values()) / 1e6


def one_token(model: nn.Module, ids: torch.Tensor) -> Callable[[], object]:
    """The logits of one more token; the cache is cut back to CONTEXT tokens after each call."""
    cache = model(ids, use_cache=True).past_key_values

    def step() -> object:
        logits = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)  # the token just added
        return logits

    return step


def run_case(name: str, machine: harness.Machine, seconds: float) -> list[dict[str, object]]:
    kind, size = name.split()
    dense = (encoder if kind == "encoder" else decoder)()
    models = {"dense float32": dense} | {f"{layout} {accuracy}": compressed(dense, layout, accuracy) for layout, accuracy in LAYOUTS}
    if kind == "encoder":
        tokens = int(size) * SENTENCE
        ids = torch.randint(0, 30000, (int(size), SENTENCE))
        calls = {label: [lambda model=model: model(ids)] for label, model in models.items()}
    elif size == "token":
        tokens = 1
        ids = torch.randint(0, 50000, (1, CONTEXT))
        calls = {label: [one_token(model, ids)] for label, model in models.items()}
    else:
        tokens = PREFILL
        ids = torch.randint(0, 50000, (1, PREFILL))
        calls = {label: [lambda model=model: model(ids, logits_to_keep=1)] for label, model in models.items()}
    timings = harness.race(calls, max(seconds, 5.0))
    best = timings["dense float32"]
    return [{"model": name, "layers": label, "MB": f"{megabytes(models[label]):.1f}", "ms": f"{t.minimum * 1e3:.2f}", "ms median": f"{t.median * 1e3:.2f}",
             "tokens a second": f"{tokens / t.minimum:.0f}", "over dense": f"{best.minimum / t.minimum:.2f}", "by median": f"{best.median / t.median:.2f}"}
            for label, t in timings.items()]  # fmt: skip


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    names = [*(f"encoder {batch}" for batch in ENCODER_BATCHES), "decoder token", f"decoder {PREFILL}"]
    with torch.no_grad():
        harness.run_cases(arguments, "model", {name: functools.partial(run_case, name, seconds=arguments.seconds) for name in names})


if __name__ == "__main__":
    main()
