"""An RBELinear from a dense layer, or from the format's tensors: RBELinear.from_linear and RBELinear.from_codes, which say what the arguments are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arguments import bias_of, codes_rows, exact_float32, residual_of, seed_of, seed_value, size
from .encode import encode_layer
from .layout import Layout
from .problems import without_operator
from .replace import dense_weight, is_conv1d

if TYPE_CHECKING:
    from .linear import RBELinear


def layer_from_linear(kind: type[RBELinear], nn_linear: nn.Module, layout: str | Layout, basis: Tensor | None, gain: Tensor | None,
                      seed: int) -> RBELinear:
    if type(nn_linear) is not nn.Linear and not is_conv1d(nn_linear):
        raise TypeError(f"nn_linear: is a {type(nn_linear).__name__}, must be an nn.Linear or a transformers Conv1D")
    layout, seed = Layout.parse(layout), seed_value(seed)
    weight = dense_weight(nn_linear)
    if weight.is_meta:
        raise ValueError("nn_linear: its weight is on the meta device and has no values to encode")
    parts = encode_layer(weight, layout, basis, gain, seed)
    layer = kind.from_codes(parts.codes, parts.basis, parts.gain, nn_linear.bias, layout=layout, in_features=weight.shape[1],
                           seed=seed if layout.seeded else None, residual=parts.residual, dtype=nn_linear.weight.dtype)
    return layer.train(nn_linear.training)


def layer_from_codes(kind: type[RBELinear], codes: Tensor, basis: Tensor, gain: Tensor, bias: Tensor | None, layout: str | Layout, in_features: int,
                     seed: int | None, residual: dict[str, Tensor] | None, dtype: torch.dtype | None) -> RBELinear:
    layout, n = Layout.parse(layout), size("in_features", in_features)
    for name, tensor in (("codes", codes), ("basis", basis), ("gain", gain)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: is a {type(tensor).__name__}, must be a torch.Tensor")
        if tensor.device != codes.device:
            raise ValueError(f"{name}: is on {tensor.device}, must be on {codes.device} as codes are")
    m, seed = codes_rows(codes, layout, n), seed_of(seed, layout)
    basis, gain = exact_float32("basis", basis, layout.basis_shape), exact_float32("gain", gain, (m,))
    bias, residual = bias_of(bias, m, codes.device), residual_of(residual, layout, m, n, codes.device)
    if dtype is None:
        dtype = bias.dtype if bias is not None else torch.get_default_dtype()
    layer = kind(n, m, False, layout, "meta", dtype, seed=seed)
    if layout.seeded:
        layer._buffers["seed"] = torch.tensor(seed, dtype=torch.int64, device=codes.device)
    codes = codes.detach().contiguous()
    if codes.dtype == torch.int32:
        try:
            layer._buffers["packed"] = torch.ops.rbe.pack(codes, **layer._options)
        except RuntimeError as error:
            raise ValueError(without_operator(error)) from error
    else:
        layer._buffers["packed"] = codes.clone()
    layer._parameters["basis"] = basis if isinstance(basis, nn.Parameter) else nn.Parameter(basis.clone(), requires_grad=False)
    layer._parameters["gain"] = nn.Parameter(gain.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
    layer._buffers.update({name: tensor.detach().clone() for name, tensor in residual.items()})
    problem = layer.problem()
    if problem:
        raise ValueError(problem)
    layer._hold_codes_for_kernels()
    return layer
