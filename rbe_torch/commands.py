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
    if options.tune is not None and options.calibrate is None:
        raise UsageError("--tune: needs --calibrate TEXT, the text to fit the model on")
    _check_budget(options)
    if options.report is not None and Path(options.report).suffix not in (".html", ".json"):
        raise UsageError(f"--report: {options.report} must end in .html or .json")
    if options.stream:
        _stream(options)
        return
    from .checkpoint import save_pretrained
    from .compress import compress
    from .models import copy_companions, directory_bytes, load_dense, model_directory

    source, target = model_directory(options.model), Path(options.out)
    _check_target(target, options.force, source)
    model = load_dense(source)
    report = compress(model, options.layout, options.include, options.exclude, _calibration(options, model, source), options.bits, options.max_megabytes,
                      seed=options.seed, progress=not options.quiet, basis=options.basis, tune=options.tune)
    save_pretrained(model, target)
    if options.report is not None:
        (report.to_html if options.report.endswith(".html") else report.to_json)(options.report)
    copy_companions(source, target)
    before, after = directory_bytes(source), directory_bytes(target)
    if options.json:
        _print_json({**report.to_dict(), "out": str(target), "file_bytes": after, "dense_file_bytes": before})
    else:
        print(report)
        print(f"{target}: {after / 1e6:.2f} MB, dense {before / 1e6:.2f} MB")


def _stream(options: argparse.Namespace) -> None:
    given = [name for name in ("tune", "bits", "max_megabytes", "report") if getattr(options, name) is not None]
    if given or options.basis != "model":
        raise UsageError(f"--stream: compresses in one layout with one basis, without fine-tuning; leave out --{(given or ['basis'])[0].replace('_', '-')}")
    from .models import copy_companions, directory_bytes, model_directory
    from .models import empty_model, load_config
    from .stream import PARTS, compress_checkpoint

    source, target = model_directory(options.model), Path(options.out)
    if not (target / PARTS).is_dir() and int(os.environ.get("RANK", "0")) == 0:
        _check_target(target, options.force, source)
    batches = None if options.calibrate is None else _calibration(options, empty_model(load_config(source)), source)
    facts = compress_checkpoint(source, target, options.layout, options.include, options.exclude, batches, options.seed, not options.quiet)
    if int(os.environ.get("RANK", "0")) > 0:
        return
    copy_companions(source, target)
    if options.json:
        _print_json({**facts, "out": str(target), "dense_file_bytes": directory_bytes(source)})
        return
    print(f"{facts['layers']} layers, {facts['weights']:,} weights, {facts['bits_per_weight']:.3f} bits a weight; {facts['encoded']} encoded now, "
          f"{facts['finished_before']} finished before")
    print(f"{target}: {_mb(directory_bytes(target))}, dense {_mb(directory_bytes(source))}")


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
    from .models import load_any, load_tokenizer, model_directory
    from .text import is_causal

    if options.layers and options.dense is None:
        raise UsageError("--layers: needs --dense MODEL, the model to compare with")
    path = model_directory(options.path)
    dense = model_directory(options.dense) if options.dense is not None else None
    tokenizer = load_tokenizer(path if (path / "tokenizer_config.json").is_file() or dense is None else dense)
    models = [(directory, load_any(directory)) for directory in (path, dense) if directory is not None]
    score = _score_text if is_causal(models[0][1]) else _score_pairs
    facts, batches = score(models, tokenizer, options)
    if options.layers:
        from .evaluate import layer_errors

        facts["layers"] = layer_errors(models[0][1], models[1][1], batches)
        if not options.json:
            _print_table(("layer", "cosine", "rel. error"), [(row["name"], f"{row['cosine']:.4f}", f"{row['relative_error']:.4f}") for row in facts["layers"]])
    if options.json:
        _print_json(facts)


