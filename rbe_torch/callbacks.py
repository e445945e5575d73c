"""Makes callbacks of transformers and of Lightning of a function to be called after every optimiser step."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any


def for_transformers(function: Callable[[], None]) -> Any:
    """A TrainerCallback that calls `function` on each on_step_end. ImportError: transformers is not installed."""
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("a TrainerCallback needs transformers: pip install transformers") from error

    class AfterEachStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            function()

    return AfterEachStep()


def for_lightning(function: Callable[[], None]) -> Any:
    """A Callback of lightning, or of pytorch_lightning where only that is installed, that calls `function` where the trainer has made another step: accumulated
    batches make one together. ImportError: neither is installed."""
    found = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
    if not found:
        raise ImportError("a Callback of Lightning needs it: pip install lightning")
    callback = importlib.import_module(f"{found[0]}.pytorch.callbacks" if found[0] == "lightning" else f"{found[0]}.callbacks").Callback

    class AfterEachStep(callback):
        steps = 0

        def on_train_start(self, trainer: Any, *_: Any) -> None:
            self.steps = trainer.global_step  # of a run that is resumed

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step > self.steps:
                self.steps = trainer.global_step
                function()

    return AfterEachStep()
