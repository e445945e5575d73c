"""The Hb-BERT benchmarks, in small. Risks: a script that does not run on another WordNet, model or folder, a finished row measured again,
JSON without the losses, means over the wrong seeds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("geoopt")
transformers = pytest.importorskip("transformers", minversion="5")

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SPACES = ("euclidean", "hit", "euclidean scaled", "ours", "euclidean 8", "ours 8", "inner")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a WordNet of 121 nouns, a tiny BERT that spells them, and an SST-2 of a few sentences."""
    folder = tmp_path_factory.mktemp("inputs")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=len(words), max_position_embeddings=64
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    transformers.BertTokenizerFast(str(folder / "bert" / "vocab.txt")).save_pretrained(folder / "bert")
    lines, level = ["00000001 03 n 01 r 0 000 | root"], [("r", 1)]
    for _ in range(4):
        level = [(f"{name}_{LETTERS[i]}", 10 * number + i + 1) for name, number in level for i in range(3)]
        lines += [f"{number:08d} 03 n 01 {name} 0 001 @ {number // 10:08d} n 0000 | a noun" for name, number in level]
    (folder / "wordnet").mkdir()
    (folder / "wordnet" / "data.noun").write_text("\n".join(lines) + "\n")
    (folder / "sst2").mkdir()
    for part in ("train", "dev"):
        rows = "".join(f"{i % 2}\t{'a good b' if i % 2 else 'c bad d'}\n" for i in range(40))
        (folder / "sst2" / f"{part}.tsv").write_text("label\tcontent\n" + rows)
    return folder


def script(name: str, folder: Path, out: Path, *more: object) -> subprocess.CompletedProcess:
    fixed = ["--wordnet", folder / "wordnet", "--model", folder / "bert", "--below", "r", "--out", out]
    fixed += ["--device", "cpu", "--steps", 4, "--batch", 4]
    command = [sys.executable, "-W", "ignore", BENCHMARKS / name, *fixed, *more]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)


def test_the_benchmark_runs_keeps_what_it_has_and_draws(inputs, tmp_path):
    done = script("hbbert.py", inputs, tmp_path, "--only", "ours 8", "--seeds", 1)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "hbbert_reduced.json").read_text())
    assert [row["codes"] for row in facts["rows"]] == ["dense", "2 bits", "rbe22_g64"] and facts["entities"] == 121
    for row in facts["rows"]:
        assert set(row["f1"]) == {"multi random", "multi hard", "mixed random", "mixed hard"}
        assert row["loss"] and row["cpu_seconds"] >= 0  # rounded
        assert 0 < row["depth_in_ball"]["mean"] <= row["depth_in_ball"]["max"] < 1 and (row["code_lr"] is None) == (row["codes"] == "dense")
    again = script("hbbert.py", inputs, tmp_path, "--only", "ours 8", "--seeds", 1)
    assert json.loads((tmp_path / "hbbert_reduced.json").read_text()) == facts, again.stderr
    assert script("hbbert.py", inputs, tmp_path, "--only", "dense", "--seeds", 2, "--bfloat16").returncode == 0
    means = json.loads((tmp_path / "hbbert_reduced.json").read_text())["summary"]
    assert [(entry["space"], entry["seeds"]) for entry in means] == [(space, [0, 1]) for space in SPACES]
    assert script("hbbert.py", inputs, tmp_path, "--seeds", 3, "--bfloat16", "--finished").returncode == 0
    assert json.loads((tmp_path / "hbbert_reduced.json").read_text())["summary"] == means
    drawn = script("hbbert_pictures.py", inputs, tmp_path, "--tree", "r a")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "hbbert_disk.png").stat().st_size > 10_000 and (tmp_path / "hbbert_norms.png").stat().st_size > 5_000


def test_the_full_benchmark_trains_for_each_setting(inputs, tmp_path):
    done = script("hbbert.py", inputs, tmp_path, "--only", "hit dense", "--full")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "hbbert_full.json").read_text())["rows"]
    assert len(rows) == 1 and len(rows[0]["loss"]) == 4


