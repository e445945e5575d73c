"""Hb-BERT. Risks: outputs that are not BERT's at c = 0, a curvature that does nothing, codes or a curvature lost in saving, padding that
is seen, and transformers, sentence-transformers or the compiler that cannot use the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import rbe_torch
from rbe_torch import RBELinear

pytest.importorskip("geoopt")
transformers = pytest.importorskip("transformers", minversion="5")
from rbe_torch.hyperbolic import HbBertConfig, HbBertForSequenceClassification, HbBertModel
from rbe_torch.hyperbolic.packing import pack

LIKE_BERT = 1e-4  # the bound on outputs at c -> 0
COMPILED = 1e-4
IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
MANIFOLDS = pytest.mark.parametrize("manifold", ["lorentz", "poincare"])
MODES = pytest.mark.parametrize("mode", ["inner", "output"])


def bert(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 60,
        "max_position_embeddings": 32,
        **options,
    }
    config = transformers.BertConfig(**options)
    model = transformers.BertModel(config).eval()
    for parameter in model.parameters():  # large enough for attention to choose and for curvature to matter
        if parameter.dim() == 2:
            parameter.data *= 4
    return model


def hb(model: nn.Module | None = None, **options) -> HbBertModel:
    return HbBertModel.from_pretrained(bert() if model is None else model, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26)), *(f"##{chr(97 + i)}" for i in range(26))]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    bert().save_pretrained(path)
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return path


# ---- BERT at c = 0 ----------------------------------------------------------------------------------------------------------------
@MANIFOLDS
@MODES
@pytest.mark.parametrize("c", [0.0, 1e-9])
def test_without_curvature_the_outputs_are_those_of_bert(manifold, mode, c, directory):
    expected = bert()(IDS, MASK)
    mean = (expected.last_hidden_state * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    for source in (bert(), directory):
        output = HbBertModel.from_pretrained(source, manifold=manifold, curvature=c, mode=mode).eval()(IDS, MASK)
        seen = MASK.bool()
        torch.testing.assert_close(output.last_hidden_state[seen], expected.last_hidden_state[seen], rtol=0, atol=LIKE_BERT)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=LIKE_BERT)
        torch.testing.assert_close(output.embedding, mean, rtol=0, atol=LIKE_BERT)


def test_without_curvature_the_packaged_encoder_is_reproduced():
    from rbe_torch import models

    try:
        source = models.model_directory("minilm")
    except ValueError as error:
        pytest.skip(str(error))
    ids, mask = torch.tensor([[101, 3899, 2003, 102], [101, 2158, 102, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    expected = models.load_dense(source)(ids, mask).last_hidden_state
    ours = HbBertModel.from_pretrained(source, curvature=0).eval()(ids, mask).last_hidden_state
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=0, atol=LIKE_BERT)


@MANIFOLDS
def test_curvature_changes_the_outputs(manifold):
    """Everything above would pass with a model that ignores c."""
    flat, curved = (hb(manifold=manifold, curvature=c)(IDS, MASK).last_hidden_state for c in (0.0, 0.1))
    assert (flat - curved).abs().max() > 0.1


def test_the_ball_and_the_sheet_are_one_model():
    """The ball's metric at the origin is 4 times the Euclidean one: at c it is the sheet of curvature 4 c."""
    ball, sheet = hb(manifold="poincare", curvature=0.01), hb(manifold="lorentz", curvature=0.04)
    torch.testing.assert_close(ball(IDS, MASK).last_hidden_state, sheet(IDS, MASK).last_hidden_state, rtol=0, atol=LIKE_BERT)


@MANIFOLDS
@MODES
def test_padding_is_not_seen_and_hidden_states_are_reported(manifold, mode):
    model = hb(manifold=manifold, curvature=0.1, mode=mode)
    padded, alone = model(IDS, MASK, output_hidden_states=True), model(IDS[1:, :3])
    torch.testing.assert_close(padded.embedding[1:], alone.embedding, rtol=0, atol=1e-5)
    assert len(padded.hidden_states) == 3
    assert torch.equal(padded.hidden_states[-1], padded.last_hidden_state)


@MANIFOLDS
@MODES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_of_one_row_do_not_see_each_other(manifold, mode, attention):
    generator, lengths = torch.Generator().manual_seed(0), torch.tensor([3, 9, 1, 5, 5, 2, 8, 4])
    ids = torch.randint(5, 60, (8, 9), generator=generator) * (torch.arange(9) < lengths[:, None])
    model = hb(manifold=manifold, curvature=0.1, mode=mode)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = attention
    packed = pack(ids, lengths, 12)
    assert packed["owner"].shape == (4, 12)
    assert packed["owner"].flatten().sort().values[11:].tolist() == torch.arange(8).repeat_interleave(lengths).tolist()
    alone = torch.cat([model(ids[i : i + 1, :n]).embedding for i, n in enumerate(lengths)])
    torch.testing.assert_close(model(**packed).embedding, alone, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(points.square().sum(), model.parameters(), allow_unused=True) for points in (model(**packed).embedding, alone)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="owner: has shape .4, 12., cannot be given with attention_mask"):
        model(**packed, attention_mask=torch.ones(4, 12))
    with pytest.raises(ValueError, match="owner: has shape .3, 12., must have shape .4, 12."):
        model(**{**packed, "owner": packed["owner"][1:]})