def _score_pairs(models: list[tuple[Path, Any]], tokenizer: Any, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Spearman and cosine of sentence encoders: facts, and batches for layer_errors. The first model is the one in question, the second the dense one."""
    from .evaluate import embed, pair_similarity, read_pairs, spearman
    from .models import base_model, directory_bytes
    from .text import sentence_batches

    pairs = read_pairs(options.data)
    rows: list[dict[str, Any]] = []
    embeddings = []
    for directory, model in models:
        embeddings.append(embed(base_model(model), tokenizer, pairs.sentences, not options.quiet, "encode sentences" + (", dense" if rows else "")))
        rows.append({"model": str(directory), "file_bytes": directory_bytes(directory), "spearman": spearman(pair_similarity(embeddings[-1]), pairs.scores)})
    if len(rows) > 1:
        if embeddings[0].shape != embeddings[1].shape:
            raise ValueError(f"--dense: {options.dense} has embeddings of {embeddings[1].shape[1]} numbers, {options.path} of {embeddings[0].shape[1]}; "
                             "is it the same model?")
        cosine = (embeddings[0] * embeddings[1]).sum(1)
        rows[0] |= {"cosine_mean": float(cosine.mean()), "cosine_min": float(cosine.min())}
        rows[1] |= {"cosine_mean": 1.0, "cosine_min": 1.0}
    probed = _probe_classes(models, tokenizer, options, rows)
    if not options.json:
        columns = [("spearman", "Spearman"), ("cosine_mean", "cosine to dense, mean"), ("cosine_min", "min"), ("sst2", "SST-2")]
        columns = [(key, title) for key, title in columns if key in rows[0]]
        _print_table(("model", "MB", *(title for _, title in columns)),
                     [(row["model"], f"{row['file_bytes'] / 1e6:.2f}", *(f"{row[key]:.4f}" for key, _ in columns)) for row in rows])
        print(f"{len(pairs)} pairs of {pairs.name}" + probed)
    return {"data": pairs.name, "pairs": len(pairs), "models": rows}, sentence_batches(tokenizer, pairs.sentences[:256])


def _probe_classes(models: list[tuple[Path, Any]], tokenizer: Any, options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Adds `sst2` to the rows where --data has SST-2: accuracy on dev of a linear probe fitted to the last model's embeddings of training sentences."""
    from .evaluate import embed, fit_probe, probe_accuracy, read_sst2
    from .models import base_model

    parts = read_sst2(options.data)
    if parts is None:
        return ""
    train, dev = parts
    texts, labels = train.texts[-_PROBE_SENTENCES:], train.labels[-_PROBE_SENTENCES:]
    encoders = [base_model(model) for _, model in models]
    probe = fit_probe(embed(encoders[-1], tokenizer, texts, not options.quiet, "encode SST-2, train"), labels)
    for row, encoder in zip(rows, encoders, strict=True):
        row["sst2"] = probe_accuracy(probe, embed(encoder, tokenizer, dev.texts, not options.quiet, "encode SST-2, dev"), dev.labels)
    return f"; SST-2: accuracy on {len(dev.texts)} dev sentences of a linear probe fitted to {'dense' if len(models) > 1 else 'its'} embeddings of {len(texts)}"


def _score_text(models: list[tuple[Path, Any]], tokenizer: Any, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Perplexity of language models on a text file."""
    from .evaluate import perplexity
    from .models import directory_bytes
    from .text import context_of, read_lines, text_windows

    if options.data is None:
        raise UsageError("--data: a language model is scored on text; name a text file")
    windows = text_windows(tokenizer, "\n".join(read_lines(options.data)), context_of(models[0][1]))
    rows = [{"model": str(directory), "file_bytes": directory_bytes(directory), "perplexity": perplexity(model, windows, not options.quiet)}
            for directory, model in models]
    if not options.json:
        _print_table(("model", "MB", "perplexity"), [(row["model"], f"{row['file_bytes'] / 1e6:.2f}", f"{row['perplexity']:.3f}") for row in rows])
        print(f"{windows.numel()} tokens of {options.data} in windows of {windows.shape[1]}")
    return {"data": str(options.data), "tokens": windows.numel(), "context": windows.shape[1], "models": rows}, [{"input_ids": windows[:4]}]


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
    from .published import PUBLISHED, published_config

    path = Path(options.model)
    if not path.is_file():
        path = model_directory(options.model) if path.is_dir() or options.model in PACKAGED else path
    named = not path.exists() and options.model in PUBLISHED
    _check_budget(options)
    if options.bits is not None or options.max_megabytes is not None:
        _plan_budget(options, path)
        return
    if options.calibrate is not None:
        raise UsageError("--calibrate: sizes alone need no text; give --bits or --max-megabytes with it")
    result = plan(empty_model(published_config(options.model) if named else load_config(path)), tuple(options.layout or LAYOUTS), options.include, options.exclude)
    if options.json:
        _print_json({**asdict(result), "rest": result.rest})
        return
    unit, letters = (1e9, "GB") if result.dense_model >= 1e10 else (1e6, "MB")
    rows = [("dense", f"{result.dense_linears / unit:.2f}", f"{result.dense_model / unit:.2f}", f"{8 * result.dense_linears / result.weights:.3f}", "", "")]
    rows += [(row.layout, f"{row.linears / unit:.2f}", f"{row.model / unit:.2f}", f"{row.bits_per_weight:.3f}", f"{result.dense_linears / row.linears:.1f}x",
              row.purpose) for row in result.rows]
    _print_table(("layout", f"linears {letters}", f"model {letters}", "bits/weight", "linears", "for"), rows, left=(0, 5))
    print(f"{result.converted} layers with {result.weights:,} weights would be converted; the rest, {_mb(result.rest)}, stays as it is")
    for name, reason in result.skipped:
        print(f"  left alone: {name}: {reason}")


def _plan_budget(options: argparse.Namespace, path: Path) -> None:
    """What `rbe compress` with this budget would choose, and what it would choose from."""
    from .budget import choose
    from .models import load_dense
    from .replace import find_linears
    from .report import frontier_lines
    from .walk import calls_of

    if not path.is_dir():
        raise UsageError(f"--bits, --max-megabytes: losses are measured on weights, and {path} is no model directory")
    model = load_dense(path)
    chosen = [entry for entry in find_linears(model, options.include, options.exclude) if entry.convertible]
    batches = _calibration(options, model, path)
    calls = None if batches is None else calls_of(batches, chosen[0].module.weight.device)
    layouts = {"candidates": tuple(options.layout)} if options.layout else {}
    choice = choose(model, chosen, calls, options.bits, options.max_megabytes, options.seed, not options.quiet, **layouts)
    if options.json:
        _print_json({"layouts": {name: str(layout) for name, layout in choice.layouts.items()}, "frontier": choice.frontier})
        return
    _print_table(("layer", "layout"), [(name, str(layout)) for name, layout in choice.layouts.items()], left=(0, 1))
    print("mixes considered (* chosen), loss as measured layer by layer:", *frontier_lines(choice.frontier), sep="\n")


def _check_budget(options: argparse.Namespace) -> None:
    if options.bits is not None and options.max_megabytes is not None:
        raise UsageError("--bits, --max-megabytes: give one of them")


def _calibration(options: argparse.Namespace, model: Any, directory: Path) -> Any:
    if options.calibrate is None:
        return None
    from .models import load_tokenizer
    from .text import calibration_batches, read_lines

    return calibration_batches(model, load_tokenizer(directory), read_lines(options.calibrate), options.samples, options.seed)


def run_export(options: argparse.Namespace) -> None:
    from .checkpoint import load_pretrained
    from .models import copy_companions, directory_bytes, is_compressed
    from .replace import decompress

    source = Path(options.path)
    if not source.is_dir() or not is_compressed(source):
        raise ValueError(f"{source}: is no directory that `rbe compress` wrote")
    if options.to == "pt2":
        from .export import export_program, write_program

        file = Path(options.out) if options.out is not None else source.with_name(source.name + ".pt2")
        if file.is_dir() or (file.exists() and not options.force):
            raise ValueError(f"{file}: is {'a directory' if file.is_dir() else 'there already; --force writes over it'}")
        if not file.parent.is_dir():
            raise ValueError(f"{file}: its directory does not exist")
        write_program(export_program(load_pretrained(source)), file)
        print(f"{file}: {_mb(file.stat().st_size)}; import rbe_torch, then torch.export.load({str(file)!r}).module()")
        return
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


_PROBE_SENTENCES = 2000
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
