"""transformers: from_pretrained gives the compressed model back bit-exactly and small, and refuses what it cannot load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear

transformers = pytest.importorskip("transformers", minversion="5")
import rbe_torch.hf

TOKENS = torch.arange(10)[None]


def bert(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100, **options)
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=32, bos_token_id=0, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def coded(model: nn.Module, layout: str = "rbe8x2_g8", **options) -> nn.Module:
    rbe_torch.convert(model, layout, **options)
    return rbe_torch.finish_training(model)


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS)[0]


def layers(model: nn.Module) -> list[RBELinear]:
    return [module for module in model.modules() if isinstance(module, RBELinear)]


@pytest.mark.parametrize("make, auto", [(bert, "AutoModel"), (gpt2, "AutoModelForCausalLM")])
@pytest.mark.parametrize("layout", ["rbe8x2_g8", "rbe9r_g8"])
def test_every_way_of_loading_gives_the_same_bits(make, auto: str, layout: str, tmp_path: Path) -> None:
    model = coded(make(), layout)
    rbe_torch.save_pretrained(model, tmp_path)
    want = run(model)
    for loaded in (getattr(transformers, auto).from_pretrained(tmp_path), type(model).from_pretrained(tmp_path), rbe_torch.load_pretrained(tmp_path),
                   rbe_torch.load_pretrained(tmp_path, make())):  # fmt: skip
        assert type(loaded) is type(model) and torch.equal(run(loaded.eval()), want)
        assert len(layers(loaded)) == len(layers(model)) and len({id(layer.basis) for layer in layers(loaded)}) == 1
        assert all(layer.problem() == "" and not any(p.is_meta for p in layer.parameters()) for layer in layers(loaded))
    if make is gpt2:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 13)


def test_a_fresh_process_loads_without_the_dense_weights(tmp_path: Path) -> None:
    model = coded(bert())
    rbe_torch.save_pretrained(model, tmp_path / "saved")
    torch.save(run(model), tmp_path / "want.pt")
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}; import torch, transformers, rbe_torch.hf\n"
        "m = transformers.AutoModel.from_pretrained(sys.argv[1]); "
        "assert not [n for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)]; "
        "assert torch.equal(m(torch.arange(10)[None])[0], torch.load(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved", tmp_path / "want.pt"], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_a_model_with_a_head_takes_the_base_model_and_the_other_way_round(tmp_path: Path) -> None:
    model = coded(bert())
    rbe_torch.save_pretrained(model, tmp_path)
    headed, info = transformers.BertForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(run(headed.eval().bert), run(model))
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"} and not info["unexpected_keys"]
    whole = coded(transformers.BertForSequenceClassification(model.config).eval(), include=["bert", "classifier"])
    rbe_torch.save_pretrained(whole, tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(run(base), run(whole.bert)) and len(layers(base)) == len(layers(whole)) - 1


def test_dtype_casts_all_but_the_format(tmp_path: Path) -> None:
    model = coded(bert())
    rbe_torch.save_pretrained(model, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert run(loaded).dtype == torch.bfloat16 and {layer.dtype for layer in layers(loaded)} == {torch.bfloat16}
    for ours, theirs in zip(layers(model), layers(loaded), strict=True):
        assert torch.equal(ours.basis, theirs.basis) and torch.equal(ours.gain, theirs.gain) and theirs.bias.dtype == torch.bfloat16
    rbe_torch.save_pretrained(loaded, tmp_path)
    again = rbe_torch.load_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and torch.equal(run(again), run(loaded))


def test_mixed_dtypes_come_back_from_load_pretrained(tmp_path: Path) -> None:
    model = coded(bert())
    model.encoder.layer[0].to(torch.bfloat16)
    rbe_torch.save_pretrained(model, tmp_path)
    loaded = rbe_torch.load_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype and torch.equal(loaded.state_dict()[key], value), key
    assert [layer.dtype for layer in layers(loaded)] == [layer.dtype for layer in layers(model)]


def test_transformers_own_save_pretrained_works(tmp_path: Path) -> None:
    model = coded(gpt2())
    model.save_pretrained(tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(run(transformers.AutoModelForCausalLM.from_pretrained(path)), run(model))
        assert torch.equal(run(rbe_torch.load_pretrained(path).eval()), run(model))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps_of_one_device_load(device_map: object, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = coded(bert())
    rbe_torch.save_pretrained(model, tmp_path)
    assert torch.equal(run(transformers.AutoModel.from_pretrained(tmp_path, device_map=device_map).cpu()), run(model))


def test_the_trainer_trains_a_loaded_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rbe_torch.save_pretrained(coded(gpt2(), "rbe22_g8"), tmp_path)
    model = rbe_torch.prepare_training(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    before = model.transformer.h[0].mlp.c_fc.amplitude.detach().clone()
    arguments = transformers.TrainingArguments(output_dir=tmp_path / "run", max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 8).train()
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.amplitude, before)
    rbe_torch.finish_training(model).save_pretrained(tmp_path)
    assert torch.equal(run(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), run(model.eval()))


def test_weights_tied_against_the_configuration_stay_tied(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, n_positions=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.lm_head.weight = model.transformer.wte.weight
    coded(model)
    rbe_torch.save_pretrained(model, tmp_path)
    for loaded in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path), rbe_torch.load_pretrained(tmp_path)):
        assert torch.equal(run(loaded.eval()), run(model))


def test_decompressing_forgets_the_codes(tmp_path: Path) -> None:
    rbe_torch.save_pretrained(coded(bert()), tmp_path)
    for undo in (rbe_torch.decompress, lambda model: model.dequantize()):
        model = transformers.AutoModel.from_pretrained(tmp_path)
        want = run(model)
        undo(model)
        assert not layers(model) and not model.is_quantized
        torch.testing.assert_close(run(model), want, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "dense")
        plain = transformers.AutoModel.from_pretrained(tmp_path / "dense")
        assert torch.equal(run(plain), run(model)) and "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


# ---- refusals --------------------------------------------------------------------------------------------------------------------
def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    rbe_torch.save_pretrained(coded(bert()), tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    with safetensors.safe_open(file, "pt") as handle:
        packed = handle.get_tensor("pooler.dense.packed").numpy().tobytes()
    place = data.index(packed)
    file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ValueError, match="model.safetensors: tensor 'pooler.dense.packed' was altered"):
        transformers.AutoModel.from_pretrained(tmp_path)
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="model.safetensors: is not a whole safetensors file"):
        rbe_torch.load_pretrained(tmp_path)


def test_a_configuration_of_other_weights_is_refused_and_load_pretrained_still_works(tmp_path: Path) -> None:
    rbe_torch.save_pretrained(coded(bert()), tmp_path)
    stale = (tmp_path / "config.json").read_bytes()
    model = coded(bert(), "rbe16s_g8")
    rbe_torch.save_pretrained(model, tmp_path)
    (tmp_path / "config.json").write_bytes(stale)
    with pytest.raises(ValueError, match="model.safetensors: is not the file that config.json describes"):
        transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path)), run(model))


def test_an_altered_configuration_is_refused(tmp_path: Path) -> None:
    rbe_torch.save_pretrained(coded(bert()), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"]["pooler.dense"]["layout"] = "rbe16s_g8"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    rbe_torch.save_pretrained(coded(bert()), tmp_path)
    with pytest.raises(ValueError, match="has no such module|no layer"):
        transformers.GPT2Model.from_pretrained(tmp_path, config=None)


def test_a_class_that_is_no_model_is_not_imported(tmp_path: Path) -> None:
    class Mine(transformers.BertModel):
        pass

    model = Mine(bert().config).eval()
    coded(model)
    rbe_torch.save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="no model of transformers"):
        rbe_torch.load_pretrained(tmp_path)
    assert torch.equal(run(rbe_torch.load_pretrained(tmp_path, Mine(model.config).eval())), run(model))


def test_compressing_while_loading_is_refused(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rbe_torch.compress"):
        transformers.AutoModel.from_pretrained(tmp_path, quantization_config=rbe_torch.hf.RBEConfig())
