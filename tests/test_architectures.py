"""Models other than BERT, tiny and with random weights. Risks: a checkpoint that its own class cannot load, a weight transposed, a head compressed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch.cli import main

tf = pytest.importorskip("transformers")
SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.arange(5, 23).view(2, 9)
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2))


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=True))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0))


def mamba() -> nn.Module:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2, **SPECIAL))


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16,
                                                     patch_size=4))


def whisper() -> nn.Module:
    config = tf.WhisperConfig(vocab_size=99, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                              decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=16, max_target_positions=16,
                              decoder_start_token_id=1, **SPECIAL)
    return tf.WhisperForConditionalGeneration(config)


MODELS = {
    "gpt2": (gpt2, {"input_ids": IDS}), "llama": (llama, {"input_ids": IDS}), "mamba": (mamba, {"input_ids": IDS}),
    "t5": (t5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}), "vit": (vit, {"pixel_values": torch.linspace(-1, 1, 1536).view(2, 3, 16, 16)}),
    "whisper": (whisper, {"input_features": torch.linspace(-1, 1, 512).view(2, 8, 32), "decoder_input_ids": IDS[:, :4]}),
}  # fmt: skip


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_its_own_class_loads_what_was_compressed_and_what_was_decompressed(name: str, tmp_path: Path) -> None:
    import rbe_torch.hf  # noqa: F401  for from_pretrained

    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    wanted = logits(model, inputs)
    rbe_torch.save_pretrained(model, tmp_path / "codes")
    assert torch.equal(logits(rbe_torch.load_pretrained(tmp_path / "codes"), inputs), wanted)
    assert torch.equal(logits(rbe_torch.load_pretrained(tmp_path / "codes", make()), inputs), wanted)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "codes"), inputs), wanted)
    assert main(["export", str(tmp_path / "codes"), "--to", "dense", "--out", str(tmp_path / "dense"), "--quiet"]) == 0
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path / "dense"), inputs), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["at once", "copied", "loaded into", "loaded", "trained"])
def test_a_conv1d_comes_back_as_one_with_its_weight_the_right_way_round(way: str, tmp_path: Path) -> None:
    """The square c_proj of GPT-2 would be loaded transposed without a word."""
    torch.manual_seed(0)
    model = gpt2().eval()
    rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    rbe_torch.save_pretrained(model, tmp_path)
    model = {"copied": lambda: copy.deepcopy(model), "loaded into": lambda: rbe_torch.load_pretrained(tmp_path, gpt2()),
             "loaded": lambda: rbe_torch.load_pretrained(tmp_path),
             "trained": lambda: rbe_torch.finish_training(rbe_torch.prepare_training(model))}.get(way, lambda: model)()  # fmt: skip
    weight, wanted = model.transformer.h[0].attn.c_proj.weight, logits(model, {"input_ids": IDS})
    dense = rbe_torch.decompress(model).transformer.h[0].attn.c_proj
    assert type(dense).__name__ == "Conv1D" and torch.equal(dense.weight.t(), weight) and (dense.nx, dense.nf) == (32, 32)
    torch.testing.assert_close(logits(model, {"input_ids": IDS}), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["direct", "latent", "lowrank"])
def test_a_model_that_multiplies_with_the_weight_trains_it(method: str) -> None:
    """Mamba reads dt_proj.weight and never calls dt_proj."""
    model = mamba()
    if method == "direct":
        rbe_torch.convert(model, "rbe22_g8")
    else:
        rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    if method == "latent":
        rbe_torch.prepare_training(model, "latent")
    if method == "lowrank":
        from rbe_torch.lowrank import add_lowrank

        add_lowrank(model, 2)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    layer = model.backbone.layers[0].mixer.dt_proj
    key = {"direct": "log_gain", "latent": "latent", "lowrank": "lowrank_left"}[method]
    assert float(layer._parameters[key].grad.abs().sum()) > 0


def test_the_last_layer_of_a_head_of_several_is_left_alone() -> None:
    model = tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL))
    report = rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    assert "output head" in {row.name: row.reason for row in report.skipped}["classifier.out_proj"]
    assert "classifier.dense" in {row.name for row in report.converted}
    again = tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL))
    assert "classifier.out_proj" in {row.name for row in rbe_torch.compress(again, "rbe8x2_g8", progress=False, include="classifier").converted}


def test_streaming_a_model_whose_tensors_transformers_renames_says_so(tmp_path: Path, capsys) -> None:
    vit().save_pretrained(tmp_path / "dense")
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--stream", "--quiet"]) == 1
    assert "renames this model's tensors" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--quiet"]) == 0
