"""Hierarchies. Risks: a cycle that is not seen, pairs that leak from test to training, wrong parents that are right, a rule chosen on the
test pairs, a resumed run that differs, and a command that says nothing useful about bad data."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rbe_torch
from rbe_torch.cli import main

pytest.importorskip("geoopt")
transformers = pytest.importorskip("transformers", minversion="5")
from rbe_torch.hyperbolic import HbBertModel, Lorentz, PoincareBall, stages, training
from rbe_torch.hyperbolic.families import Families
from rbe_torch.hyperbolic.hierarchy import Hierarchy, read_hierarchy
from rbe_torch.hyperbolic.scoring import ALPHA, BETA, best_rule, f1, f1_by, features, hierarchy_loss
from rbe_torch.hyperbolic.tasks import negatives, split
from rbe_torch.hyperbolic.training import Names, Options, encode_all, train
from rbe_torch.hyperbolic.wordnet import DEFAULT, read_wordnet

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROUNDED = 0.05  # losses of a few steps with products in bfloat16, which has 3 digits
LEARNT = 0.8  # of the first losses


def tree(depth: int = 4, fan: int = 3) -> Hierarchy:
    """Names are words of letters: a node's name is its parent's and one letter more."""
    pairs, level = [], ["r"]
    for _ in range(depth):
        level = [(f"{parent} {LETTERS[i]}", parent) for parent in level for i in range(fan)]
        pairs += level
        level = [child for child, _ in level]
    return Hierarchy.from_pairs(pairs)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(words), max_position_embeddings=32
    )
    transformers.BertModel(config).save_pretrained(path)
    transformers.BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.tsv"
    hierarchy = tree()
    path.write_text("# child, parent\n\n" + "".join(f"{hierarchy.names[a]}\t{hierarchy.names[b]}\n" for a, b in hierarchy.edges))
    return path


# ---- the structure ----------------------------------------------------------------------------------------------------------------
def test_ancestors_depths_and_indirect_pairs_of_a_dag():
    hierarchy = Hierarchy.from_pairs(
        [("cat", "mammal"), ("mammal", "animal"), ("cat", "pet"), ("pet", "thing"), ("animal", "thing"), ("cat", "pet")]
    )
    names, number = hierarchy.names, {name: i for i, name in enumerate(hierarchy.names)}
    assert {names[i] for i in hierarchy.ancestors[number["cat"]]} == {"mammal", "animal", "pet", "thing"}
    assert hierarchy.depths[number["cat"]] == 2 and hierarchy.depths[number["thing"]] == 0
    assert len(hierarchy.edges) == 5
    assert {(names[a], names[b]) for a, b in hierarchy.indirect} == {("cat", "animal"), ("cat", "thing"), ("mammal", "thing")}
    below = hierarchy.below(number["animal"])
    assert sorted(below.names) == ["animal", "cat", "mammal"] and len(below.edges) == 2


def test_a_long_chain_needs_no_recursion():
    hierarchy = Hierarchy.from_pairs([(str(i), str(i + 1)) for i in range(3000)])
    assert max(hierarchy.depths) == 3000


@pytest.mark.parametrize(
    "pairs, reason",
    [
        ([("a", "b"), ("b", "c"), ("c", "a")], "has a cycle, in which each is a child of the next: 'a' -> 'b' -> 'c' -> 'a'"),
        ([("x", "a"), ("a", "b"), ("b", "a")], "'a' -> 'b' -> 'a'"),
        ([(str(i), str((i + 1) % 50)) for i in range(50)], "-> ... ->"),
        ([], "holds no .child, parent. pair"),
    ],
)
def test_a_hierarchy_that_is_none_is_refused(pairs, reason):
    with pytest.raises(ValueError, match=reason):
        Hierarchy.from_pairs(pairs)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "holds no pairs"),
        ("# only a comment\n", "holds no pairs"),
        ("a\tb\na b\n", r"line 2 is not child<TAB>parent: 'a b'"),
        ("a\tb\tc\n", "line 1 is not"),
        ("a\t\n", "line 1 is not"),
        ("a\ta\n", "line 1 makes 'a' its own parent"),
        ("a\tb\nb\ta\n", "has a cycle"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_line(text, reason, tmp_path):
    (tmp_path / "pairs.tsv").write_text(text)
    for source in (tmp_path, tmp_path / "pairs.tsv"):
        with pytest.raises(ValueError, match=reason):
            read_hierarchy(source)


def test_a_folder_of_files_is_one_hierarchy(tmp_path):
    (tmp_path / "a.tsv").write_text("cat\tmammal\n")
    (tmp_path / "b.tsv").write_text("mammal\tanimal\n")
    assert sorted(read_hierarchy(tmp_path).names) == ["animal", "cat", "mammal"]
    (tmp_path / "empty").mkdir()
    for source, reason in [(tmp_path / "empty", "holds no .*tsv file"), (tmp_path / "nowhere", "is no file and no directory")]:
        with pytest.raises(ValueError, match=reason):
            read_hierarchy(source)
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe\t\xff\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_hierarchy(tmp_path)


def test_wordnet_has_the_entities_that_hit_counts():
    if not (DEFAULT / "data.noun").is_file():
        pytest.skip("WordNet is not installed (apt-get install wordnet-base)")
    hierarchy = read_wordnet()
    assert len(hierarchy.names) == 74401 and len(hierarchy.edges) == 75850
    assert sum(map(len, hierarchy.ancestors)) - len(hierarchy.edges) == 587658
    number = hierarchy.names.index("cat")
    assert {"feline", "carnivore", "animal", "entity"} <= {hierarchy.names[i] for i in hierarchy.ancestors[number]}


def test_a_wordnet_file_in_small(tmp_path):
    (tmp_path / "data.noun").write_text(
        "  1 the licence\n00000001 03 n 01 entity 0 001 ~ 00000002 n 0000 | all\n"
        "00000002 03 n 02 living_thing 0 animate_thing 0 002 @ 00000001 n 0000 + 00000001 v 0101 | a thing\n"
        "00000003 18 n 01 Fido 0 001 @i 00000002 n 0000 | one dog\n"
    )
    hierarchy = read_wordnet(tmp_path)
    assert list(hierarchy.names) == ["entity", "living thing"] and hierarchy.edges == [(1, 0)]
    (tmp_path / "data.noun").write_text("00000002 03 n 01 word 0 002 @ 00000001\n")
    with pytest.raises(ValueError, match="line 1 is no synset"):
        read_wordnet(tmp_path)
    with pytest.raises(ValueError, match="wordnet-base"):
        read_wordnet(tmp_path / "nowhere")


# ---- what is trained and tested on ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["multi", "mixed"])
def test_no_pair_is_in_two_parts_and_the_shares_are_hits(task):
    hierarchy = tree(5, 3)
    parts = split(hierarchy, task, seed=3)
    direct, indirect = set(hierarchy.edges), set(hierarchy.indirect)
    train_, validation, test = map(set, (parts.train, parts.validation, parts.test))
    assert not train_ & validation and not train_ & test and not validation & test
    assert train_ <= direct
    five = round(0.05 * len(indirect))
    if task == "multi":
        assert train_ == direct and len(test) == len(validation) == five and test | validation <= indirect
    else:
        assert (
            len(train_) == len(direct) - 2 * round(0.05 * len(direct))
            and len(test & indirect) == five
            and len(test & direct) == round(0.05 * len(direct))
        )
    assert split(hierarchy, task, seed=3) == parts != split(hierarchy, task, seed=4)


def test_wrong_parents_are_wrong_and_hard_ones_are_siblings():
    hierarchy = tree()
    pairs = hierarchy.edges
    for kind in ("random", "hard"):
        wrong = negatives(hierarchy, pairs, kind, count=10, seed=1)
        for (child, _), row in zip(pairs, wrong, strict=True):
            assert child not in row and not hierarchy.ancestors[child] & set(row.tolist()) and len(set(row.tolist())) == 10
    for (child, parent), row in zip(pairs, wrong, strict=True):
        siblings = set(hierarchy.children[parent]) - {child}
        assert siblings <= set(row.tolist())
    assert np.array_equal(wrong, negatives(hierarchy, pairs, "hard", count=10, seed=1))


def test_a_batch_of_families_has_its_wrong_parents_in_itself():
    hierarchy = Hierarchy.from_pairs([*((tree().names[a], tree().names[b]) for a, b in tree().edges), ("r a a", "r b")])
    families, seen = Families(hierarchy, hierarchy.edges, 40, seed=3), []
    siblings = [{s for p in found for s in hierarchy.children[p]} - {i} for i, found in enumerate(hierarchy.parents)]
    for step in range(3):
        entities, place = families.batch(step, 2, 3)
        assert place.shape == (40, 7) and len(set(entities.tolist())) == len(entities) and set(place.ravel()) <= set(range(len(entities)))
        for child, parent, *wrong in entities[place].tolist():
            assert parent in hierarchy.parents[child] and len(set(wrong)) == 5
            assert not set(wrong) & (hierarchy.ancestors[child] | {child})
            there = siblings[child] & set(entities.tolist()) - hierarchy.ancestors[child]
            assert len(set(wrong[:2]) & there) == min(2, len(there))
            seen.append((child, parent))
    assert len(set(seen)) == len(seen) == 120 and set(seen) <= set(hierarchy.edges)  # an epoch: none twice
    again = Families(hierarchy, hierarchy.edges, 40, seed=3).batch(2, 2, 3)
    assert all((ours == theirs).all() for ours, theirs in zip(again, (entities, place), strict=True))
    following = families.batch(3, 2, 3)
    assert not np.array_equal(following[1], families.batch(0, 2, 3)[1])  # the next epoch has another order


def test_a_batch_that_is_too_small_for_its_wrong_parents_is_refused():
    hierarchy = tree()
    with pytest.raises(ValueError, match="batch: is 4, too small for 20 wrong parents a pair"):
        Families(hierarchy, hierarchy.edges, 4).batch(0, 10, 10)
    with pytest.raises(ValueError, match="batch: is 200, must be positive and at most the 120 pairs"):
        Families(hierarchy, hierarchy.edges, 200)
    with pytest.raises(ValueError, match="family: is 0, must be positive"):
        Families(hierarchy, hierarchy.edges, 40, family=0)


@pytest.mark.parametrize(("family", "together"), [(3, True), (1, False)])
def test_children_of_a_parent_come_together_up_to_the_family(family, together):
    hierarchy = tree()  # three children each
    parents = np.array(hierarchy.edges)[Families(hierarchy, hierarchy.edges, 40, family=family).order(0), 1]
    assert (np.count_nonzero(np.diff(parents)) + 1 == len(set(parents.tolist()))) == together


def test_small_hierarchies_are_refused_or_repeat():
    chain = Hierarchy.from_pairs([("c", "b"), ("b", "a")])
    with pytest.raises(ValueError, match="too few to hold 5 %"):
        split(chain)
    with pytest.raises(ValueError, match="all other entities are ancestors of 'c'"):
        negatives(chain, [(0, 1)], "random", count=2)
    assert negatives(chain, [(1, 2)], "random", count=3).tolist() == [[0, 0, 0]]
    for call, reason in [(lambda: split(chain, "all"), "task: is 'all'"), (lambda: negatives(chain, [], "easy"), "negatives: is 'easy'")]:
        with pytest.raises(ValueError, match=reason):
            call()


# ---- loss, score, rule ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", [Lorentz, PoincareBall])
def test_the_loss_is_hits_formula(space):
    m = space(0.3)
    torch.manual_seed(0)
    child, parent, wrong = m.expmap0(torch.randn(4, 3)), m.expmap0(torch.randn(4, 3)), m.expmap0(torch.randn(4, 2, 3))
    total = 0.0
    for i in range(4):
        for j in range(2):
            total += max(0.0, float(m.dist(child[i], parent[i]) - m.dist(child[i], wrong[i, j])) + ALPHA) / 8
        total += max(0.0, float(m.dist0(parent[i]) - m.dist0(child[i])) + BETA) / 4
    assert float(hierarchy_loss(m, child, parent, wrong)) == pytest.approx(total, rel=1e-5)


def test_the_rule_is_the_best_one_and_separates_what_can_be():
    generator = np.random.default_rng(0)
    labels = np.arange(300) < 60
    distance = np.where(labels, 1.0, 1.5) + generator.normal(0, 0.5, 300)
    difference = np.where(labels, -1.0, 1.0) + generator.normal(0, 0.2, 300)
    rule, value = best_rule(labels, distance, difference)
    assert value == f1_by(rule, labels, distance, difference) == pytest.approx(1.0) and rule.weight > 0
    for weight in (0.0, 1.0):  # by hand: no threshold of these lambdas is better than the rule
        scores = -(distance + weight * difference)
        assert max(f1(labels, scores >= s) for s in scores) <= value
    flat = np.ones(300)
    assert best_rule(labels, flat, flat)[1] == pytest.approx(2 * 60 / (60 + 300))  # equal scores are accepted or refused together


def test_features_are_of_the_pairs_and_their_wrong_parents():
    m = PoincareBall(1.0)
    points = m.expmap0(torch.randn(5, 2))
    labels, distance, difference = features(m, points, [(0, 1), (2, 3)], np.array([[4], [0]]))
    assert labels.tolist() == [True, True, False, False]
    for at, (a, b) in enumerate([(0, 1), (2, 3), (0, 4), (2, 0)]):
        assert distance[at] == pytest.approx(float(m.dist(points[a], points[b])), rel=1e-5)
        assert difference[at] == pytest.approx(float(m.dist0(points[b]) - m.dist0(points[a])), rel=1e-4, abs=1e-5)


# ---- training ---------------------------------------------------------------------------------------------------------------------
def start(directory: Path, layout: str | None = None) -> HbBertModel:
    model = HbBertModel.from_pretrained(directory, curvature=0.05, learnable_curvature=True, layout=layout)
    return rbe_torch.prepare_training(model) if layout else model


def names_of(directory: Path, hierarchy: Hierarchy) -> Names:
    return Names(transformers.AutoTokenizer.from_pretrained(directory), hierarchy.names)


@pytest.mark.parametrize(("layout", "shared"), [(None, False), ("rbe22_g8", False), (None, True)])
def test_training_lowers_the_loss_and_tells_parents_from_others(layout, shared, directory):
    hierarchy = tree()
    names, model = names_of(directory, hierarchy), start(directory, layout)
    parts = split(hierarchy)
    losses = train(model, names, hierarchy, parts.train, Options(steps=60, batch=16, lr=1e-2, alpha=1.0, shared=shared))
    assert np.mean(losses[-10:]) < LEARNT * np.mean(losses[:5]) and not model.training
    wrong = negatives(hierarchy, parts.test, "random")
    rule, found = best_rule(*features(model.manifold, encode_all(model, names), parts.test, wrong))
    assert found > 0.4  # accepting everything gives 0.18


@pytest.mark.parametrize("shared", [False, True])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(shared, directory, tmp_path):
    hierarchy = tree()
    names, parts, options = names_of(directory, hierarchy), split(hierarchy), Options(steps=8, batch=8, lr=1e-3, shared=shared)
    torch.manual_seed(1)
    whole = start(directory)
    expected = train(whole, names, hierarchy, parts.train, options, tmp_path / "whole.pt")
    torch.manual_seed(1)
    train(start(directory), names, hierarchy, parts.train, options, tmp_path / "cut.pt", stop_at=3)
    torch.manual_seed(7)  # a new process: another state of the generator
    resumed = start(directory)
    assert train(resumed, names, hierarchy, parts.train, options, tmp_path / "cut.pt") == expected
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="is of a run with other settings .*'steps': .8, 9."):
        train(start(directory), names, hierarchy, parts.train, Options(steps=9, batch=8, lr=1e-3), tmp_path / "cut.pt")


@pytest.mark.parametrize("layout", [None, "rbe22_g8"])
def test_products_in_bfloat16_give_the_same_training_but_for_rounding(layout, directory):
    hierarchy, losses = tree(), {}
    for half in (False, True):
        torch.manual_seed(1)
        model = start(directory, layout)
        options = Options(steps=4, batch=8, lr=1e-3, alpha=1.0, bfloat16=half)
        losses[half] = train(model, names_of(directory, hierarchy), hierarchy, hierarchy.edges, options)
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=ROUNDED) and losses[True] != losses[False]


def test_a_run_that_diverges_is_stopped(directory):
    hierarchy = tree()
    model = start(directory)
    model.embeddings.word_embeddings.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train(model, names_of(directory, hierarchy), hierarchy, hierarchy.edges, Options(steps=2))


def test_encoding_does_not_depend_on_the_batch(directory):
    hierarchy = tree(3, 3)
    names, model = names_of(directory, hierarchy), start(directory).eval()
    assert len(set(names.lengths.tolist())) > 1
    torch.testing.assert_close(encode_all(model, names, batch=7), encode_all(model, names, batch=1), rtol=0, atol=1e-5)


def test_names_that_the_tokenizer_cannot_read_are_refused(directory):
    with pytest.raises(ValueError, match=r"2 names hold characters .* \[UNK\]\): 'π', '1'"):
        names_of(directory, Hierarchy.from_pairs([("π", "a"), ("1", "a"), ("b", "a")]))


# ---- the command ------------------------------------------------------------------------------------------------------------------
def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main(["train-hbbert", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_trains_saves_and_what_it_saves_loads(capsys, directory, pairs, tmp_path):
    out = tmp_path / "out"
    fixed = ["--data", pairs, "--out", out, "--model", directory, "--steps", 20, "--batch", 8, "--lr", "1e-3", "--quiet"]
    status, text, err = run(capsys, *fixed, "--layout", "rbe8x2_g8", "--learn-curvature", "--json")
    assert status == 0, err
    facts = json.loads(text)
    assert facts["entities"] == 121 and facts["trained_on"] == 120 and facts["steps"] == 20 and 0 < facts["f1"]["hard"]["test_f1"] <= 1
    assert facts["last_loss"] < facts["first_loss"]
    model = HbBertModel.from_pretrained(out)
    assert any(isinstance(module, rbe_torch.RBELinear) for module in model.modules())
    assert (
        not (out / "unfinished").exists() and (out / "vocab.txt").is_file() and json.loads((out / "hierarchy.json").read_text()) == facts
    )
    assert run(capsys, *fixed)[0] == 1  # not empty
    status, _, err = run(capsys, "--data", pairs, "--out", tmp_path / "twice", "--model", out, "--layout", "rbe8_g8", "--quiet")
    assert status == 1 and "are in codes already" in err and not (tmp_path / "twice").exists()
    on = ["--data", pairs, "--out", tmp_path / "on", "--model", out, "--steps", 2, "--batch", 8, "--quiet", "--json"]
    status, text, err = run(capsys, *on)  # trained on, codes and curvature and all
    assert status == 0 and json.loads(text)["curvature"] == pytest.approx(facts["curvature"]), err
    status, text, err = run(capsys, *fixed, "--force", "--manifold", "poincare", "--mode", "output", "--curvature", 0, "--task", "mixed")
    assert status == 0 and "test F1" in text, err
    shared = ["--data", pairs, "--out", tmp_path / "shared", "--model", directory, "--steps", 4, "--quiet", "--shared", "--bfloat16"]
    status, text, err = run(capsys, *shared, "--json")
    assert status == 0 and json.loads(text)["steps"] == 4, err
    status, _, err = run(capsys, *shared, "--force", "--batch", 1000)
    assert status == 1 and "batch: is 1000, must be positive and at most the 120 pairs there are" in err


IN_CODES = ["--batch", 8, "--quiet", "--json", "--layout", "rbe8_g8", "--learn-curvature"]


@pytest.fixture(scope="module")
def whole(directory, tmp_path_factory) -> Path:
    """What a run of 6 steps that nothing interrupts leaves."""
    folder, hierarchy = tmp_path_factory.mktemp("whole"), tree()
    (folder / "pairs.tsv").write_text("".join(f"{hierarchy.names[a]}\t{hierarchy.names[b]}\n" for a, b in hierarchy.edges))
    given = ["--data", folder / "pairs.tsv", "--out", folder / "out", "--model", directory, "--steps", 6, *IN_CODES]
    assert main(["train-hbbert", *map(str, given)]) == 0
    return folder / "out"


@pytest.mark.parametrize("stage", ["dense", "compression", "codes", "saving"])
def test_a_command_that_was_killed_goes_on_to_the_same_end(stage, whole, capsys, directory, pairs, tmp_path, monkeypatch):
    """The kill is an exception that nothing catches, at a place of that stage; what is finished is not done again."""
    cut = tmp_path / "cut"
    unfinished = cut / "unfinished"

    def command(steps: int = 6) -> tuple[int, str, str]:
        return run(capsys, "--data", pairs, "--out", cut, "--model", directory, "--steps", steps, *IN_CODES)

    kill = {"dense": None, "compression": "compress", "codes": "prepare_training", "saving": "finish_training"}[stage]
    with monkeypatch.context() as patch:
        if kill is None:  # in step 2 of 3, with the state after step 1 written
            real, calls = training.hierarchy_loss, []
            patch.setattr(training, "hierarchy_loss", lambda *given: calls.append(0) or (real(*given) if len(calls) < 2 else sys.exit("killed")))
            patch.setattr(stages, "train", functools.partial(train, every=0.0))
        else:
            patch.setattr(rbe_torch, kill, lambda *_, **__: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            command()
    assert (unfinished / "dense.pt").is_file() and (unfinished / "compressed").is_dir() == (stage in ("codes", "saving"))
    status, _, err = command(7)
    assert status == 1 and "interrupted run with other settings (steps 6 there, 7 here)" in err
    if stage in ("codes", "saving"):
        monkeypatch.setattr(rbe_torch, "compress", lambda *_, **__: pytest.fail("compressed again"))
    status, text, err = command()
    assert status == 0, err
    assert {**json.loads(text), "out": ""} == {**json.loads((whole / "hierarchy.json").read_text()), "out": ""}
    there, here = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there) and not unfinished.exists()


@pytest.mark.parametrize(
    "more, reason",
    [(["--dense-steps", 2], "--dense-steps: is 2, needs --layout"), (["--layout", "rbe8_g8", "--dense-steps", 9], "must be at most --steps 6")],
)
def test_dense_steps_that_cannot_be_are_refused(more, reason, capsys, directory, pairs, tmp_path):
    status, _, err = run(capsys, "--data", pairs, "--out", tmp_path / "out", "--model", directory, "--steps", 6, "--quiet", *more)
    assert status == 1 and reason in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a\tb\nb\ta\n", "has a cycle"),
        ("", "holds no pairs"),
        ("a\tb\n", "too few to hold 5 %"),
        ("x y\n", "line 1 is not child<TAB>parent"),
    ],
)
def test_the_command_says_what_is_wrong_with_the_data(text, reason, capsys, directory, tmp_path):
    (tmp_path / "bad.tsv").write_text(text)
    status, out, err = run(capsys, "--data", tmp_path / "bad.tsv", "--out", tmp_path / "out", "--model", directory, "--quiet")
    assert status == 1 and not out and reason in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_command_says_which_names_it_cannot_read_and_which_model_is_missing(capsys, directory, pairs, tmp_path):
    pairs.write_text(pairs.read_text() + "12\tr\n")
    status, _, err = run(capsys, "--data", pairs, "--out", tmp_path / "out", "--model", directory, "--quiet")
    assert status == 1 and "1 names hold characters" in err and "'12'" in err
    status, _, err = run(capsys, "--data", pairs, "--out", tmp_path / "out", "--model", "nowhere", "--quiet")
    assert status == 1 and "MODEL: 'nowhere'" in err and "models are not downloaded" in err
