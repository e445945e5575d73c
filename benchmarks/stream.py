"""Compresses a synthetic sharded Llama of at least 4 GB under a memory cap of 2 GB, kills the run in the middle, and lets a second run
finish it.

    python benchmarks/stream.py --out out [--gigabytes 4.2] [--cap-gigabytes 2] [--layout rbe8_g8] [--keep]

The cap is the kernel's RLIMIT_DATA on the compressing process: what it may allocate, stacks and torch included. Shards are read with plain
reads, so no page of them is mapped. Peak memory is the process's largest resident set. Needs --gigabytes and a tenth more of free disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch

from rbe_torch import shards, stream

WIDTH, INNER, VOCABULARY = 2048, 5632, 32000
SHARD_BYTES = 1 << 29
LAYER_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)


def make(directory: Path, gigabytes: float) -> int:
    """Writes config.json, shards and index; returns the bytes of the shards. Random weights of a trained model's size."""
    from transformers import LlamaConfig

    blocks = max(1, round((gigabytes * 1e9 - 4 * WIDTH * VOCABULARY) / LAYER_BYTES))
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for i in range(blocks):
        here = f"model.layers.{i}."
        shapes |= {f"{here}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{here}mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")} | {
            f"{here}mlp.down_proj.weight": (WIDTH, INNER)
        }
        shapes |= {f"{here}{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    files: list[list[str]] = [[]]
    for name, shape in shapes.items():
        if sum(4 * torch.Size(shapes[other]).numel() for other in files[-1]) + 4 * torch.Size(shape).numel() > SHARD_BYTES:
            files.append([])
        files[-1].append(name)
    generator, mapping = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        mapping |= dict.fromkeys(names, file)
        shards.write_tensors(
            directory / file,
            [
                (
                    name,
                    torch.float32,
                    shapes[name],
                    lambda name=name: (
                        torch.ones(shapes[name]) if len(shapes[name]) == 1 else torch.randn(shapes[name], generator=generator) * 0.02
                    ),
                )
                for name in names
            ],
            {"format": "pt"},
        )
    total = sum(place.stat().st_size for place in directory.glob("*.safetensors"))
    (directory / shards.INDEX_FILE).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": mapping}))
    return total


def run(source: Path, target: Path, layout: str, cap: int, kill_after: int | None) -> dict[str, object]:
    """One process under the cap; kill_after: SIGKILL when so many layers are finished."""
    command = [sys.executable, "-m", "rbe_torch", "compress", str(source), str(target), "--stream", "--layout", layout, "--quiet", "--json"]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (cap, cap)),
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    killed = False
    while kill_after is not None and process.poll() is None:
        if len(list((target / stream.PARTS).glob("*.safetensors"))) > kill_after:  # the basis is one of them
            process.send_signal(signal.SIGKILL)
            killed = True
            break
        time.sleep(0.1)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    facts = json.loads(output) if output.strip() else {}
    return {"killed": killed, "status": status, "seconds": time.monotonic() - start, "peak_resident_bytes": 1024 * usage.ru_maxrss, **facts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--gigabytes", type=float, default=4.2)
    parser.add_argument("--cap-gigabytes", type=float, default=2.0)
    parser.add_argument("--layout", default="rbe8_g8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the models")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source, target = options.out / "stream-dense", options.out / "stream-coded"
    for directory in (source, target):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    size, cap = make(source, options.gigabytes), int(options.cap_gigabytes * 1e9)
    print(f"{source}: {size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards; cap {cap / 1e9:.2f} GB", flush=True)
    layers = 7 * sum(1 for name in shards.Shards(source).places if name.endswith("input_layernorm.weight"))
    first = run(source, target, options.layout, cap, kill_after=layers // 2)
    print(f"killed after {first['seconds']:.0f} s, peak {first['peak_resident_bytes'] / 1e9:.2f} GB resident", flush=True)
    second = run(source, target, options.layout, cap, kill_after=None)
    if second["status"] or not first["killed"]:
        raise SystemExit(f"stream: the run failed: {first}, {second}")
    print(
        f"finished in {second['seconds']:.0f} s: {second['finished_before']} layers were there, {second['encoded']} encoded, peak "
        f"{second['peak_resident_bytes'] / 1e9:.2f} GB resident, {second['bits_per_weight']:.3f} bits a weight, {second['file_bytes'] / 1e9:.3f} GB"
    )
    subprocess.run([sys.executable, "-m", "rbe_torch", "verify", str(target), "--quiet"], check=True)
    facts = {
        "machine": {"cpu": harness.cpu_name(), "threads": options.threads, "torch": torch.__version__},
        "dense_bytes": size,
        "cap_bytes": cap,
        "layout": options.layout,
        "first": first,
        "second": {key: value for key, value in second.items() if key not in ("out",)},
    }
    (options.out / "stream.json").write_text(json.dumps(facts, indent=1) + "\n")
    if not options.keep:
        shutil.rmtree(source)
        shutil.rmtree(target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
