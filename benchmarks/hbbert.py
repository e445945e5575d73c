"""Hb-BERT on WordNet's nouns: what curvature buys, with a Euclidean control, and what codes cost.

HiT's protocol (He et al. 2024, "Language models as hierarchy encoders", arXiv 2401.11374).

    benchmarks/hbbert.py           reduced: the nouns below one word, a few steps, one training run a row and seed; minutes on a CPU core
    benchmarks/hbbert.py --full    all 74,401 nouns, a run for each of HiT's four settings; for a GPU

Rows: spaces, each dense, at 2 bits (rbe8x2_g8) and in rbe22_g64, trained with the same loss, pairs, wrong parents, steps and rates
(hbbert_bench.py has the definitions, hbbert_head.py the learned scale and projection).

    euclidean, hit            BERT's mean-pooled output in 384 dimensions as it is, with curvature 0 and with HiT's -1/384
    euclidean scaled, ours    the same with a learned scale; ours learns its curvature too
    euclidean 8, ours 8       a learned projection to 8 dimensions, where room is scarce; ours learns its curvature too
    inner                     hyperbolic inner layers, the curvature learned from -1/(8 d), which leaves the encoder nearly what it was

A row at 2 bits takes half of its steps dense, is compressed with the names as calibration, and takes the other half in codes; rbe22_g64,
which holds nothing of a trained weight, takes all of them in codes. A seed also draws the split and the pairs, the same for every row.
Rows that are finished are kept in OUT/hbbert-*.json and runs that were cut go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from harness import cpu_name, table  # noqa: E402
from hbbert_bench import CALIBRATION, LAYOUTS, SPACES, Bench  # noqa: E402

from rbe_torch.hyperbolic.tasks import NEGATIVES, TASKS  # noqa: E402
from rbe_torch.hyperbolic.wordnet import DEFAULT  # noqa: E402

PUBLISHED = {"multi random": 0.871, "multi hard": 0.907, "mixed random": 0.856, "mixed hard": 0.862}  # HiT, all-MiniLM-L6-v2
SETTINGS = tuple(PUBLISHED)


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=DEFAULT, help="folder with data.noun; default that of Debian's wordnet-base")
    parser.add_argument("--model", default="minilm", help="a BERT directory; default the packaged all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--below", default="animal", help="reduced: the nouns below this one; default animal")
    parser.add_argument("--steps", type=int, help="of a run; default 120, --full 2000")
    parser.add_argument("--batch", type=int, help="pairs a step; default 16, --full 256")
    parser.add_argument("--wrong", type=int, help="wrong parents a pair in training; default 4, --full 10")
    parser.add_argument("--lr", type=float, default=1e-4, help="of dense weights; default 1e-4")
    parser.add_argument(
        "--code-lr", type=float, nargs="+", default=[5e-4],
        help="of steps in codes, where far less is trained; default 5e-4. Several: a row takes the one that validates best",
    )  # fmt: skip
    parser.add_argument("--bfloat16", action="store_true", help="the encoder's products in that type: half the time on a CPU with AMX")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def file_of(options: argparse.Namespace, space: str, codes: str, seed: int) -> Path:
    """Where a finished row is kept."""
    return options.out / f"hbbert-{'full' if options.full else 'reduced'}-{space.replace(' ', '')}-{codes.replace(' ', '')}-{seed}.json"


def points_of(options: argparse.Namespace, space: str, codes: str, seed: int) -> Path:
    """Where the points of a reduced row are kept."""
    return options.out / f"hbbert-run-{space.replace(' ', '')}-{codes.replace(' ', '')}-{seed}.points.pt"


def measure(bench: Bench, space: str, codes: str) -> dict[str, Any]:
    """A row: F1 of the four settings. Reduced: one run, on the mixed-hop pairs with as many hard as random wrong parents, judged in all
    four."""
    options, layout = bench.options, LAYOUTS[codes]
    start, cpu = time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"space": space, "codes": codes, "seed": options.seed}
    stem = str(points_of(options, space, codes, options.seed)).removesuffix(".points.pt")
    results: dict[str, dict[str, float]] = {}
    losses = []
    if options.full:
        for task in TASKS:
            for kind in NEGATIVES:
                model, more, rate = bench.run(space, layout, task, float(kind == "hard"), Path(f"{stem}-{task}-{kind}"))
                points = bench.points(model)
                results[f"{task} {kind}"] = bench.f1(model, points, bench.splits[task], kind)
                losses.append(more)
    else:
        model, more, rate = bench.run(space, layout, "mixed", 0.5, Path(stem))
        losses.append(more)
        points = bench.points(model)
        results = bench.f1_of_both_tasks(model, points)
        torch.save(points.cpu(), f"{stem}.points.pt")
    c = float(torch.as_tensor(model.manifold.c).detach())
    depth = c**0.5 * points.norm(dim=1)
    scale = float(model.log_scale.exp().detach()) if hasattr(model, "log_scale") else None
    row |= {"curvature": c, "scale": scale, "depth_in_ball": {"mean": float(depth.mean()), "max": float(depth.max())}}
    row |= {"code_lr": rate, "f1": results}
    row["loss"] = [[round(float(np.mean(run[:10])), 4), round(float(np.mean(run[-10:])), 4)] for run in losses]
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return row


def untrained(bench: Bench) -> dict[str, Any]:
    """The pretrained encoder as it is, its output read as HiT reads it."""
    model = bench.model("hit")
    results, points = {}, bench.points(model)
    for task in TASKS:
        results |= {f"{task} {kind}": bench.f1(model, points, bench.splits[task], kind) for kind in NEGATIVES}
    facts = {"space": "pretrained", "codes": "dense", "seed": bench.options.seed, "curvature": float(model.manifold.c)}
    return {**facts, "f1": results, "loss": []}


def settings_of(bench: Bench, space: str, codes: str) -> dict[str, Any]:
    """What a row depends on; a row of other settings is measured again."""
    settings = {**asdict(bench.settings), "full": bench.options.full, "entities": len(bench.hierarchy.names), "model": bench.options.model}
    settings |= {"space": asdict(SPACES[space])}
    rate = settings.pop("rbe_rate")
    if codes == "dense":
        return settings
    return {**settings, "rbe_rate": rate, "code_lr": bench.options.code_lr, "calibration": list(CALIBRATION)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every space and layout: mean and standard deviation over the seeds, of each setting and of their mean; and the difference of that
    mean from the row's flat control, and from the same space's dense row, of the same seeds, with its standard error."""
    scores: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        scores.setdefault((row["space"], row["codes"]), {})[row["seed"]] = [row["f1"][name]["test"] for name in SETTINGS]
    found = []
    for (space, codes), seeds in scores.items():
        values = np.array(list(seeds.values()))
        means = {**{name: values[:, i] for i, name in enumerate(SETTINGS)}, "mean": values.mean(1)}
        entry: dict[str, Any] = {"space": space, "codes": codes, "seeds": sorted(seeds)}
        entry |= {name: {"mean": float(each.mean()), "sd": _deviation(each)} for name, each in means.items()}
        for title, other in (("against control", (SPACES[space].control or space, codes)), ("against dense", (space, "dense"))):
            both = sorted(set(seeds) & set(scores.get(other, {})))
            if other != (space, codes) and both:
                apart = np.array([np.mean(seeds[seed]) - np.mean(scores[other][seed]) for seed in both])
                error = None if len(apart) < 2 else _deviation(apart) / len(apart) ** 0.5
                entry[title] = {"mean": float(apart.mean()), "standard_error": error, "seeds": both}
        found.append(entry)
    return found


