"""`rbe eval`: a sentence encoder on sentence pairs, or a language model on text, dense or compressed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..cli import UsageError
from .tables import print_json, print_table

_PROBE_SENTENCES = 2000


def run(options: argparse.Namespace) -> None:
    from ..models import load_any, load_tokenizer, model_directory
    from ..text import is_causal

    if options.layers and options.dense is None:
        raise UsageError("--layers: needs --dense MODEL, the model to compare with")
    path = model_directory(options.path)
    dense = model_directory(options.dense) if options.dense is not None else None
    tokenizer = load_tokenizer(path if (path / "tokenizer_config.json").is_file() or dense is None else dense)
    models = [(directory, load_any(directory)) for directory in (path, dense) if directory is not None]
    if len({is_causal(model) for _, model in models}) > 1:
        raise ValueError(f"--dense: {options.dense} is a {type(models[1][1]).__name__}, {options.path} a {type(models[0][1]).__name__}; is it the same model?")
    score = _score_text if is_causal(models[0][1]) else _score_pairs
    facts, batches = score(models, tokenizer, options)
    if options.layers:
        from ..evaluate import layer_errors

        facts["layers"] = layer_errors(models[0][1], models[1][1], batches)
        if not options.json:
            print_table(("layer", "cosine", "rel. error"), [(row["name"], f"{row['cosine']:.4f}", f"{row['relative_error']:.4f}") for row in facts["layers"]])
    if options.json:
        print_json(facts)


def _score_pairs(models: list[tuple[Path, Any]], tokenizer: Any, options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Spearman and cosine of sentence encoders: facts, and batches for layer_errors. The first model is the one in question, the second the dense one."""
    from ..evaluate import embed, pair_similarity, read_pairs, spearman
    from ..models import base_model, directory_bytes
    from ..text import sentence_batches

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
        print_table(("model", "MB", *(title for _, title in columns)),
                     [(row["model"], f"{row['file_bytes'] / 1e6:.2f}", *(f"{row[key]:.4f}" for key, _ in columns)) for row in rows])
        print(f"{len(pairs)} pairs of {pairs.name}" + probed)
    return {"data": pairs.name, "pairs": len(pairs), "models": rows}, sentence_batches(tokenizer, pairs.sentences[:256])


def _probe_classes(models: list[tuple[Path, Any]], tokenizer: Any, options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """Adds `sst2` to the rows where --data has SST-2: accuracy on dev of a linear probe fitted to the last model's embeddings of training sentences."""
    from ..evaluate import embed, fit_probe, probe_accuracy, read_sst2
    from ..models import base_model

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
    from ..evaluate import perplexity
    from ..models import directory_bytes
    from ..text import context_of, read_lines, text_windows

    if options.data is None:
        raise UsageError("--data: a language model is scored on text; name a text file")
    windows = text_windows(tokenizer, "\n".join(read_lines(options.data)), context_of(models[0][1]))
    rows = [{"model": str(directory), "file_bytes": directory_bytes(directory), "perplexity": perplexity(model, windows, not options.quiet)}
            for directory, model in models]
    if not options.json:
        print_table(("model", "MB", "perplexity"), [(row["model"], f"{row['file_bytes'] / 1e6:.2f}", f"{row['perplexity']:.3f}") for row in rows])
        print(f"{windows.numel()} tokens of {options.data} in windows of {windows.shape[1]}")
    return {"data": str(options.data), "tokens": windows.numel(), "context": windows.shape[1], "models": rows}, [{"input_ids": windows[:4]}]
