"""Hb-BERT on WordNet's nouns: what curvature buys, with a Euclidean control, and what codes cost.

HiT's protocol (He et al. 2024, "Language models as hierarchy encoders", arXiv 2401.11374).

    benchmarks/hbbert.py                reduced: the nouns below one word, a few steps, one training run a row; minutes on a CPU core
    benchmarks/hbbert.py --full         all 74,401 nouns, a run for each of HiT's four settings; for a GPU

Rows: four spaces, each dense, at 2 bits (rbe8x2_g8) and in rbe22_g64, trained with the same loss, pairs, wrong parents, steps and rates.
All are the Poincare ball, so that distances near the origin, and with them the loss's margins, are the same; d is the hidden size.

    euclidean   BERT's mean-pooled output, curvature 0
    hit         BERT's mean-pooled output read as a point, curvature -1/d: HiT
    ours        the same with four times the curvature: the best of 1, 4 and 8 times on validation pairs
    inner       hyperbolic inner layers, the curvature learned from -1/(8 d), which leaves the pretrained encoder nearly what it was

A row at 2 bits takes half of its steps dense, is compressed with the names as calibration, and takes the other half in codes; rbe22_g64,
which holds nothing of a trained weight, takes all of them in codes.
Rows that are finished are kept in OUT/hbbert-*.json and runs that were cut go on where they stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from harness import cpu_name, table  # noqa: E402
from torch import nn  # noqa: E402

import rbe_torch  # noqa: E402
from rbe_torch import models  # noqa: E402
from rbe_torch.hyperbolic import HbBertModel  # noqa: E402
from rbe_torch.hyperbolic.hierarchy import Hierarchy  # noqa: E402
from rbe_torch.hyperbolic.scoring import best_rule, f1_by, features  # noqa: E402
from rbe_torch.hyperbolic.tasks import NEGATIVES, TASKS, Split, negatives, split  # noqa: E402
from rbe_torch.hyperbolic.training import Names, Options, encode_all, train  # noqa: E402
from rbe_torch.hyperbolic.wordnet import DEFAULT, read_wordnet  # noqa: E402

SPACES: dict[str, dict[str, Any]] = {
    "euclidean": {"manifold": "poincare", "mode": "output", "curvature": 0.0},
    "hit": {"manifold": "poincare", "mode": "output"},
    "ours": {"manifold": "poincare", "mode": "output", "curvature": 4.0},  # 4 / d
    "inner": {"manifold": "poincare", "mode": "inner", "curvature": 0.125, "learnable_curvature": True},  # 1 / (8 d)
}
LAYOUTS = {"dense": None, "2 bits": "rbe8x2_g8", "rbe22_g64": "rbe22_g64"}
PUBLISHED = {"multi random": 0.871, "multi hard": 0.907, "mixed random": 0.856, "mixed hard": 0.862}  # HiT, all-MiniLM-L6-v2
SETTINGS = tuple(PUBLISHED)
CALIBRATION = (16, 64)  # batches, names a batch


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=DEFAULT, help="folder with data.noun; default that of Debian's wordnet-base")
    parser.add_argument("--model", default="minilm", help="a BERT directory; default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--below", default="animal", help="reduced: the nouns below this one; default animal")
    parser.add_argument("--steps", type=int, help="of a run; default 80, --full 2000")
    parser.add_argument("--batch", type=int, help="pairs a step; default 16, --full 256")
    parser.add_argument("--wrong", type=int, help="wrong parents a pair in training; default 4, --full 10")
    parser.add_argument("--lr", type=float, default=1e-4, help="of dense weights; default 1e-4 (3e-4 validates no better)")
    parser.add_argument("--code-lr", type=float, default=5e-4, help="of steps in codes, where far less is trained; default 5e-4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only rows whose name contains this, such as `ours` or `dense`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


class Bench:
    """Hierarchy, token ids and the pretrained encoder, of whose vocabulary only the rows that these names use are kept: no other row is
    ever read."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        whole = read_wordnet(options.wordnet)
        self.hierarchy: Hierarchy = whole if options.full else whole.below(find(whole, options.below))
        source = models.model_directory(options.model)
        self.names = Names(models.load_tokenizer(source), self.hierarchy.names)
        self.dense = models.load_dense(source)
        used = self.names.ids.unique()
        table_ = self.dense.embeddings.word_embeddings
        self.dense.embeddings.word_embeddings = nn.Embedding.from_pretrained(
            table_.weight.detach()[used].clone(), freeze=False, padding_idx=0
        )
        self.dense.config.vocab_size = len(used)
        self.names.ids = torch.searchsorted(used, self.names.ids)
        self.splits = {task: split(self.hierarchy, task, seed=options.seed) for task in TASKS}
        full = options.full
        self.settings = Options(
            steps=options.steps or (2000 if full else 80),
            batch=options.batch or (256 if full else 16),
            wrong=options.wrong or (10 if full else 4),
            lr=options.lr,
            seed=options.seed,
        )

    def model(self, space: str) -> HbBertModel:
        torch.manual_seed(self.options.seed)
        return HbBertModel.from_pretrained(copy.deepcopy(self.dense), **arguments_of(space, self.dense)).to(self.options.device)

    def run(self, space: str, layout: str | None, task: str, hard: float, checkpoint: Path) -> tuple[HbBertModel, list[float]]:
        """One training run. In codes: half of the steps dense, half in codes; layouts that cannot hold a trained weight take all of them
        in codes."""
        settings = replace(self.settings, hard=hard)
        pairs = self.splits[task].train
        model, losses = self.model(space), []
        dense_steps = settings.steps if layout is None else settings.steps // 2 if layout == LAYOUTS["2 bits"] else 0
        if dense_steps:
            losses += train(
                model, self.names, self.hierarchy, pairs, replace(settings, steps=dense_steps), checkpoint.with_suffix(".dense.pt")
            )
        if layout is not None:
            inputs = self.names.batches(*CALIBRATION, self.options.seed, self.options.device) if layout == LAYOUTS["2 bits"] else None
            model = to_codes(model, layout, inputs)
            rest = replace(settings, steps=settings.steps - dense_steps, seed=settings.seed + 1, lr=self.options.code_lr)
            losses += train(model, self.names, self.hierarchy, pairs, rest, checkpoint.with_suffix(".codes.pt"))
            rbe_torch.finish_training(model)
        return model, losses

    def points(self, model: HbBertModel) -> torch.Tensor:
        return encode_all(model, self.names)

    def f1(self, model: HbBertModel, points: torch.Tensor, parts: Split, kind: str) -> dict[str, float]:
        """lambda and threshold chosen on the validation pairs."""
        judged = [
            features(model.manifold, points, pairs, negatives(self.hierarchy, pairs, kind, seed=number))
            for number, pairs in enumerate((parts.validation, parts.test), 1)
        ]
        rule, validation = best_rule(*judged[0])
        return {"validation": validation, "test": f1_by(rule, *judged[1]), "lambda": rule.weight}

    def indirect(self, parts: Split) -> Split:
        """The indirect pairs of the parts that validate and test."""
        direct = set(self.hierarchy.edges)
        return Split(parts.train, *([pair for pair in pairs if pair not in direct] for pairs in (parts.validation, parts.test)))


