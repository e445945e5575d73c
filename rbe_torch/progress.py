"""Progress of a command that takes seconds, on stderr: a tqdm bar where tqdm is installed and stderr is a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
import time
from typing import Any

_EVERY = 5.0  # seconds between plain lines


class Progress:
    """Counts up to `total` units; use it in a `with`. shown=False: silent."""

    def __init__(self, title: str, total: int, shown: bool = True) -> None:
        self.title, self.total, self.done = title, max(1, total), 0
        self.shown = shown
        self.start = self.last = time.monotonic()
        self._bar = _tqdm(title, self.total) if shown and sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and kind is None:
            print(f"{self.title}: done, {time.monotonic() - self.start:.1f} s", file=sys.stderr, flush=True)

    def step(self, units: int = 1, what: str = "") -> None:
        """`units` more are done; `what` names the one that was."""
        self.done += units
        if self._bar is not None:
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        if self.shown and now - self.last >= _EVERY:
            self.last = now
            left = (now - self.start) * (self.total - self.done) / self.done if self.done else 0.0
            print(f"{self.title}: {100 * self.done // self.total} %, {left:.0f} s left, {what}", file=sys.stderr, flush=True)


def _tqdm(title: str, total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left {postfix}"
    return tqdm(total=total, desc=title, bar_format=form, file=sys.stderr, leave=True)
