"""Walking through a model stretch by stretch with calibration batches: what reaches each linear layer, dense and compressed side by side.

A *stretch* is a transformer block where the model is a chain of blocks (block i + 1 takes what block i returned, and everything else that
it is called with is the same for all): then only the hidden states between two blocks are kept. Layers outside the chain, and models that
are no chain, are walked with the whole model as the stretch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


@dataclass
class Call:
    """Arguments of one forward pass. `mask` [B, T]: True where a token is real; None: all are."""

    args: tuple
    kwargs: dict[str, Any]
    mask: Tensor | None = None

    def run(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)

    def with_hidden(self, hidden: Tensor) -> Call:
        return Call((hidden, *self.args[1:]), self.kwargs, self.mask)


def calls_of(calibration: Iterable[Any], device: torch.device) -> list[Call]:
    """Batches (dicts of tensors, tuples or lists of arguments, or one tensor) as calls. ValueError or TypeError: none, or of another
    kind."""
    if isinstance(calibration, (str, bytes, Tensor, dict)) or not isinstance(calibration, Iterable):
        raise TypeError(
            f"calibration: is a {type(calibration).__name__}, must be an iterable of batches: dicts of tensors, tuples, or tensors"
        )
    calls = []
    for batch in calibration:
        if hasattr(batch, "items"):
            kwargs = {key: _to(value, device) for key, value in batch.items()}
            mask = kwargs.get("attention_mask")
            mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
            calls.append(Call((), kwargs, mask))
        elif isinstance(batch, (tuple, list)):
            calls.append(Call(tuple(_to(value, device) for value in batch), {}))
        elif isinstance(batch, Tensor):
            calls.append(Call((batch.to(device),), {}))
        else:
            raise TypeError(f"calibration: holds a {type(batch).__name__}, must hold dicts of tensors, tuples, or tensors")
        values = [value for value in (*calls[-1].args, *calls[-1].kwargs.values()) if isinstance(value, Tensor)]
        if any(not value.numel() for value in values):
            raise ValueError(f"calibration: batch {len(calls) - 1} holds an empty tensor {tuple(next(v.shape for v in values if not v.numel()))}")
    if not calls:
        raise ValueError("calibration: holds no batch, must hold at least one")
    return calls


@torch.no_grad()
def try_call(model: nn.Module, call: Call) -> None:
    """ValueError where the model refuses the batch, or returns something of which no output tensor is known."""
    try:
        output = call.run(model)
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(f"calibration: the model refused the first batch: {type(error).__name__}: {error}") from error
    if output_tensor(output) is None:
        raise ValueError(
            f"calibration: the model returned a {type(output).__name__}, must be a tensor, a tuple that starts with one, or a transformers output"
        )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def output_tensor(output: Any) -> Tensor | None:
    """The tensor that stands for a module's output: itself, the first of a tuple, or a transformers output's logits or last hidden
    state."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "last_hidden_state"):
        if isinstance(getattr(output, key, None), Tensor):
            return getattr(output, key)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


@dataclass
class Stretch:
    """`module` is called with `calls`; `phases` are the layers in it (names below `module`) that see the same input, in order of
    execution."""

    name: str
    module: nn.Module
    phases: list[list[str]]

    def full(self, layer: str) -> str:
        return f"{self.name}.{layer}" if self.name and layer else self.name or layer


@contextmanager
def _inputs_to(module: nn.Module, layers: Sequence[str], seen: Callable[[str, Tensor], None], stop: bool = True) -> Iterator[None]:
    """While it lasts `seen(layer, x)` gets what reaches the layers; with `stop` the pass ends when all have been reached."""
    left = set(layers)

    def hook(layer: str) -> Callable:
        def run(_: nn.Module, args: tuple, kwargs: dict) -> None:
            seen(layer, args[0] if args else next(iter(kwargs.values())))
            left.discard(layer)
            if stop and not left:
                raise _Stop

        return run

    handles = [module.get_submodule(layer).register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs(module: nn.Module, call: Call, layers: Sequence[str]) -> dict[str, list[Tensor]]:
    """What reaches the layers when `module` is called: name -> tensors [..., n], one for each time the layer is called."""
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with _inputs_to(module, layers, lambda layer, x: found[layer].append(x.detach())):
        try:
            call.run(module)
        except _Stop:
            pass
    for layer, values in found.items():
        for x in values:
            _check_finite(layer, x, call.mask)
    return found


def _check_finite(layer: str, x: Tensor, mask: Tensor | None) -> None:
    """Padding may hold anything; a real token with a NaN would spoil what is fitted to all of them."""
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.reshape(-1)]
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"calibration: layer {layer!r} gets values that are not finite from a batch, must get none")


def _order(module: nn.Module, call: Call, layers: Sequence[str]) -> list[list[str]]:
    """The layers in the order in which they are reached, those that read the very same tensor together; layers not reached are left out."""
    phases: list[list[str]] = []
    keep: list[Tensor] = []  # alive, so that no two inputs have one address
    met: set[str] = set()

    def seen(layer: str, x: Tensor) -> None:
        if layer in met:
            return
        met.add(layer)
        if keep and keep[-1].data_ptr() == x.data_ptr() and keep[-1].shape == x.shape and keep[-1].stride() == x.stride():
            phases[-1].append(layer)
        else:
            phases.append([layer])
        keep.append(x)

    with _inputs_to(module, layers, seen, stop=False):
        call.run(module)
    return phases


