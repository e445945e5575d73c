"""Trains a small GPT to compress: 10.6 M weights in its linear layers, one token a byte, on text that Debian packages carry, for as many
minutes as given.

    python benchmarks/train_decoder.py --out out/decoder --minutes 60 [--text FILE ...] [--threads 2]
    rbe compress out/decoder out/decoder-2 --layout rbe8x2_g8 --calibrate out/decoder/train.txt --samples 128
    rbe eval out/decoder-2 --dense out/decoder --data out/decoder/valid.txt

Without --text it reads the glosses of WordNet 3.0 (package wordnet-base, /usr/share/wordnet/data.*, 10 MB); other texts: dict-gcide,
bible-kjv-text. The last twentieth of the lines, in an order drawn with a seed, is held out as OUT/valid.txt, the rest is OUT/train.txt.
OUT is a transformers directory with a tokenizer. An interrupted run goes on from OUT/state.pt; with as few --minutes as it has had already
it is written as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import harness  # noqa: E402
import torch  # noqa: E402

CONTEXT, BATCH, RATE, WARM_UP = 256, 16, 1e-3, 100
SHOWN_EVERY = 120  # seconds; what showing takes is not counted
BYTES_FROM = 3  # ByT5's ids: byte + 3


def lines_of(files: list[Path]) -> list[str]:
    """Lines of text; of WordNet's data files the glosses."""
    found = []
    for file in files:
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            text = line.partition(" | ")[2] if file.name.startswith("data.") else line
            if len(text.strip()) > 20:
                found.append(text.strip())
    return found


def tokens_of(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long() + BYTES_FROM


@torch.no_grad()
def validate(model: torch.nn.Module, tokens: torch.Tensor, windows: int) -> float:
    """Mean loss a byte over windows evenly spaced."""
    starts = torch.linspace(0, len(tokens) - CONTEXT - 1, windows).long()
    total = 0.0
    for part in starts.split(BATCH):
        ids = torch.stack([tokens[i : i + CONTEXT] for i in part.tolist()])
        total += float(model(input_ids=ids, labels=ids).loss) * len(part)
    return total / windows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--text", type=Path, nargs="*", help="text files; default WordNet's glosses")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    files = options.text or sorted(Path("/usr/share/wordnet").glob("data.*"))
    missing = [str(file) for file in files if not file.is_file()]
    if not files or missing:
        print(f"train_decoder: no text ({', '.join(missing) or 'install wordnet-base'}); name files with --text", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    lines = lines_of(files)
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(lines) * 19 // 20
    for name, part in (("train", order[:cut]), ("valid", order[cut:])):
        (options.out / f"{name}.txt").write_text("\n".join(lines[i] for i in part) + "\n", encoding="utf-8")
    train, valid = tokens_of(options.out / "train.txt"), tokens_of(options.out / "valid.txt")
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=384,
        n_layer=6,
        n_head=6,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    spent, step, state = 0.0, 0, options.out / "state.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        spent, step = saved["seconds"], saved["step"]
    generator = torch.Generator().manual_seed(options.seed + step)
    seconds, last = 60 * options.minutes, time.monotonic()
    shown = last
    print(
        f"{len(train):,} bytes to train on, {len(valid):,} held out, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True
    )
    while spent < seconds:
        rate = RATE * min(1.0, (step + 1) / WARM_UP) * max(0.05, 0.5 * (1 + math.cos(math.pi * spent / seconds)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(train) - CONTEXT, (BATCH,), generator=generator).tolist()
        ids = torch.stack([train[i : i + CONTEXT] for i in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        now = time.monotonic()
        spent, last = spent + now - last, now
        if now - shown > SHOWN_EVERY or spent >= seconds:
            shown = now
            held = validate(model, valid, 16)
            print(f"step {step}, {spent:.0f} s of {seconds:.0f}: loss {float(loss.detach()):.3f}, held out {held:.3f} a byte", flush=True)
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "seconds": spent, "step": step}, state)
            last = time.monotonic()
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    facts = {
        "cpu": harness.cpu_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "steps": step,
        "seconds": spent,
        "train_bytes": len(train),
        "valid_loss_a_byte": validate(model, valid, 64),
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
