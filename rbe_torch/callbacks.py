"""Makes a transformers.TrainerCallback of a function to be called after every optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def after_each_step(function: Callable[[], None]) -> Any:
    """A TrainerCallback that calls `function` on each on_step_end. ImportError: transformers is not installed."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("a TrainerCallback needs transformers: pip install transformers") from error

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            function()

    return AfterEachStep()
