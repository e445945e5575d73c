"""Accuracy per byte: rbe_torch against other ways to store weights in few bits, on all-MiniLM-L6-v2, everything counted.

    python benchmarks/quality.py --data DIR                       every row (an hour or more on one core)
    python benchmarks/quality.py --data DIR --only "x2_g8|GPTQ"   rows whose name contains this or that, in this order
    python benchmarks/quality.py --data DIR --samples 128 --out other            calibrated on fewer sentences
    python benchmarks/quality.py --data DIR --pairs FILE --out other             calibrated on the sentences of a file of pairs

A row that OUT/quality.json has already is kept, so that a table can be made in pieces.

DIR holds stsb/sts-train.csv, stsb/sts-dev.csv, sst2/train.tsv and sst2/dev.tsv. Calibration is 1,024 sentences drawn from the training
parts of both, the same for every method, and fine-tuning draws from the training parts too; scores are on the dev parts, which nothing was
chosen on:

    cosine      mean over the 3,000 sentences of STS-B dev to the dense model's own embeddings
    Spearman    of STS-B dev's similarities
    SST-2       accuracy on dev of a linear probe that was fitted to the dense embeddings of 2,000 training sentences

All linear layers are compressed (10.8 M weights); embeddings stay as they are for every method. Bits: everything that a layer stores over
its weights.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import harness  # noqa: E402
import rivals  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import rbe_torch  # noqa: E402
from rbe_torch import calibrate, evaluate, models, moments, replace, text, walk  # noqa: E402

SAMPLES = 1024
TUNE_SENTENCES = 16384
PROBE_SENTENCES = 2000
OURS = ("rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe8x3_g8", "rbe8x4_g8")


class Task:
    """Sentences, the dense model, its embeddings and the probe."""

    def __init__(self, data: Path, model: str, samples: int, pairs: Path | None) -> None:
        self.source = models.model_directory(model)
        self.tokenizer = models.load_tokenizer(self.source)
        stsb = [line.split("\t") for line in (data / "stsb/sts-train.csv").read_text(encoding="utf-8").splitlines()]
        sst2, self.dev = evaluate.read_sst2(data)
        train = [cells[column] for cells in stsb for column in (5, 6)] + sst2.texts[:20000]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        self.train = [train[i] for i in order]
        self.calibration = text.sentence_batches(self.tokenizer, self.train[:samples] if pairs is None else evaluate.read_pairs(pairs).sentences)
        self.pairs = evaluate.read_pairs(data)
        dense = models.load_dense(self.source)
        self.dense = evaluate.embed(dense, self.tokenizer, self.pairs.sentences)
        probed = evaluate.embed(dense, self.tokenizer, sst2.texts[-PROBE_SENTENCES:])
        self.probe = evaluate.fit_probe(probed, sst2.labels[-PROBE_SENTENCES:])

    def score(self, model: nn.Module) -> dict[str, float]:
        got = evaluate.embed(model, self.tokenizer, self.pairs.sentences)
        cosine = (got * self.dense).sum(1)
        return {
            "cosine": float(cosine.mean()),
            "cosine_p5": float(cosine.quantile(0.05)),
            "spearman": evaluate.spearman(evaluate.pair_similarity(got), self.pairs.scores),
            "sst2": evaluate.probe_accuracy(self.probe, evaluate.embed(model, self.tokenizer, self.dev.texts), self.dev.labels),
        }


# ---- methods: each returns (model, bits a weight, notes) ---------------------------------------------------------------------------
Result = tuple[nn.Module, float, dict[str, Any]]


def ours(task: Task, layout: str, **options: Any) -> Result:
    model = models.load_dense(task.source)
    report = rbe_torch.compress(model, layout, **options)
    return model, report.bits_per_weight, {"relative_error": report.relative_error, "tuning": report.tuning}


def tuned(task: Task, layout: str, minutes: float) -> Result:
    """The calibrated model is made from the 1,024 sentences that all methods get; fine-tuning sees more of the training parts."""
    from rbe_torch.tune import tune_model

    model = models.load_dense(task.source)
    report = rbe_torch.compress(model, layout, calibration=task.calibration)
    task.keep(f"{layout} calibrated", {"bits": report.bits_per_weight, **task.score(model), "seconds": report.seconds})
    calls = walk.calls_of(text.sentence_batches(task.tokenizer, task.train[:TUNE_SENTENCES]), torch.device("cpu"))
    tuning = tune_model(model, models.load_dense(task.source), calls, 60 * minutes)
    return model, report.bits_per_weight, {"tuning": tuning}


def set_weight(module: nn.Module, weight: Tensor) -> None:
    module.weight.data = weight.t() if replace.is_conv1d(module) else weight


def each_weight(task: Task, quantise: Callable[[Tensor], Tensor | tuple[Tensor, float]], bits: float = 0.0) -> Result:
    model = models.load_dense(task.source)
    for entry in replace.find_linears(model):
        if entry.convertible:
            made = quantise(replace.dense_weight(entry.module).float().contiguous())
            made, bits = made if isinstance(made, tuple) else (made, bits)
            set_weight(entry.module, made)
    return model, bits, {}


@torch.no_grad()
def with_moments(task: Task, bits: int, ours: bool) -> Result:
    """GPTQ behind its own compressed prefix. ours: with this library's moments (tokens of equal size, targets that undo the prefix's
    error, damping chosen
    on held-out sequences, bias correction); else as published: raw X^T X, damping 0.01."""
    model = models.load_dense(task.source)
    entries = {entry.name: entry for entry in replace.find_linears(model) if entry.convertible}
    for visit in walk.walk(model, walk.calls_of(task.calibration, torch.device("cpu")), list(entries)):
        for phase in visit.stretch.phases:
            n = replace.features(entries[visit.stretch.full(phase[0])].module)[0]
            if ours:
                fit, held = calibrate.gather(visit, phase[0], n, torch.device("cpu"))
            else:
                hessian = torch.zeros(n, n)
                for call in visit.calls:
                    for z in walk.inputs(visit.stretch.module, call, [phase[0]])[phase[0]]:
                        z = z[call.mask] if call.mask is not None and z.shape[:-1] == call.mask.shape else z.flatten(0, -2)
                        hessian.addmm_(z.t(), z)
                hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
                factor = torch.linalg.cholesky(hessian.double().flip(0, 1)).flip(0, 1).float()
            for layer in phase:
                module = entries[visit.stretch.full(layer)].module
                weight = replace.dense_weight(module)
                if not ours:
                    set_weight(module, rivals.gptq(weight, factor, bits))
                    continue
                tries = []
                for damping in calibrate.DAMPINGS:
                    problem = moments.problem_of(weight, fit, damping, True)
                    decoded = rivals.gptq(problem.target, problem.factor, bits)
                    tries.append((held.loss(weight, decoded, problem.shift_of(decoded)), damping))
                problem = moments.problem_of(weight, fit.plus(held), min(tries)[1], True)
                decoded = rivals.gptq(problem.target, problem.factor, bits)
                set_weight(module, decoded)
                shift = problem.shift_of(decoded)
                if held.loss(weight, decoded, shift) < held.loss(weight, decoded, None):
                    module.bias.data += shift
    return model, rivals.integer_bits(bits), {}


def dynamic_int8(task: Task) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this will move to another package
        model = torch.ao.quantization.quantize_dynamic(models.load_dense(task.source), {nn.Linear}, dtype=torch.qint8)
    return model, 8.0, {"note": "activations are int8 too"}


def methods(task: Task, minutes: float) -> dict[str, Callable[[], Result]]:
    rows: dict[str, Callable[[], Result]] = {"dense": lambda: (models.load_dense(task.source), 32.0, {})}
    for bits in (2, 3, 4):
        rows[f"round int{bits} g64"] = lambda bits=bits: each_weight(task, lambda w: rivals.rounded(w, bits), rivals.integer_bits(bits))
        rows[f"HQQ int{bits} g64"] = lambda bits=bits: each_weight(task, lambda w: rivals.hqq(w, bits))
        rows[f"GPTQ int{bits} g64"] = lambda bits=bits: with_moments(task, bits, False)
        rows[f"GPTQ int{bits} g64, our moments"] = lambda bits=bits: with_moments(task, bits, True)
    rows["NF4 g64"] = lambda: each_weight(task, rivals.nf4, 4 + 16 / 64)
    for bits in (2, 4):
        rows[f"quanto int{bits} g128"] = lambda bits=bits: each_weight(task, lambda w: rivals.quanto(w, bits))
    rows["torch dynamic int8"] = lambda: dynamic_int8(task)
    for layout in OURS:
        rows[f"{layout} data-free"] = lambda layout=layout: ours(task, layout)
    for layout in OURS:
        rows[f"{layout} calibrated"] = lambda layout=layout: ours(task, layout, calibration=task.calibration)
    for layout in OURS:
        rows[f"{layout} tuned"] = lambda layout=layout: tuned(task, layout, minutes)
    return rows


# ---- running -----------------------------------------------------------------------------------------------------------------------
def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with stsb/ and sst2/")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"sentences to calibrate on, default {SAMPLES}")
    parser.add_argument("--pairs", type=Path, help="calibrate on the sentences of this file of pairs instead")
    parser.add_argument("--tune", type=float, default=10.0, help="minutes of fine-tuning for each layout, default 10")
    parser.add_argument("--again", action="store_true", help="measure rows that the JSON has already")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "quality.json"
    facts = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    machine = harness.Machine(harness.cpu_name(), rbe_torch._ops.isa(), torch.get_num_threads(), torch.__version__)
    task = Task(arguments.data, arguments.model, arguments.samples, arguments.pairs)

    def keep(name: str, row: dict[str, Any]) -> None:
        facts["rows"][name] = row
        facts.update(machine=asdict(machine), sentences=len(task.pairs.sentences), samples=arguments.samples)
        file.write_text(json.dumps(facts, indent=1) + "\n")
        print(f"{name}: {row}", flush=True)

    task.keep = keep
    rows = methods(task, arguments.tune)
    for name in [name for pattern in arguments.only.split("|") for name in rows if pattern in name]:
        if not arguments.again and "bits" in facts["rows"].get(name, {}):
            continue
        start = time.monotonic()
        try:
            model, bits, notes = rows[name]()
        except (ImportError, RuntimeError, NotImplementedError) as error:
            keep(name, {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"})
            continue
        seconds = time.monotonic() - start
        keep(name, {"bits": bits, **task.score(model), "seconds": seconds, **notes})
    print(table(facts))
    draw(facts, arguments.out / "quality.png")
    return 0


def table(facts: dict[str, Any]) -> str:
    rows = sorted(facts["rows"].items(), key=lambda item: (-item[1].get("bits", -1), item[0]))
    lines = [
        {
            "method": name,
            "bits": f"{row['bits']:.2f}",
            "cosine": f"{row['cosine']:.4f}",
            "5 % worst": f"{row['cosine_p5']:.4f}",
            "Spearman": f"{row['spearman']:.4f}",
            "SST-2": f"{row['sst2']:.4f}",
            "seconds": f"{row['seconds']:.0f}",
        }
        if "failed" not in row
        else {"method": name, "bits": row["failed"]}
        for name, row in rows
    ]
    return harness.table(lines, ["method", "bits", "cosine", "5 % worst", "Spearman", "SST-2", "seconds"])


def draw(facts: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("quality: no picture, matplotlib is missing", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, row in facts["rows"].items():
        if "failed" in row or name == "dense":
            continue
        kind = " ".join(word for word in name.split() if not word.startswith(("int", "g64", "g128", "rbe")))
        kind = (
            f"rbe_torch, {kind}" if name.startswith("rbe8") else f"rbe16s, {kind}" if name.startswith("rbe16s") else kind.replace(" ,", ",")
        )
        kinds.setdefault(kind, []).append((row["bits"], row["cosine"]))
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for kind, points in kinds.items():
        points.sort()
        own = kind.startswith("rbe")
        axes.plot(
            *zip(*points, strict=True), marker="o" if own else "x", linewidth=2 if own else 1, linestyle="-" if own else "--", label=kind
        )
    axes.set(
        xlabel="bits a weight, everything counted",
        ylabel="mean cosine to the dense embeddings, STS-B dev",
        xlim=(0.8, 5),
        ylim=(0, 1.01),
        title="all-MiniLM-L6-v2, every linear layer compressed",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