def test_a_full_run_that_was_killed_goes_on_to_the_same_end(inputs, tmp_path, monkeypatch):
    """Killed in the third of the four settings' runs: the first two are not trained again."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hbbert
    import hbbert_bench

    real, steps = hbbert_bench.train, []

    def run(out: str, *more: object) -> dict:
        fixed = ["--wordnet", inputs / "wordnet", "--model", inputs / "bert", "--out", tmp_path / out, "--device", "cpu", "--steps", 4]
        monkeypatch.setattr(sys, "argv", list(map(str, ["hbbert.py", *fixed, "--batch", 4, "--full", "--only", "ours 8 dense", *more])))
        assert hbbert.main() == 0
        return json.loads((tmp_path / out / "hbbert_full.json").read_text())["rows"][0]["f1"]

    def killed(*given: object, **keywords: object) -> list[float]:
        steps.append(0)
        if len(steps) < 3:
            return real(*given, **keywords)
        real(*given, **keywords, stop_at=2)
        sys.exit("killed")

    monkeypatch.setattr(hbbert_bench, "train", killed)
    with pytest.raises(SystemExit, match="killed"):
        run("cut")
    monkeypatch.setattr(hbbert_bench, "train", real)
    monkeypatch.setattr(hbbert_bench.Pace, "__call__", lambda pace, step, loss: steps.append(step))
    steps.clear()
    resumed = run("cut")
    assert steps == [3, 4, 1, 2, 3, 4]
    assert resumed == run("whole")


def test_the_time_of_a_run_is_said_after_its_first_steps(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hbbert_bench

    pace, clock = hbbert_bench.Pace(100), iter(range(100))
    monkeypatch.setattr(hbbert_bench.time, "perf_counter", lambda: 3.0 * next(clock))
    for step in range(1, 30):
        pace(step, 0.0)
    assert capsys.readouterr().out == "step 20 of 100: 3.000 s a step, 4.0 minutes to the end of this run\n"


def test_of_several_rates_in_codes_the_row_has_the_one_that_validates_best(inputs, tmp_path):
    done = script("hbbert.py", inputs, tmp_path, "--only", "hit rbe22", "--seeds", 1, "--code-lr", 1e-9, 1e-2)
    assert done.returncode == 0, done.stderr
    tried = {float(rate): float(value) for rate, value in re.findall(r"at --code-lr (\S+) validation F1 is (\S+)", done.stdout)}
    [row] = json.loads((tmp_path / "hbbert_reduced.json").read_text())["rows"]
    assert set(tried) == {1e-9, 1e-2} and row["code_lr"] == max(tried, key=tried.get)


def test_means_and_differences_are_of_the_same_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hbbert

    def row(space: str, codes: str, seed: int, value: float) -> dict:
        return {"space": space, "codes": codes, "seed": seed, "f1": {name: {"test": value} for name in hbbert.SETTINGS}}

    rows = [row("euclidean scaled", "dense", 0, 0.5), row("euclidean scaled", "dense", 1, 0.7), row("euclidean scaled", "dense", 2, 0.0)]
    rows += [row("ours", "dense", 0, 0.6), row("ours", "dense", 1, 0.9), row("ours", "2 bits", 1, 0.8)]
    control, ours, coded = hbbert.summary(rows)
    assert control["mean"]["mean"] == pytest.approx(0.4) and "against control" not in control
    assert ours["mean"] == pytest.approx({"mean": 0.75, "sd": 0.3 / 2**0.5})
    assert ours["against control"]["mean"] == pytest.approx(0.15) and ours["against control"]["standard_error"] == pytest.approx(0.05)
    assert ours["against control"]["seeds"] == [0, 1]
    assert coded["against dense"]["mean"] == pytest.approx(-0.1) and coded["against dense"]["standard_error"] is None


def test_the_accuracies_kept_are_of_all_stages(inputs, tmp_path):
    done = script("hbbert_kept.py", inputs, tmp_path, "--data", inputs, "--space", "inner", "--controls")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "hbbert_kept.json").read_text())["results"]
    for task in ("sst2", "hierarchy"):
        assert {"dense", "PTQ", "QAT", "QAT + fine-tuning"} <= set(results[task]["stages"])
    assert "claimed" in done.stdout
    done = script("hbbert_kept.py", inputs, tmp_path, "--data", inputs, "--space", "ours 8")
    assert done.returncode == 1 and "has a head of its own, which SST-2's classifier cannot use" in done.stderr
    done = script("hbbert_kept.py", inputs, tmp_path, "--data", inputs, "--space", "ours 8", "--task", "hierarchy")
    assert done.returncode == 0, done.stderr


def test_the_choices_are_validated_once_and_kept(inputs, tmp_path):
    shutil.copytree(inputs / "bert", tmp_path / "deeper")
    config = transformers.BertConfig.from_pretrained(inputs / "bert", num_hidden_layers=3)
    transformers.BertModel(config).save_pretrained(tmp_path / "deeper")
    done = script("hbbert_choice.py", inputs, tmp_path, "--model", tmp_path / "deeper")
    assert done.returncode == 0, done.stderr
    kept = (tmp_path / "hbbert_choice.json").read_text()
    rows = json.loads(kept)["rows"]
    assert {row["choice"]["dims"] for row in rows} == {0, 8} and all(0 < row["validation_f1"] <= 1 for row in rows)
    assert script("hbbert_choice.py", inputs, tmp_path, "--model", tmp_path / "deeper").returncode == 0
    assert (tmp_path / "hbbert_choice.json").read_text() == kept


def test_the_cheaper_run_starts_where_the_whole_encoder_does(inputs, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import hbbert
    import hbbert_bench
    import hbbert_choice

    options = hbbert.parser("").parse_args(["--wordnet", str(inputs / "wordnet"), "--model", str(inputs / "bert"), "--below", "r"])
    monkeypatch.setattr(hbbert_choice, "UPPER", 1)  # of one layer
    bench = hbbert_bench.Bench(options)
    upper = hbbert_choice.Upper(bench.dense, hbbert_choice.lower_outputs(bench)).eval()
    found = hbbert_choice.encode_all(upper, hbbert_choice.Entities(bench.names))
    torch.testing.assert_close(found, bench.means, rtol=0, atol=1e-5)


def test_a_word_that_wordnet_has_not_is_named(inputs, tmp_path):
    done = script("hbbert.py", inputs, tmp_path, "--below", "unicorn")
    assert done.returncode == 1 and "WordNet has no noun 'unicorn'" in done.stderr


def test_the_whole_protocol_in_small_goes_on_and_has_its_curve(inputs, tmp_path):
    given = ("--batch", 16, "--wrong", 2, "--every", 2, "--space", "ours 8")
    assert script("hbbert_whole.py", inputs, tmp_path / "cut", *given, "--stop-at", 3).returncode == 0
    for out in ("cut", "whole"):
        done = script("hbbert_whole.py", inputs, tmp_path / out, *given)
        assert done.returncode == 0, done.stderr
    cut, whole = (json.loads((tmp_path / out / "hbbert_whole_ours8.json").read_text()) for out in ("cut", "whole"))
    assert [entry["step"] for entry in whole["curve"]] == [2, 4] and whole["settings"]["shared"] and cut["f1"] == whole["f1"]
    assert set(whole["f1"]) == {"multi random", "multi hard", "mixed random", "mixed hard"}
    done = script("hbbert_errors.py", inputs, tmp_path / "whole", *given[:4], "--space", "ours 8")
    assert done.returncode == 0, done.stderr
    for kind in ("random", "hard"):
        facts = json.loads((tmp_path / "whole" / "hbbert_errors_ours8.json").read_text())
        rows = facts[kind]["rows"]
        assert 0 < facts["siblings_in_training"]["8"] <= 1
        right, wrong = ([row for row in rows if row["pairs"].startswith(name)] for name in ("right", "wrong"))
        pairs, found, false = sum(row["count"] for row in right), *(sum(row["count"] * row["accepted"] for row in part) for part in (right, wrong))
        assert pairs == whole["test_pairs"]["mixed"] and sum(row["count"] for row in wrong) == 10 * pairs
        assert 2 * found / (pairs + found + false) == pytest.approx(whole["f1"][f"mixed {kind}"]["test"])


def test_a_run_on_all_direct_pairs_is_judged_by_indirect_ones_alone(inputs, tmp_path):
    given = ("--batch", 16, "--wrong", 2, "--every", 2, "--space", "hit", "--task", "multi")
    done = script("hbbert_whole.py", inputs, tmp_path, *given)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "hbbert_whole_hit.json").read_text())
    assert set(row["f1"]) == {"multi random", "multi hard"} and row["trained_on"] == 120
    assert {"indirect random", "indirect hard"} < set(row["curve"][0]) and "direct hard" not in row["curve"][0]


def test_the_mean_of_two_runs_weights_is_judged_without_training_again(inputs, tmp_path):
    fixed = ("--batch", 16, "--wrong", 2, "--every", 2, "--space", "hit")
    assert script("hbbert_whole.py", inputs, tmp_path / "first", *fixed).returncode == 0
    given = (*fixed, "--start", tmp_path / "first" / "hbbert-whole-hit-0.pt", "--lr", 1e-2)
    judged = {}
    for share in (0, 1):
        done = script("hbbert_whole.py", inputs, tmp_path / "second", *given, "--start-share", share)
        assert done.returncode == 0, done.stderr
        judged[share] = torch.load(tmp_path / "second" / "hbbert-whole-hit-0.points.pt"), done.stdout.count('"step"')
    torch.testing.assert_close(judged[1][0], torch.load(tmp_path / "first" / "hbbert-whole-hit-0.points.pt"), rtol=0, atol=0)
    assert not torch.equal(judged[0][0], judged[1][0]) and (judged[0][1], judged[1][1]) == (2, 0)
    done = script("hbbert_whole.py", inputs, tmp_path / "third", *fixed, "--start-share", 0.5)
    assert done.returncode == 2 and "--start-share: is 0.5 without --start" in done.stderr