def find_chain(model: nn.Module, call: Call, layers: Sequence[str]) -> list[str]:
    """Names of the blocks of the longest chain that holds some of the layers; empty if there is none."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    best: list[str] = []
    for name, module in lists:
        names = [f"{name}.{child}" if name else child for child in module._modules]
        holding = [block for block in names if any(layer.startswith(f"{block}.") for layer in layers)]
        if len(holding) > len(best) and holding == names and _is_chain(model, call, names):
            best = names
    return best


def _is_chain(model: nn.Module, call: Call, names: list[str]) -> bool:
    before: list[tuple[tuple, dict]] = []
    after: list[Tensor | None] = []

    def pre(_: nn.Module, args: tuple, kwargs: dict) -> None:
        before.append((args, kwargs))

    def post(_: nn.Module, args: tuple, output: Any) -> None:
        after.append(output if isinstance(output, Tensor) else output_tensor(output))

    handles = []
    for name in names:
        block = model.get_submodule(name)
        handles += [block.register_forward_pre_hook(pre, with_kwargs=True), block.register_forward_hook(post)]
    try:
        call.run(model)
    finally:
        for handle in handles:
            handle.remove()
    if len(before) != len(names) or len(after) != len(names) or any(not args or not isinstance(args[0], Tensor) for args, _ in before):
        return False
    first = before[0]
    return all(
        after[i - 1] is not None
        and before[i][0][0] is after[i - 1]
        and _same(before[i][0][1:], first[0][1:])
        and _same(before[i][1], first[1])
        for i in range(1, len(names))
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (
            isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        )
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, str, bool)) and a == b)


@dataclass
class Visit:
    """A stretch with the calls that reach it: `dense` is a copy of it as it was, with dense inputs; the stretch itself sees compressed
    ones."""

    stretch: Stretch
    dense: nn.Module
    dense_calls: list[Call]
    calls: list[Call]


Around = Callable[[str, nn.Module], AbstractContextManager[None]]


def walk(model: nn.Module, calls: list[Call], layers: Sequence[str], around: Around = lambda name, block: nullcontext()) -> Iterator[Visit]:
    """Visits every stretch that holds some of the layers, in order of execution. Between two visits the caller replaces the layers visited.

    A layer that no call reaches is in no visit. around(name, block): a context for as long as a block of a chain is visited. Caches of keys and values are off meanwhile: a block that is run again would find its own
    tokens there.
    """
    configs = {id(config): config for module in model.modules() if getattr(config := getattr(module, "config", None), "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield from _walk(model, calls, layers, around)
    finally:
        for config in configs.values():
            config.use_cache = True


@torch.no_grad()
def _walk(model: nn.Module, calls: list[Call], layers: Sequence[str], around: Around) -> Iterator[Visit]:
    order = [layer for phase in _order(model, calls[0], layers) for layer in phase]
    blocks = find_chain(model, calls[0], layers)
    inside = {layer for layer in order for block in blocks if layer.startswith(f"{block}.")}
    first = min((order.index(layer) for layer in inside), default=len(order))
    early = [layer for layer in order[:first] if layer not in inside]
    late = [layer for layer in order[first:] if layer not in inside]
    original = copy.deepcopy(model) if early or late else None
    if early:
        yield Visit(Stretch("", model, _order(model, calls[0], early)), original, calls, calls)
    if blocks:
        yield from _walk_chain(model, original if early else model, calls, blocks, sorted(inside, key=order.index), around)
    if late:
        yield Visit(Stretch("", model, _order(model, calls[0], late)), original, calls, calls)


def _walk_chain(
    model: nn.Module, original: nn.Module, calls: list[Call], blocks: list[str], layers: list[str], around: Around
) -> Iterator[Visit]:
    here = [_call_of(model, blocks[0], call) for call in calls]
    there = here if original is model else [_call_of(original, blocks[0], call) for call in calls]
    for name in blocks:
        block = model.get_submodule(name)
        inside = [layer.removeprefix(f"{name}.") for layer in layers if layer.startswith(f"{name}.")]
        with around(name, block):
            dense = copy.deepcopy(block)
            yield Visit(Stretch(name, block, _order(block, here[0], inside)), dense, there, here)
            there = [call.with_hidden(output_tensor(call.run(dense))) for call in there]
            here = [call.with_hidden(output_tensor(call.run(block))) for call in here]
            _drop(dense)


def _drop(module: nn.Module) -> None:
    """Frees the parameters of a copy that has served, whoever still holds it."""
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _call_of(model: nn.Module, name: str, call: Call) -> Call:
    """The call that reaches the module of that name when the model is called."""
    found: list[Call] = []

    def pre(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(Call(args, kwargs, call.mask))
        raise _Stop

    handle = model.get_submodule(name).register_forward_pre_hook(pre, with_kwargs=True)
    try:
        call.run(model)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found[0]