def arguments_of(space: str, bert: nn.Module) -> dict[str, Any]:
    """What HbBertModel.from_pretrained takes for a row; SPACES has curvatures in units of 1 / hidden size."""
    given = dict(SPACES[space])
    if "curvature" in given:
        given["curvature"] /= bert.config.hidden_size
    return given


def find(hierarchy: Hierarchy, word: str) -> int:
    """The entity of that name with the most descendants. SystemExit: there is none."""
    named = [i for i, name in enumerate(hierarchy.names) if name == word]
    if not named:
        raise SystemExit(f"--below: WordNet has no noun {word!r}")
    return max(named, key=lambda i: sum(i in above for above in hierarchy.ancestors))


def curvature_of(row: Path) -> float:
    """c of a row that was written."""
    return json.loads(row.read_text())["row"]["curvature"]


def to_codes(model: nn.Module, layout: str, calibration: list[dict[str, torch.Tensor]] | None) -> nn.Module:
    """Compressed, in training form."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rbe22_g64 holds nothing of a trained weight: the row shows it
        rbe_torch.compress(model, layout, calibration=calibration, progress=False)
    return rbe_torch.prepare_training(model)


def measure(bench: Bench, space: str, codes: str) -> dict[str, Any]:
    """A row: F1 of the four settings. Reduced: one run, on the mixed-hop pairs with as many hard as random wrong parents, judged in all
    four."""
    options, layout = bench.options, LAYOUTS[codes]
    start, cpu, row, losses = time.perf_counter(), time.process_time(), {"space": space, "codes": codes}, []
    stem = options.out / f"hbbert-run-{space}-{codes.replace(' ', '')}"
    results: dict[str, dict[str, float]] = {}
    if options.full:
        for task in TASKS:
            for kind in NEGATIVES:
                model, more = bench.run(space, layout, task, float(kind == "hard"), Path(f"{stem}-{task}-{kind}"))
                results[f"{task} {kind}"] = bench.f1(model, bench.points(model), bench.splits[task], kind)
                losses.append(more)
    else:
        model, more = bench.run(space, layout, "mixed", 0.5, stem)
        losses.append(more)
        points = bench.points(model)
        for task, parts in (("multi", bench.indirect(bench.splits["mixed"])), ("mixed", bench.splits["mixed"])):
            for kind in NEGATIVES:
                results[f"{task} {kind}"] = bench.f1(model, points, parts, kind)
        torch.save(points.cpu(), f"{stem}.points.pt")
    row["curvature"] = float(torch.as_tensor(model.manifold.c).detach())
    row["f1"] = results
    row["loss"] = [[round(float(np.mean(run[:10])), 4), round(float(np.mean(run[-10:])), 4)] for run in losses]
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return row


def untrained(bench: Bench) -> dict[str, Any]:
    """The pretrained encoder as it is, its output read as HiT reads it."""
    model, results = bench.model("hit"), {}
    points = bench.points(model)
    for task in TASKS:
        parts = bench.splits[task]
        results |= {f"{task} {kind}": bench.f1(model, points, parts, kind) for kind in NEGATIVES}
    return {"space": "pretrained", "codes": "dense", "curvature": float(model.manifold.c), "f1": results, "loss": [], "seconds": 0.0}


def settings_of(bench: Bench, codes: str) -> dict[str, Any]:
    """What a row depends on; a row of other settings is measured again."""
    settings = {**asdict(bench.settings), "full": bench.options.full, "entities": len(bench.hierarchy.names), "model": bench.options.model}
    rate = settings.pop("rbe_rate")
    if codes == "dense":
        return settings
    return {**settings, "rbe_rate": rate, "code_lr": bench.options.code_lr, "calibration": list(CALIBRATION)}


def show(rows: list[dict[str, Any]]) -> str:
    lines = [{"space": "HiT, published (all nouns)", "weights": "dense", **{name: f"{value:.3f}" for name, value in PUBLISHED.items()}}]
    for row in rows:
        loss = row["loss"][-1] if row["loss"] else None
        lines.append(
            {
                "space": row["space"],
                "weights": row["codes"],
                **{name: f"{row['f1'][name]['test']:.3f}" for name in SETTINGS},
                "loss": f"{loss[0]:.2f} -> {loss[1]:.2f}" if loss else "",
                "c": f"{row['curvature']:.5f}",
            }
        )
    return table(lines, ("space", "weights", *SETTINGS, "loss", "c"))


def main() -> int:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 products; everything hyperbolic stays float32
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": options.device, "torch": torch.__version__}
    facts = {
        "machine": machine,
        "below": None if options.full else options.below,
        "entities": len(bench.hierarchy.names),
        "direct": len(bench.hierarchy.edges),
        "indirect": len(bench.hierarchy.indirect),
        "options": asdict(bench.settings),
        "test_pairs": {task: len(parts.test) for task, parts in bench.splits.items()},
    }
    print(json.dumps(facts), flush=True)
    rows = [] if options.only else [untrained(bench)]
    for codes in LAYOUTS:
        for space in SPACES:
            if options.only not in f"{space} {codes}":
                continue
            file = options.out / f"hbbert-{'full' if options.full else 'reduced'}-{space}-{codes.replace(' ', '')}.json"
            kept = json.loads(file.read_text()) if file.is_file() else None
            settings = settings_of(bench, codes)
            if kept is None or kept["settings"] != settings:
                kept = {"settings": settings, "machine": machine, "row": measure(bench, space, codes)}
                file.write_text(json.dumps(kept, indent=1) + "\n")
                for checkpoint in options.out.glob(f"hbbert-run-{space}-{codes.replace(' ', '')}*.pt"):
                    if not checkpoint.name.endswith(".points.pt"):
                        checkpoint.unlink()
            rows.append(kept["row"])
            print(show(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        raise SystemExit(f"--only {options.only!r} leaves no row")
    path = options.out / f"hbbert_{'full' if options.full else 'reduced'}.json"
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print("\n" + show(rows) + f"\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
