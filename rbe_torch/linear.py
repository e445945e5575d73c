"""RBELinear: y = x W^T + bias with W stored as packed RBE codes and multiplied in the compressed domain.

Tensors (m out_features, n in_features, g group, K = ceil(n/g) groups, M stages; docs/format.md):

    packed    uint8   [m, ceil(K*M*bits/8)]   buffer      the codes; where the kernels gain by it they are held interleaved instead (codes.py)
    basis     float32 [M, 256, g]             parameter   may be shared between layers
    gain      float32 [m]                     parameter   positive
    bias      [m] or None                     parameter   the layer's dtype
    seed      int64   []                      buffer      layouts ending in r only
    basis_seed  int64 []                      buffer      only where the basis is drawn from a seed and frozen (rbe_torch/seeded.py)
    residual, residual_scale, residual_right, residual_right_scale    buffers, as the layout's suffix asks

While a layer is in training form (rbe_torch.convert, rbe_torch.prepare_training) `log_gain` replaces the gain parameter, and layouts whose codes
have an amplitude hold it as a float32 parameter [m, K, M]; `lin.gain`, `lin.codes` and `lin.weight` follow them.

The format's tensors keep their dtype whatever the layer is cast to: `.to(dtype)`, `.half()` and the like change the bias and the dtype of
`lin.weight`, and lose nothing. `.to(device)` moves everything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import _ops
from .arguments import FLOATS, seed_value, size
from .codes import for_kernels, is_interleaved, with_amplitude
from .drawing import draw_layer
from .layout import Layout
from .problems import RESIDUALS, find_problem
from .state import load_entries, share_basis

_WEIGHT_IS_READ_ONLY = (
    "weight: is decoded from codes and cannot be assigned; use RBELinear.from_linear to encode a weight, load_state_dict with a dense "
    "'weight' entry to encode into this layer, or rbe_torch.decompress to get an nn.Linear back"
)


class RBELinear(nn.Module):
    """A linear layer in RBE codes, with random codes and a random basis; from_linear and from_codes make one with given ones.

    x [..., in_features] float32, bfloat16, float16 or float64 -> [..., out_features] of the same dtype.
    basis: a float32 parameter [M, 256, g] to share instead of drawing one. basis_seed: the basis is the one this seed gives, is not trained and is
    stored as the seed alone; a basis given beside it must be that one. generator, seed: where the random codes come from; by default torch's own generator. Weights are drawn with the variance of nn.Linear's initialisation, 1 / (3 in_features).
    Errors: ValueError or TypeError naming the argument.
    """

    _basis_seed: int | None = None
    stands_for_conv1d: bool = False  # in the model it took the place of transformers' Conv1D, and decompress puts one back

    def __init__(self, in_features: int, out_features: int, bias: bool = True, layout: str | Layout = "rbe22_g64",
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, basis: nn.Parameter | None = None,
                 generator: torch.Generator | None = None, seed: int | None = None, basis_seed: int | None = None) -> None:
        super().__init__()
        self.in_features = size("in_features", in_features)
        self.out_features = size("out_features", out_features)
        self.layout = layout = Layout.parse(layout)
        self._dtype = dtype if dtype is not None else torch.get_default_dtype()
        if self._dtype not in FLOATS:
            raise TypeError(f"dtype: is {dtype!r}, must be one of {', '.join(map(str, FLOATS))}")
        if generator is None and seed is not None:
            generator = torch.Generator().manual_seed(seed_value(seed))
        m, n = self.out_features, self.in_features
        self._buffers["packed"] = None  # `packed` and `gain` are properties, so their entries are made before they are registered
        self.register_buffer("packed", torch.empty(m, layout.packed_row_bytes(n), dtype=torch.uint8, device=device))
        own_basis = basis is None
        if basis_seed is not None:
            self.draw_basis_from(seed_value(basis_seed), device)
        if own_basis:
            basis = nn.Parameter(torch.empty(layout.basis_shape, dtype=torch.float32, device=device), requires_grad=False)
        elif not isinstance(basis, nn.Parameter):
            raise TypeError(f"basis: is a {type(basis).__name__}, must be an nn.Parameter, float32 {layout.basis_shape}")
        elif tuple(basis.shape) != layout.basis_shape or basis.dtype != torch.float32:
            raise ValueError(f"basis: is {basis.dtype} {tuple(basis.shape)}, must be torch.float32 {layout.basis_shape} for {layout}")
        elif not basis.is_meta and not bool(torch.isfinite(basis).all()):
            raise ValueError(f"basis: has {int((~torch.isfinite(basis)).sum())} values that are not finite, must have none")
        self.register_parameter("basis", basis)
        self.register_parameter("amplitude", None)
        self.register_parameter("log_gain", None)
        self._parameters["gain"] = None
        self.register_parameter("gain", nn.Parameter(torch.empty(m, dtype=torch.float32, device=device), requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(m, dtype=self._dtype, device=device)) if bias else None)
        self._accuracy = "auto"
        self._options: dict[str, Any] = {"layout": str(layout), "in_features": n, "seed": 0}
        if layout.seeded:
            self.register_buffer("seed", torch.zeros((), dtype=torch.int64, device=device))
            self._set_seed(int(torch.randint(0, 2**32, (), generator=generator, device="cpu")) if seed is None else seed_value(seed))
        shapes = layout.residual_shapes(m, n)
        for name in sorted(RESIDUALS, key=lambda name: name not in shapes):  # torch.export counts on the None ones being last
            shape, kind = shapes.get(name, (None, None))
            self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=getattr(torch, kind), device=device))
        self.reset_parameters(generator, basis=own_basis)
        self._hold_codes_for_kernels()

    # ---- making one ---------------------------------------------------------------------------------------------------------

    def reset_parameters(self, generator: torch.Generator | None = None, basis: bool = True) -> None:
        """Draws codes, gain, bias and (unless `basis` is False) the basis anew, in training form the amplitudes too; a residual becomes zero.
        Does nothing to tensors on the meta device."""
        draw_layer(self, generator, basis)

    @classmethod
    def from_linear(cls, nn_linear: nn.Module, layout: str | Layout = "rbe8x2_g8", basis: Tensor | None = None, gain: Tensor | None = None,
                    seed: int = 0) -> RBELinear:
        """Encodes the weight of an nn.Linear or of transformers' Conv1D.

        basis [M, 256, g]: the table to encode with, rounded to fp16-representable values; None trains one on this weight.
        gain [m]: None fits one to every row. The bias is shared with `nn_linear`.
        """
        from .making import layer_from_linear

        return layer_from_linear(cls, nn_linear, layout, basis, gain, seed)

    @classmethod
    def from_codes(cls, codes: Tensor, basis: Tensor, gain: Tensor, bias: Tensor | None = None, *, layout: str | Layout, in_features: int,
                   seed: int | None = None, residual: dict[str, Tensor] | None = None, dtype: torch.dtype | None = None) -> RBELinear:
        """A layer from FORMAT's tensors, each of which is checked.

        codes: int32 words [m, K, M], or uint8 packed [m, row bytes]. basis [M, 256, g] and gain [m], finite, gain positive: kept as given in
        float32, not rounded (save_pretrained writes fp16 where that loses nothing, rbe_torch.finish_training rounds). A float32 parameter
        given as basis is shared, not copied. bias [m] or None. seed: layouts ending in r, 0 .. 2^32 - 1. residual: the tensors of
        Layout.residual_shapes by name. dtype: of `lin.weight`; by default that of the bias, else torch's default.
        """
        from .making import layer_from_codes

        return layer_from_codes(cls, codes, basis, gain, bias, layout, in_features, seed, residual, dtype)

    def draw_basis_from(self, seed: int, device: torch.device | str | None) -> None:
        """Says that the basis is the one that `seed` gives; the table itself is not changed."""
        self._basis_seed = seed
        self.register_buffer("basis_seed", torch.tensor(seed, dtype=torch.int64, device=device))

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with the decoded weight, in the layer's dtype; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self._dtype)
        linear.weight = nn.Parameter(self.weight)
        linear.bias = self.bias
        return linear.train(self.training)

    # ---- what it is ---------------------------------------------------------------------------------------------------------

    @property
    def training_form(self) -> bool:
        """True between convert or prepare_training and finish_training."""
        return self.log_gain is not None

    @property
    def gain(self) -> Tensor:
        """float32 [m]; exp(log_gain) in training form."""
        if self.log_gain is not None:
            return self.log_gain.exp()
        if "gain" not in self._parameters:  # torch.nn.utils.parametrize asks whether it is gone
            raise AttributeError("gain: is not a parameter of this layer")
        return self._parameters["gain"]

    @property
    def packed(self) -> Tensor:
        """The codes as uint8 [m, ceil(K*M*bits/8)], what is saved."""
        held = self._buffers["packed"]
        return torch.ops.rbe.deinterleave(held, self.out_features) if is_interleaved(held) else held

    def _hold_codes_for_kernels(self) -> None:
        """Lays the codes out as the kernels of their device read them."""
        self._buffers["packed"] = for_kernels(self._buffers["packed"], self.out_features, self.layout)

    @property
    def codes(self) -> Tensor:
        """Interchange words, int32 [m, K, M]; in training form with the sign and the rounded amplitude that the forward pass uses."""
        words = torch.ops.rbe.unpack(self.packed, **self._options)
        if self.amplitude is None:
            return words
        amplitude = self.amplitude.detach()
        if hasattr(amplitude, "full_tensor") and not hasattr(words, "full_tensor"):  # FSDP2 shards parameters and not buffers
            amplitude = amplitude.full_tensor()
        return with_amplitude(words, amplitude, self.layout)

    @property
    def weight(self) -> Tensor:
        """Dense reconstruction [m, n] in the layer's dtype, decoded at each call. Read-only: writing into it does not change the layer. In training form
        it is differentiable: some models (Mamba's dt_proj) multiply with it instead of calling the layer."""
        if self.packed is None:  # while rbe_torch.hf loads a model
            return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")
        with torch.set_grad_enabled(self.training_form and torch.is_grad_enabled()):
            return torch.ops.rbe.decode(self.packed, self.basis, self.gain, self.amplitude, self.residual, self.residual_scale,
                                        self.residual_right, self.residual_right_scale, **self._options).to(self._dtype)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttributeError(_WEIGHT_IS_READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, refusing `weight`, which would otherwise end in a KeyError, and in training form `gain`, which nothing would read."""
        if name == "weight":
            raise AttributeError(_WEIGHT_IS_READ_ONLY)
        if name == "gain" and self.training_form:
            raise AttributeError("gain: is exp(log_gain) while the layer is in training form; assign log_gain")
        super().register_parameter(name, param)

    @property
    def dtype(self) -> torch.dtype:
        """Of `lin.weight` and of the bias."""
        return self._dtype

    @property
    def accuracy(self) -> str:
        """Class of the forward product (docs/operators.md): "auto", which is exact for float32 and fast for bfloat16 and float16, "exact" or "fast"."""
        return self._accuracy

    @accuracy.setter
    def accuracy(self, value: str) -> None:
        if value not in ("auto", "exact", "fast"):
            raise ValueError(f"accuracy: is {value!r}, must be 'auto', 'exact' or 'fast'")
        self._accuracy = value

    @property
    def bits_per_weight(self) -> float:
        """Codes, gain and residual, without the basis, which layers may share."""
        m, n = self.out_features, self.in_features
        return 8 * self.layout.bytes(m, n, basis=False) / (m * n)

    def extra_repr(self) -> str:
        with_basis = self.layout.bits_per_weight(self.out_features, self.in_features)
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, layout={self.layout}, "
                f"bits_per_weight={self.bits_per_weight:.3f} ({with_basis:.3f} with the basis)"
                + (", in training form" if self.training_form else ""))

    def problem(self) -> str:
        """What makes the layer's tensors invalid, in one sentence; empty if nothing does. Tensors on the meta device pass."""
        return find_problem(self)

    # ---- running it ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        parameters, buffers = self._parameters, self._buffers
        if self._modules:  # torch.nn.utils.parametrize moves tensors there, and puts properties in their place
            parameters = {name: getattr(self, name) for name in ("basis", "gain", "log_gain", "amplitude", "bias")}
        log_gain = parameters["log_gain"]
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0
        run = _ops.linear if traced else _ops.linear_inference
        amplitude = parameters["amplitude"]
        if amplitude is not None and x.dtype == torch.float64:
            amplitude = amplitude.double()  # the operator wants the dtype of its sums
        return run(x, buffers["packed"], parameters["basis"], parameters["gain"] if log_gain is None else log_gain.exp(), parameters["bias"], amplitude,
                   buffers["residual"], buffers["residual_scale"], buffers["residual_right"], buffers["residual_right_scale"],
                   accuracy=self._accuracy, **self._options)

    def commit_amplitude(self) -> None:
        """Writes the amplitudes of a layer in training form into its packed codes. Saving does so by itself."""
        if self.amplitude is not None and not self.packed.is_meta:
            self.packed = torch.ops.rbe.pack(self.codes, **self._options)

    # ---- nn.Module's own machinery ------------------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> RBELinear:
        bias = self._parameters.get("bias")  # parametrised ones look after themselves

        def keep_format(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or (bias is not None and (tensor is bias or tensor is bias.grad)):
                return moved
            return tensor.to(moved.device)

        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=self._buffers["packed"].device)).dtype
        super()._apply(keep_format, recurse)
        self._hold_codes_for_kernels()
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.layout.residual == "fp8" and self.residual is not None:  # pickle cannot take torch's float8 tensors apart
            state["_buffers"] = {**self._buffers, "residual": self.residual.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.layout.residual == "fp8" and self.residual is not None:
            self._buffers["residual"] = self.residual.view(torch.float8_e4m3fn)

    def _set_seed(self, seed: int) -> None:
        self._options = {**self._options, "seed": seed}
        if not self.seed.is_meta:
            self.seed.fill_(seed)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.commit_amplitude()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_interleaved(self._buffers["packed"]):
            destination[prefix + "packed"] = self.packed
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] |= {"layout": str(self.layout), "in_features": self.in_features}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        refused, own = load_entries(self, own, prefix, local_metadata, missing_keys)
        if refused:
            error_msgs.append(f"{prefix[:-1] or 'the layer'}: {refused}")
            return
        before = self.basis
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        share_basis(self, before, missing_keys)
        if self.layout.seeded and not self.seed.is_meta:
            self._options = {**self._options, "seed": int(self.seed)}
        if self._basis_seed is not None and not self.basis_seed.is_meta:
            self._basis_seed = int(self.basis_seed)
        self._hold_codes_for_kernels()
