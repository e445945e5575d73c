"""Latent training: a dense weight is trained and encoded again and again; the forward pass uses what its codes give (method "latent").

    forward     y = x (L + E)^T + bias      L the latent weight [m, n], E = decoded(codes of L) - L when it was last encoded
    gradient    dL/dL = dL/dW: the encoder is passed straight through

At the step of an encoding L + E is the decoded weight itself; until the next one it moves with L while the error of the codes stays what it
was. This is the format's inventors' Algorithm 1 with interval = 1. It needs the memory of dense training and more, and in every setting
measured it was worse than direct training (docs/training.md); what it can do and direct training cannot is choose idx and curve anew at
every encoding.

Terms of the loss: `latent_loss`. Fewer amplitude bits in stages: `set_amplitude_bits`. Choice of idx by Gumbel-softmax: `temperature`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codes import with_amplitude
from .encode import encode_layer
from .linear import RBELinear

_CHUNK = 1 << 24  # similarities [groups, 256] at a time


class LatentLinear(RBELinear):
    """An RBELinear in latent training form; made by prepare_training(model, method="latent"), undone by finish_training.

    latent: float32 parameter [m, n]. error: float32 buffer [m, n]. age: int64 buffer [], training passes so far. interval, amplitude_bits,
    temperature: ints and a float, see start_latent. In eval mode the forward pass uses the codes that finish_training would store.
    """

    latent: Tensor
    error: Tensor
    age: Tensor
    interval: int
    amplitude_bits: int
    temperature: float

    @property
    def training_form(self) -> bool:
        return True

    @property
    def weight(self) -> Tensor:
        """What the codes of the latent weight give, [m, n] in the layer's dtype; its gradient goes to the latent weight."""
        return (self.decoded(noisy=False) + (self.latent - self.latent.detach())).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                if int(self.age) % self.interval == 0:
                    self.error.copy_(self.decoded(noisy=True) - self.latent)
                self.age += 1
            weight = self.latent + self.error
        else:
            weight = self.decoded(noisy=False)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @torch.no_grad()
    def decoded(self, noisy: bool) -> Tensor:
        """float32 [m, n]: the weight that the codes of `latent` give; they go into `packed`, their gain into `gain`."""
        parts = encode_layer(self.latent, self.layout, self.basis, None, self._options["seed"], round_basis=False)
        codes = parts.codes
        if noisy and self.temperature > 0:
            codes = drawn_codes(self.latent, self.basis, parts.gain, self.layout, self.temperature)
        if self.amplitude_bits < 8:
            codes = coarser(codes, self.amplitude_bits, self)
        self.packed = torch.ops.rbe.pack(codes, **self._options)
        self._parameters["gain"].copy_(parts.gain)
        for name, tensor in parts.residual.items():
            self._buffers[name].copy_(tensor)
        return torch.ops.rbe.decode(self.packed, self.basis, parts.gain, None, self.residual, self.residual_scale, self.residual_right,
                                    self.residual_right_scale, **self._options)


def start_latent(layers: list[RBELinear], basis: str | None, interval: int = 1, temperature: float = 0.0) -> None:
    """Puts layers in latent training form, the latent weight being what their codes give now.

    interval: training passes from one encoding to the next. temperature: of the Gumbel noise added to the similarities when idx is chosen,
    in units of a group's squared norm; 0 takes the nearest. ValueError: basis "trained" (the encoder has no gradient in it), a layer in
    direct training form, on the meta device, or a temperature for a layout whose code is not one scaled vector.
    """
    if basis == "trained":
        raise ValueError("basis: is 'trained', but latent training passes its gradient to the latent weight alone; use method='direct' to "
                         "train the basis")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"interval: is {interval!r}, must be an int of at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: is {temperature}, must be at least 0 and finite")
    for layer in layers:
        if isinstance(layer, LatentLinear):
            continue
        if layer.training_form:
            raise ValueError("model: has a layer in direct training form; call rbe_torch.finish_training(model) first")
        if layer.packed.is_meta:
            raise ValueError("model: has a layer on the meta device, which has no weight to start from")
        if temperature > 0 and (layer.layout.stages > 1 or layer.layout.fields != "rbe22"):
            raise ValueError(f"temperature: is {temperature}, but idx can be drawn for rbe22 with one stage alone, not for {layer.layout}")
    for layer in layers:
        if isinstance(layer, LatentLinear):
            continue
        dense = layer.weight.float()
        layer.__class__ = LatentLinear
        layer.latent = nn.Parameter(dense)
        layer.basis.requires_grad_(False)
        layer.register_buffer("error", torch.zeros_like(dense))
        layer.register_buffer("age", torch.zeros((), dtype=torch.int64, device=dense.device))
        layer.interval, layer.amplitude_bits, layer.temperature = interval, 8, float(temperature)


