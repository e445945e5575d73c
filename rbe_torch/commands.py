"""The commands of `rbe`: each takes the parsed options, prints a table or JSON on stdout and progress on stderr, and raises on failure."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cli import UsageError

Row = Sequence[Any]


def run_compress(options: argparse.Namespace) -> None:
    if options.calibrate is not None:
        raise UsageError("--calibrate: this version compresses from the weights alone; leave it out")
    from .checkpoint import save_pretrained
    from .compress import compress
    from .models import copy_companions, directory_bytes, load_dense, model_directory

    source, target = model_directory(options.model), Path(options.out)
    _check_target(target, options.force, source)
    model = load_dense(source)
    report = compress(model, options.layout, options.include, options.exclude, seed=options.seed, progress=not options.quiet, basis=options.basis)
    save_pretrained(model, target)
    copy_companions(source, target)
    before, after = directory_bytes(source), directory_bytes(target)
    if options.json:
        _print_json({**report.to_dict(), "out": str(target), "file_bytes": after, "dense_file_bytes": before})
    else:
        print(report)
        print(f"{target}: {after / 1e6:.2f} MB, dense {before / 1e6:.2f} MB")


def run_inspect(options: argparse.Namespace) -> None:
    from .checkpoint import Checkpoint
    from .manifest import BASIS_PREFIX, VERSION

    checkpoint = Checkpoint(options.path)
    layers = []
    for name, entry in checkpoint.layers.items():
        if entry.same_as is not None:
            continue
        prefix = f"{name}." if name else ""
        names = [key for key in checkpoint.shapes if key.startswith(prefix) and key.removeprefix(prefix) in _WEIGHT_TENSORS]
        size = checkpoint.bytes_of(names)
        layers.append({"name": name, "out_features": entry.out_features, "in_features": entry.in_features, "layout": entry.layout,
                       "basis": entry.basis, "bytes": size, "bits_per_weight": 8 * size / (entry.out_features * entry.in_features)})
    tables = checkpoint.bytes_of([name for name in checkpoint.shapes if name.startswith(BASIS_PREFIX)])
    weights = sum(layer["out_features"] * layer["in_features"] for layer in layers)
    compressed = sum(layer["bytes"] for layer in layers) + tables
    total = checkpoint.bytes_of(list(checkpoint.shapes))
    others = sorted(((checkpoint.tensor_bytes(name), name) for name in checkpoint.other_names() if name in checkpoint.shapes), reverse=True)
    facts = {
        "file": str(checkpoint.file), "file_bytes": checkpoint.file.stat().st_size, "version": VERSION, "model_class": checkpoint.manifest.model_class,
        "id": checkpoint.manifest.id, "layers": layers, "weights": weights, "bits_per_weight": 8 * compressed / weights,
        "compressed_bytes": compressed, "basis_bytes": tables, "other_bytes": total - compressed,
        "largest_other": [{"name": name, "bytes": size} for size, name in others[:3]],
    }
    if options.json:
        _print_json(facts)
        return
    _print_table(("layer", "shape", "layout", "basis", "bytes", "bits/weight"),
                 [(row["name"], f"{row['out_features']}x{row['in_features']}", row["layout"], row["basis"], row["bytes"],
                   f"{row['bits_per_weight']:.3f}") for row in layers])
    print(f"{facts['file']}: {_mb(facts['file_bytes'])}, format version {VERSION}, {facts['model_class']}")
    print(f"{len(layers)} layers, {weights:,} weights: {_mb(compressed)}, {facts['bits_per_weight']:.3f} bits a weight (basis {_mb(tables)} of it)")
    print(f"everything else: {_mb(total - compressed)}" + (f", most of it {others[0][1]}, {_mb(others[0][0])}" if others else ""))


def run_verify(options: argparse.Namespace) -> None:
    from .checkpoint import Checkpoint
    from .progress import Progress

    checkpoint = Checkpoint(options.path)
    others = checkpoint.other_names()
    with Progress("verify", len(checkpoint.layers) + len(others), not options.quiet) as bar:
        for name in checkpoint.layers:
            checkpoint.layer(name)
            bar.step(1, name)
        for name in others:
            checkpoint.tensor(name)
            bar.step(1, name)
    facts = {"file": str(checkpoint.file), "ok": True, "layers": len(checkpoint.layers), "tensors": len(checkpoint.shapes), "id": checkpoint.manifest.id}
    if options.json:
        _print_json(facts)
    else:
        print(f"{checkpoint.file}: whole. {facts['layers']} compressed layers and {facts['tensors']} tensors, every hash and every value checked")


def run_eval(options: argparse.Namespace) -> None:
    from .evaluate import embed, pair_similarity, read_pairs, spearman
    from .models import base_model, directory_bytes, load_any, load_tokenizer, model_directory

    path = model_directory(options.path)
    dense = model_directory(options.dense) if options.dense is not None else None
    pairs = read_pairs(options.data)
    shown = not options.quiet
    tokenizer = load_tokenizer(path if (path / "tokenizer_config.json").is_file() or dense is None else dense)
    result = embed(base_model(load_any(path)), tokenizer, pairs.sentences, shown)
    rows: list[dict[str, Any]] = [{"model": str(path), "file_bytes": directory_bytes(path), "spearman": spearman(pair_similarity(result), pairs.scores)}]
    if dense is not None:
        reference = embed(base_model(load_any(dense)), tokenizer, pairs.sentences, shown, "encode sentences, dense")
        if reference.shape != result.shape:
            raise ValueError(f"--dense: {dense} has embeddings of {reference.shape[1]} numbers, {path} of {result.shape[1]}; is it the same model?")
        cosine = (result * reference).sum(1)
        rows[0] |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        rows.append({"model": str(dense), "file_bytes": directory_bytes(dense), "spearman": spearman(pair_similarity(reference), pairs.scores),
                     "cosine_mean": 1.0, "cosine_min": 1.0})
    if options.json:
        _print_json({"data": pairs.name, "pairs": len(pairs), "models": rows})
        return
    header = ("model", "MB", "Spearman") + (("cosine to dense, mean", "min") if dense is not None else ())
    _print_table(header, [(row["model"], f"{row['file_bytes'] / 1e6:.2f}", f"{row['spearman']:.4f}",
                           *(f"{row[key]:.4f}" for key in ("cosine_mean", "cosine_min") if key in row)) for row in rows])
    print(f"{len(pairs)} pairs of {pairs.name}")


def run_bench(options: argparse.Namespace) -> None:
    import torch
    from torch import nn

    from . import _ops
    from .linear import RBELinear
    from .progress import Progress
    from .timing import interleave

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    layouts = options.layout or ["rbe8x2_g8", "rbe22_g64"]
    shapes = options.shape or [(768, 768), (3072, 768)]
    rows = []
    with torch.inference_mode(), Progress("bench", len(shapes) * len(options.tokens), not options.quiet) as bar:
        for m, n in shapes:
            coded = {layout: RBELinear(n, m, layout=layout, dtype=dtype, seed=0) for layout in layouts}
            dense = {layout: nn.Linear(n, m, dtype=dtype) for layout in layouts}
            for layout in layouts:
                dense[layout].weight.copy_(coded[layout].weight)
                dense[layout].bias.copy_(coded[layout].bias)
            for tokens in options.tokens:
                x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).to(dtype)
                calls = {"dense": lambda x=x: dense[layouts[0]](x)} | {name: lambda x=x, layer=layer: layer(x) for name, layer in coded.items()}
                times = interleave(calls, options.seconds * len(calls))
                for layout in layouts:
                    exact = torch.nn.functional.linear(x.double(), coded[layout].weight.double(), coded[layout].bias.double())
                    error = float((coded[layout](x).double() - exact).norm() / exact.norm())
                    ours, torch_ = times[layout], times["dense"]
                    rows.append({"layout": layout, "out_features": m, "in_features": n, "tokens": tokens, "dtype": options.dtype,
                                 "dense_min_us": 1e6 * torch_.minimum, "dense_median_us": 1e6 * torch_.median, "min_us": 1e6 * ours.minimum,
                                 "median_us": 1e6 * ours.median, "speedup": torch_.minimum / ours.minimum, "relative_error": error, "runs": ours.runs})
                bar.step(1, f"{m}x{n}, {tokens} tokens")
    facts = {"isa": _ops.isa(), "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    if options.json:
        _print_json(facts)
        return
    _print_table(("layout", "shape", "tokens", "dense us, min", "median", "rbe us, min", "median", "dense/rbe", "rel. error"),
                 [(row["layout"], f"{row['out_features']}x{row['in_features']}", row["tokens"], f"{row['dense_min_us']:.1f}", f"{row['dense_median_us']:.1f}",
                   f"{row['min_us']:.1f}", f"{row['median_us']:.1f}", f"{row['speedup']:.2f}", f"{row['relative_error']:.1e}") for row in rows])
    print(f"{options.dtype}, {facts['threads']} thread{'s' if facts['threads'] > 1 else ''}, {facts['isa']}, torch {facts['torch']}; weights stay in the "
          "caches, dense and compressed in turn; dense/rbe compares the minima; error against a float64 product with the decoded weight")


def run_plan(options: argparse.Namespace) -> None:
    from .models import PACKAGED, empty_model, load_config, model_directory
    from .plan import LAYOUTS, plan

    path = Path(options.model)
    if not path.is_file():
        path = model_directory(options.model) if path.is_dir() or options.model in PACKAGED else path
    result = plan(empty_model(load_config(path)), tuple(options.layout or LAYOUTS), options.include, options.exclude)
    if options.json:
        _print_json({**asdict(result), "rest": result.rest})
        return
    rows = [("dense", f"{result.dense_linears / 1e6:.2f}", f"{result.dense_model / 1e6:.2f}", f"{8 * result.dense_linears / result.weights:.3f}", "", "")]
    rows += [(row.layout, f"{row.linears / 1e6:.2f}", f"{row.model / 1e6:.2f}", f"{row.bits_per_weight:.3f}", f"{result.dense_linears / row.linears:.1f}x",
              row.purpose) for row in result.rows]
    _print_table(("layout", "linears MB", "model MB", "bits/weight", "linears", "for"), rows, left=(0, 5))
    print(f"{result.converted} layers with {result.weights:,} weights would be converted; the rest, {_mb(result.rest)}, stays as it is")
    for name, reason in result.skipped:
        print(f"  left alone: {name}: {reason}")


def run_export(options: argparse.Namespace) -> None:
    if options.to == "pt2":
        raise UsageError("--to: pt2 is not available in this version; torch.export.export works on a loaded model (rbe_torch.load_pretrained)")
    from .checkpoint import load_pretrained
    from .models import copy_companions, directory_bytes, is_compressed
    from .replace import decompress

    source = Path(options.path)
    if not source.is_dir() or not is_compressed(source):
        raise ValueError(f"{source}: is no directory that `rbe compress` wrote")
    target = Path(options.out) if options.out is not None else source.with_name(source.name + "-dense")
    _check_target(target, options.force, source)
    model = decompress(load_pretrained(source))
    if hasattr(model, "config"):
        model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(target)
    copy_companions(source, target)
    print(f"{target}: {_mb(directory_bytes(target))}, dense")


def run_train_hbbert(options: argparse.Namespace) -> None:
    from .hyperbolic.command import run

    facts = run(options)
    if options.json:
        _print_json(facts)
        return
    _print_table(("wrong parents", "validation F1", "test F1"),
                 [(kind, f"{row['validation_f1']:.3f}", f"{row['test_f1']:.3f}") for kind, row in facts["f1"].items()])
    print(f"{facts['entities']} entities, trained on {facts['trained_on']} direct pairs for {facts['steps']} steps, tested on {facts['tested_on']} held-out pairs "
          f"with 10 wrong parents each; loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f}, curvature -{facts['curvature']:.4g}")
    print(f"{facts['out']}: model, tokenizer and the rule that accepts a pair (hierarchy.json)")


_WEIGHT_TENSORS = ("packed", "gain", "residual", "residual_scale", "residual_right", "residual_right_scale")


def _check_target(target: Path, force: bool, source: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file, must be a directory or not exist")
    if target.is_dir() and target.resolve() == source.resolve():
        raise UsageError(f"OUT: is the directory that is read, {target}; name another")
    if target.is_dir() and not force and any(os.scandir(target)):
        raise ValueError(f"{target}: is not empty; --force writes into it")


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _print_table(header: Row, rows: Sequence[Row], left: tuple[int, ...] = (0,)) -> None:
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    width = [max(len(line[c]) for line in lines) for c in range(len(header))]
    text = ["  ".join(cell.ljust(width[c]) if c in left else cell.rjust(width[c]) for c, cell in enumerate(line)).rstrip() for line in lines]
    print(text[0], "-" * max(map(len, text)), *text[1:], sep="\n")
