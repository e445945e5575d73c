"""What commands print: a table, JSON, a size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Row = Sequence[Any]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_table(header: Row, rows: Sequence[Row], left: tuple[int, ...] = (0,)) -> None:
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    width = [max(len(line[c]) for line in lines) for c in range(len(header))]
    text = ["  ".join(cell.ljust(width[c]) if c in left else cell.rjust(width[c]) for c, cell in enumerate(line)).rstrip() for line in lines]
    print(text[0], "-" * max(map(len, text)), *text[1:], sep="\n")
