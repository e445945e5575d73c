"""`rbe inspect`: what a compressed checkpoint holds."""

from __future__ import annotations

import argparse

from .tables import megabytes, print_json, print_table

_WEIGHT_TENSORS = ("packed", "gain", "residual", "residual_scale", "residual_right", "residual_right_scale")


def run(options: argparse.Namespace) -> None:
    from ..checkpoint import Checkpoint
    from ..manifest import BASIS_PREFIX, VERSION

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
        print_json(facts)
        return
    print_table(("layer", "shape", "layout", "basis", "bytes", "bits/weight"),
                 [(row["name"], f"{row['out_features']}x{row['in_features']}", row["layout"], row["basis"], row["bytes"],
                   f"{row['bits_per_weight']:.3f}") for row in layers])
    print(f"{facts['file']}: {megabytes(facts['file_bytes'])}, format version {VERSION}, {facts['model_class']}")
    print(f"{len(layers)} layers, {weights:,} weights: {megabytes(compressed)}, {facts['bits_per_weight']:.3f} bits a weight (basis {megabytes(tables)} of it)")
    print(f"everything else: {megabytes(total - compressed)}" + (f", most of it {others[0][1]}, {megabytes(others[0][0])}" if others else ""))