def finish_latent(layers: list[RBELinear]) -> None:
    """Encodes every latent weight a last time and makes plain RBELinears of the layers. ValueError, before anything is changed: a value
    that is not finite."""
    for layer in layers:
        if not bool(torch.isfinite(layer.latent).all()):
            raise ValueError(f"latent: has {int((~torch.isfinite(layer.latent)).sum())} values that are not finite, must have none")
    for layer in layers:
        layer.decoded(noisy=False)
        layer._hold_codes_for_kernels()
        del layer._parameters["latent"], layer._buffers["error"], layer._buffers["age"]
        del layer.interval, layer.amplitude_bits, layer.temperature
        layer.__class__ = RBELinear


def set_amplitude_bits(model: nn.Module, bits: int) -> None:
    """Codes of layers in latent training form keep the highest `bits` of their 8 amplitude bits from the next encoding on: 8, then 6, then
    4 in stages."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits: is {bits!r}, must be 1 to 8")
    layers = [layer for layer in model.modules() if isinstance(layer, LatentLinear)]
    if not layers or not all(layer.layout.has_amplitude for layer in layers):
        raise ValueError("model: must have layers in latent training form, all in a layout whose codes have an amplitude")
    for layer in layers:
        layer.amplitude_bits = bits


def latent_loss(model: nn.Module, reconstruction: float = 1e-3, sparsity: float = 0.0) -> Tensor:
    """What latent training adds to the task's loss, a scalar: a mean over the weights of all layers in latent training form.

    reconstruction * (L - decoded)^2 / (mean square of L)  +  sparsity * |L - decoded| / (mean |L|), with the decoded weight of the last
    encoding held fixed.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LatentLinear)]
    if not layers:
        raise ValueError("model: has no layer in latent training form; call rbe_torch.prepare_training(model, method='latent') first")
    total, count = layers[0].latent.new_zeros(()), sum(layer.latent.numel() for layer in layers)
    for layer in layers:
        latent, error = layer.latent, layer.error
        rest = latent - (latent + error).detach()
        part = rest.square().mean() / latent.detach().square().mean().clamp(min=1e-20) * reconstruction
        if sparsity:
            part = part + rest.abs().mean() / latent.detach().abs().mean().clamp(min=1e-20) * sparsity
        total = total + part * (latent.numel() / count)
    return total


def coarser(codes: Tensor, bits: int, layer: RBELinear) -> Tensor:
    """The words with amp rounded to its highest `bits` bits and amp_fine cleared, as far as the layout lets them."""
    step = 1 << 8 - bits
    words = codes.to(torch.int64) & 0xFFFFFFFF
    amp = (((words & 255) + step // 2) // step * step).clamp(max=256 - step)
    words = (words & 0x003FFF00) | amp
    return words.to(torch.int32)


def drawn_codes(weight: Tensor, basis: Tensor, gain: Tensor, layout, temperature: float) -> Tensor:
    """int32 words [m, K, 1]: idx drawn with probability softmax(similarity / temperature), similarity = (<w, b>^2 / |b|^2) / |w|^2, by the
    Gumbel maximum; the scale is the projection on the vector drawn, on the curve exp(r) - 1.
    """
    m, n = weight.shape
    g, table = layout.group, basis[0]
    groups = F.pad(weight / gain[:, None], (0, layout.groups(n) * g - n)).view(-1, g)
    square = table.square().sum(1).clamp(min=1e-20)
    words = []
    for part in groups.split(max(1, _CHUNK // 256)):
        along = part @ table.t()
        similarity = along.square() / square / part.square().sum(1, keepdim=True).clamp(min=1e-20)
        noise = -torch.empty_like(similarity).exponential_().log()
        idx = (similarity / temperature + noise).argmax(1)
        scale = (along.gather(1, idx[:, None])[:, 0] / square[idx])
        amplitude = scale.sign() * scale.abs().log1p() / 2
        words.append(with_amplitude((idx << 10 | 7 << 18).to(torch.int32), amplitude, layout))
    return torch.cat(words).view(m, -1, 1)