@MANIFOLDS
@MODES
def test_every_parameter_learns(manifold, mode):
    model = hb(manifold=manifold, mode=mode, learnable_curvature=True).train()
    output = model(IDS, MASK)
    (model.manifold.dist(output.embedding[0], output.embedding[1]) + output.pooler_output.sum()).backward()
    without = [
        name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.abs().max() > 0
    ]
    assert not [name for name in without if "key.bias" not in name], without  # for c = 0 the softmax does not see a key's bias


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")  # its successor is not in transformers 5.0
def test_checkpointed_layers_have_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = hb(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), curvature=0.05, learnable_curvature=True).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(IDS, MASK).embedding.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# ---- codes ------------------------------------------------------------------------------------------------------------------------
@MANIFOLDS
def test_every_linear_layer_can_be_in_codes_and_is_the_decoded_layer(manifold):
    coded = hb(manifold=manifold, curvature=0.05, layout="rbe8x2_g8")
    linears = [name for name, module in coded.named_modules() if isinstance(module, (nn.Linear, RBELinear))]
    assert len(linears) == 13 and all(isinstance(coded.get_submodule(name), RBELinear) for name in linears)
    output = coded(IDS, MASK).last_hidden_state
    torch.testing.assert_close(rbe_torch.decompress(coded)(IDS, MASK).last_hidden_state, output, rtol=0, atol=LIKE_BERT)


def test_a_compressed_bert_keeps_its_codes():
    model = bert()
    rbe_torch.compress(model, "rbe8x2_g8", progress=False)
    ours = hb(model, curvature=0.0)
    for name, layer in model.named_modules():
        if isinstance(layer, RBELinear):
            assert torch.equal(ours.get_submodule(name).codes, layer.codes)
    torch.testing.assert_close(ours(IDS, MASK).last_hidden_state, model(IDS, MASK).last_hidden_state, rtol=0, atol=LIKE_BERT)
    assert len({id(module.basis) for module in ours.modules() if isinstance(module, RBELinear)}) == 1  # shared, as it was


def test_codes_are_trained_in_the_hyperbolic_model():
    model = hb(layout="rbe16s_g8").train()
    rbe_torch.prepare_training(model)
    optimiser = torch.optim.AdamW(rbe_torch.param_groups(model, lr=1e-3))
    losses = []
    for _ in range(20):
        embedding = model(IDS, MASK).embedding
        loss = (model.manifold.dist(embedding[0], embedding[1]) - 9).square()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    rbe_torch.finish_training(model)
    assert torch.isfinite(model.eval()(IDS, MASK).embedding).all()


# ---- saving -----------------------------------------------------------------------------------------------------------------------
@MANIFOLDS
@MODES
@pytest.mark.parametrize("layout", [None, "rbe8x2_g8"])
def test_a_saved_model_comes_back_bit_for_bit(manifold, mode, layout, tmp_path):
    model = hb(manifold=manifold, mode=mode, curvature=0.03, learnable_curvature=True, layout=layout)
    model.manifold.log_c.data += 0.123
    expected = model(IDS, MASK)
    model.save_pretrained(tmp_path)
    for load in (HbBertModel.from_pretrained, transformers.AutoModel.from_pretrained):
        again = load(tmp_path).eval()
        assert isinstance(again, HbBertModel) and again.config.mode == mode and type(again.manifold) is type(model.manifold)
        output = again(IDS, MASK)
        assert torch.equal(output.embedding, expected.embedding) and torch.equal(output.last_hidden_state, expected.last_hidden_state)
    fixed = hb(manifold=manifold, mode=mode, curvature=0.1)
    fixed.save_pretrained(tmp_path / "fixed")
    assert torch.equal(HbBertModel.from_pretrained(tmp_path / "fixed").eval()(IDS, MASK).embedding, fixed(IDS, MASK).embedding)


def test_our_own_loader_finds_the_class_and_a_model_in_memory_keeps_its_curvature(tmp_path):
    model = hb(curvature=0.03, learnable_curvature=True, layout="rbe8x2_g8")
    model.manifold.log_c.data += 0.5
    model.save_pretrained(tmp_path)
    again = rbe_torch.load_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS, MASK).embedding, model(IDS, MASK).embedding)
    fixed = hb(again, learnable_curvature=False)
    assert math.isclose(fixed.manifold.c, 0.03 * math.exp(0.5), rel_tol=1e-6)
    torch.testing.assert_close(fixed(IDS, MASK).embedding, model(IDS, MASK).embedding, rtol=0, atol=1e-5)
    assert hb(again, curvature=0.0, learnable_curvature=False).manifold.c == 0


def test_a_saved_model_can_be_opened_with_another_curvature(tmp_path):
    hb(curvature=0.1).save_pretrained(tmp_path)
    assert HbBertModel.from_pretrained(tmp_path, curvature=0.2).manifold.c == 0.2
    assert HbBertModel.from_pretrained(tmp_path).manifold.c == 0.1
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hb-bert"


