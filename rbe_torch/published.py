"""Configurations of published models by name, for `rbe plan`: shapes alone, no weights. Numbers from the models' papers and configuration
files."""

from __future__ import annotations

from typing import Any

_LLAMA = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]}
_GPT = {"vocab_size": 50257, "architectures": ["GPT2LMHeadModel"]}

# name -> (transformers' model_type, values). GPT-3 as GPT-2 with its numbers (Brown et al. 2020, table 2.1): same layers, same sizes.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**_GPT, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "dtype": "float32"}),
    "llama-2-7b": ("llama", {**_LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                             "num_key_value_heads": 32, "dtype": "float16"}),
    "llama-2-70b": ("llama", {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                              "num_key_value_heads": 8, "dtype": "float16"}),
    "gpt-3-175b": ("gpt2", {**_GPT, "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "dtype": "float16"}),
}  # fmt: skip


def published_config(name: str) -> Any:
    """The transformers configuration. ValueError: no such name."""
    from .models import transformers_module

    if name not in PUBLISHED:
        raise ValueError(f"MODEL: {name!r} is none of {', '.join(PUBLISHED)}")
    kind, values = PUBLISHED[name]
    return transformers_module().AutoConfig.for_model(kind, **values)