def _deviation(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def show(entries: list[dict[str, Any]]) -> str:
    def text(mean: float, error: float | None, sign: str = "") -> str:
        return f"{mean:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")

    lines = [{"space": "HiT, published (all nouns)", "weights": "dense", **{name: f"{value:.3f}" for name, value in PUBLISHED.items()}}]
    for entry in entries:
        line = {"space": entry["space"], "weights": entry["codes"], "seeds": len(entry["seeds"])}
        line |= {name: text(entry[name]["mean"], entry[name]["sd"]) for name in (*SETTINGS, "mean")}
        for title in ("against control", "against dense"):
            line[title] = text(entry[title]["mean"], entry[title]["standard_error"], "+") if title in entry else ""
        lines.append(line)
    return table(lines, ("space", "weights", "seeds", *SETTINGS, "mean", "against control", "against dense"))


def main() -> int:
    given = parser(__doc__)
    given.add_argument("--seeds", type=int, help="so many, from --seed on; default 3, --full 1")
    given.add_argument("--only", nargs="+", default=[""], help="only rows whose name contains one of these, such as `ours` or `8 dense`")
    given.add_argument("--finished", action="store_true", help="measure nothing: the table and JSON of the rows that OUT holds")
    options = given.parse_args()
    torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 products; everything hyperbolic stays float32
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = [(space, codes) for codes in LAYOUTS for space in SPACES if any(part in f"{space} {codes}" for part in options.only)]
    if not wanted:
        raise SystemExit(f"--only {options.only!r} leaves no row")
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": options.device, "torch": torch.__version__}
    rows, facts = [], {}
    seeds = range(options.seed, options.seed + (options.seeds or (1 if options.full else 3)))
    missing = sum(not file_of(options, *row, seed).is_file() for seed in seeds for row in wanted)
    print(f"{0 if options.finished else missing} rows to measure, of {len(SETTINGS) if options.full else 1} training runs each", flush=True)
    for seed in seeds:
        bench = Bench(argparse.Namespace(**{**vars(options), "seed": seed}))
        if not facts:
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
            rows += [untrained(bench)] if options.only == [""] and not options.finished else []
        for space, codes in wanted:
            file = file_of(options, space, codes, seed)
            kept = json.loads(file.read_text()) if file.is_file() else None
            settings = settings_of(bench, space, codes)
            if options.finished and (kept is None or kept["settings"] != settings):
                continue
            if kept is None or kept["settings"] != settings:
                kept = {"settings": settings, "machine": machine, "row": measure(bench, space, codes)}
                file.write_text(json.dumps(kept, indent=1) + "\n")
                for checkpoint in options.out.glob(f"hbbert-run-{space.replace(' ', '')}-{codes.replace(' ', '')}-{seed}*.pt"):
                    if not checkpoint.name.endswith(".points.pt"):
                        checkpoint.unlink()
            rows.append(kept["row"])
            print(f"seed {seed}: " + show(summary(rows[-1:])).splitlines()[-1], flush=True)
    path = options.out / f"hbbert_{'full' if options.full else 'reduced'}.json"
    path.write_text(json.dumps({**facts, "summary": summary(rows), "rows": rows}, indent=1) + "\n")
    print("\n" + show(summary(rows)) + f"\n\nwritten: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
