"""show_config: what this installation runs on: versions, instruction set, threads, CUDA, and the kernels chosen for typical shapes."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from typing import Any

import torch

from . import __version__, _ops
from .arguments import size
from .layout import Layout

#: (layout, out_features, in_features, tokens, dtype of x) of the products whose kernels are shown
SHAPES = (
    ("rbe22_g64", 4096, 4096, 512, torch.float32),
    ("rbe9r_g16", 4096, 4096, 512, torch.float32),
    ("rbe8x2_g8", 4096, 4096, 512, torch.float32),
    ("rbe8x2_g8", 4096, 4096, 1, torch.float32),
    ("rbe8x2_g8", 4096, 4096, 1, torch.bfloat16),
    ("rbe16s_g8", 4096, 4096, 1, torch.float32),
)


class Config(dict):
    """A dict that prints as lines of `name: value`."""

    def __str__(self) -> str:
        lines = []
        for name, value in self.items():
            if isinstance(value, dict):
                lines.append(f"{name}:")
                lines += [f"  {key}: {entry}" for key, entry in value.items()]
            else:
                lines.append(f"{name}: {value}")
        return "\n".join(lines)


def show_config(shapes: Iterable[tuple[str, int, int, int, torch.dtype]] = SHAPES) -> Config:
    """The configuration as a dict; `print(rbe_torch.show_config())` prints it in lines.

    shapes: (layout, out_features, in_features, tokens, dtype of x) of the products whose kernels to name; they are those of accuracy="auto".
    """
    built = "built" if _ops.has_cuda() else "not built"
    cuda: Any = f"no device; kernels {built}"
    if torch.cuda.is_available():
        cuda = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())) + f"; kernels {built}"
    return Config({
        "rbe_torch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "isa": _ops.isa(),
        "threads": torch.get_num_threads(),
        "cuda": cuda,
        "kernels": {
            f"{layout} {m}x{n}, {tokens} token{'' if tokens == 1 else 's'} of {str(dtype).removeprefix('torch.')}":
                _ops.describe_linear(str(Layout.parse(layout)), size("out_features", m), size("in_features", n), size("tokens", tokens), dtype)
            for layout, m, n, tokens, dtype in shapes
        },
    })
