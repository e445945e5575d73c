"""Derivatives of torch.ops.rbe.*: autograd Functions in front of the C kernels.

* They are new-style, with setup_context, so that ``torch.func`` transforms work; `eager` makes the faster old-style twin of one.
* The backward of linear is ``rbe::linear_backward``; its own derivative (double backward) and that of decode run on the dense reference in torch.
"""

from __future__ import annotations

from typing import Any

import torch

_ops = torch.ops.rbe

# Positional tensors of rbe::linear, in order; the gradients of linear_backward come in the order of _GRADIENTS, bit i of `wanted` each.
TENSORS = 10
_GRADIENTS = (0, 2, 3, 4, 5)  # x, basis, gain, bias, amplitude


def _below_autograd(op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args[:-1], **args[-1])


def _loop_over_batch(apply, batch_size, in_dims, args):
    """vmap's last resort: one call per element of the batch, results stacked at dimension 0."""
    results = [
        apply(*(a if d is None else a.select(d, b) for a, d in zip(args, in_dims, strict=True))) for b in range(batch_size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(r) for r in zip(*results, strict=True)), (0,) * len(results[0])
    return torch.stack(results), 0


class Linear(torch.autograd.Function):
    """y = x W^T + bias; arguments: the 10 tensors, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.linear.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:TENSORS])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, dy):
        wanted = sum(1 << i for i, position in enumerate(_GRADIENTS) if ctx.needs_input_grad[position])
        got = _ops.linear_backward(dy, *ctx.saved_tensors, **ctx.keywords, wanted=wanted)
        gradients: list[Any] = [None] * (TENSORS + 1)
        for i, position in enumerate(_GRADIENTS):
            if wanted >> i & 1:
                gradients[position] = got[i]
        return tuple(gradients)

    @staticmethod
    def vmap(info, in_dims, *args):
        if all(d is None for d in in_dims[1:TENSORS]):
            return Linear.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return _loop_over_batch(Linear.apply, info.batch_size, _dims(in_dims), args)


class LinearBackward(torch.autograd.Function):
    """The gradients of Linear, themselves differentiable; arguments: dy, the 10 tensors, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.linear_backward.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[: TENSORS + 1])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, *cotangents):
        from . import reference

        keywords = dict(ctx.keywords)
        wanted = keywords.pop("wanted", 31)
        keywords.pop("accuracy", None)
        dy, *tensors = ctx.saved_tensors
        chosen = [p for i, p in enumerate(_GRADIENTS) if wanted >> i & 1 and tensors[p] is not None]
        free = [p for p in _GRADIENTS if tensors[p] is not None]

        def product(*values):
            filled = list(tensors)
            for position, value in zip(free, values, strict=True):
                filled[position] = value
            return reference.linear(*filled, **keywords)

        def first_gradients(dy, *values):
            _, vjp = torch.func.vjp(product, *values)
            return tuple(g for p, g in zip(free, vjp(dy), strict=True) if p in chosen)

        _, vjp = torch.func.vjp(first_gradients, dy, *(tensors[p] for p in free))
        second = vjp(tuple(c for i, c in enumerate(cotangents) if wanted >> i & 1 and tensors[_GRADIENTS[i]] is not None))
        gradients: list[Any] = [second[0]] + [None] * (TENSORS + 1)
        for position, gradient in zip(free, second[1:], strict=True):
            gradients[1 + position] = gradient
        return tuple(gradients)

    @staticmethod
    def vmap(info, in_dims, *args):
        only_tokens = all(d is None for d in in_dims[2 : TENSORS + 1])
        if only_tokens and args[-1].get("wanted", 31) == 1 and in_dims[0] is not None and in_dims[1] is not None:
            moved = (args[0].movedim(in_dims[0], 0), args[1].movedim(in_dims[1], 0))
            return LinearBackward.apply(*moved, *args[2:]), (0, None, None, None, None)
        return _loop_over_batch(LinearBackward.apply, info.batch_size, _dims(in_dims), args)


class Decode(torch.autograd.Function):
    """W from codes; arguments: the 8 tensors of rbe::decode, then a dict of the keyword arguments."""

    @staticmethod
    def forward(*args):
        return _below_autograd(_ops.decode.default, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:-1])
        ctx.keywords = inputs[-1]

    @staticmethod
    def backward(ctx, dw):
        from . import reference

        codes, basis, gain, amplitude, *residuals = ctx.saved_tensors

        def dense(basis, gain, amplitude):
            return reference.decode(codes, basis, gain, amplitude, *residuals, **ctx.keywords)

        if amplitude is None:
            _, vjp = torch.func.vjp(lambda basis, gain: dense(basis, gain, None), basis, gain)
            return (None, *vjp(dw), None, *(None,) * 5)
        _, vjp = torch.func.vjp(dense, basis, gain, amplitude)
        return (None, *vjp(dw), *(None,) * 5)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _loop_over_batch(Decode.apply, info.batch_size, _dims(in_dims), args)


def _dims(in_dims):
    """in_dims with the dict of keyword arguments (a pytree to vmap) as one unbatched argument."""
    return (*in_dims[:-1], None)


def is_dual(args) -> bool:
    """Whether forward-mode AD is on and an argument carries a tangent: the Function then says that jvp is not implemented."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


def eager(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same Function in the old style, with ctx in forward: half the overhead, but torch.func refuses it, so it is for eager calls alone."""

    def forward(ctx, *args):
        function.setup_context(ctx, args, None)
        return function.forward(*args)

    base = torch.autograd.Function
    return type(function.__name__, (function,), {"forward": staticmethod(forward), "setup_context": staticmethod(base.setup_context)})