def test_the_default_curvature_is_one_over_the_width():
    assert hb().manifold.c == 1 / 32
    learned = hb(learnable_curvature=True)
    assert math.isclose(float(learned.manifold.c.detach()), 1 / 32, rel_tol=1e-6)


def test_a_learned_curvature_starts_at_its_value_when_a_bert_directory_is_read(directory):
    model = HbBertModel.from_pretrained(directory, curvature=0.25, learnable_curvature=True)
    assert math.isclose(float(model.manifold.c.detach()), 0.25, rel_tol=1e-6)


# ---- other people's code ----------------------------------------------------------------------------------------------------------
@MODES
@pytest.mark.parametrize("layout", [None, "rbe8x2_g8"])
def test_the_trainer_trains_it(mode, layout, tmp_path):
    pytest.importorskip("accelerate")
    model = HbBertForSequenceClassification.from_pretrained(
        bert(hidden_dropout_prob=0.0), mode=mode, learnable_curvature=True, layout=layout
    )
    if layout is not None:
        rbe_torch.prepare_training(model)
    examples = [
        {"input_ids": row, "attention_mask": mask, "labels": torch.tensor(i % 2)}
        for i, (row, mask) in enumerate(zip(IDS, MASK, strict=True))
    ] * 8
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=30,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    if layout is not None:
        rbe_torch.finish_training(model)
    model.eval()
    model.save_pretrained(tmp_path / "saved")
    for load in (HbBertForSequenceClassification.from_pretrained, transformers.AutoModelForSequenceClassification.from_pretrained):
        assert torch.equal(load(tmp_path / "saved").eval()(IDS, MASK).logits, model(IDS, MASK).logits)


@torch.no_grad()
def test_the_compiler_takes_the_whole_model():
    model = hb(bert(num_hidden_layers=1), curvature=0.05, layout="rbe8x2_g8", learnable_curvature=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # inductor's C++ would take a minute
    torch.testing.assert_close(compiled(IDS, MASK).embedding, model(IDS, MASK).embedding, rtol=0, atol=COMPILED)


@MANIFOLDS
def test_the_compiler_takes_a_training_step(manifold):
    model = hb(bert(num_hidden_layers=1), manifold=manifold, curvature=0.05, learnable_curvature=True)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(IDS, MASK).embedding.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "manifold.log_c" in gradients[0]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=COMPILED * float(expected.abs().max()) + 1e-6)


def test_sentence_transformers_takes_it_as_a_module(directory, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from rbe_torch.hyperbolic.sentence import HbBertModule

    texts = ["a b c", "d", "e f g h"]
    module = HbBertModule(str(directory), manifold="poincare", curvature=0.05, layout="rbe8x2_g8")
    encoder = sentence_transformers.SentenceTransformer(modules=[module], device="cpu")
    points = encoder.encode(texts, convert_to_tensor=True)
    batch = module.tokenizer(texts, padding=True, return_tensors="pt")
    expected = module.model(batch["input_ids"], batch["attention_mask"]).embedding
    torch.testing.assert_close(points.clone(), expected.detach(), rtol=0, atol=1e-5)
    assert encoder.get_embedding_dimension() == 32
    encoder.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    assert torch.equal(again.encode(texts, convert_to_tensor=True), points)
    assert again[0].model.manifold.c == 0.05


def test_autocast_and_half_precision_give_nearly_the_same_points():
    model = hb(curvature=0.05)
    expected = model(IDS, MASK).embedding
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(IDS, MASK).embedding
    half = model.to(torch.bfloat16)(IDS, MASK).embedding
    for points in (mixed.float(), half.float()):
        assert float(model.manifold.dist(points, expected).detach().max()) < 0.1 * float(model.manifold.dist0(expected).detach().mean())


# ---- what is refused --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"manifold": "sphere"}, "manifold: is 'sphere', must be 'lorentz' or 'poincare'"),
        ({"curvature": -1.0}, "c: is -1.0"),
        ({"mode": "outer"}, "mode: is 'outer', must be 'inner'"),
        ({"layout": "rbe9"}, "layout"),
        ({"curvature": 0.0, "learnable_curvature": True}, "must be positive where it is learned"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, reason):
    with pytest.raises(ValueError, match=reason):
        hb(**options)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(TypeError, match="bert: is a Linear, must be a directory, a BertModel"):
        HbBertModel.from_pretrained(nn.Linear(2, 2))
    transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'gpt2', must be 'bert' or 'hb-bert'"):
        HbBertModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no such file"):
        HbBertModel.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is that of a decoder"):
        HbBertModel(HbBertConfig(hidden_size=8, num_attention_heads=1, is_decoder=True))


def test_wrong_inputs_are_refused():
    model = hb()
    with pytest.raises(ValueError, match="input_ids: give either"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask: has shape \(2, 3\), must be \(2, 5\)"):
        model(IDS, MASK[:, :3])
    with pytest.raises(ValueError, match="output_attentions: is not available in mode 'inner'"):
        model(IDS, MASK, output_attentions=True)
