"""One linear layer in rbe_torch and in its peers, side by side in one process, by size and tokens: milliseconds, and the speed over dense float32.

Peers are timed where they can be imported; the others are named with the reason. They are no dependency of the package: install them beside it in an
environment of this benchmark's own (`make bench-peers`). Each is checked against the weight that it holds before it is timed: what is compared here is speed
at a number of bits, benchmarks/quality.py compares what the bits hold. The small layer is warm for all; for the large one the caches are flushed
before every call of up to 16 tokens.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Callable

import harness
import torch
from torch import nn

from rbe_torch import Layout, RBELinear

SIZES = [(768, 1024), (4096, 4096)]
TOKENS = [1, 4, 32, 512]
COLD_TOKENS, LARGE = 16, 16 << 20  # bytes of the dense weight
ERROR = 0.7  # over the root mean square of dense outputs: two bits of a random weight; a wrong kernel errs by 1 and more

Module = Callable[[torch.Tensor], torch.Tensor]


class Packed(nn.Module):
    """A weight as the tensors that one of torch's own operators takes, with bfloat16 activations."""

    def __init__(self, operator: Callable[..., torch.Tensor], *tensors: torch.Tensor, arguments: tuple = ()) -> None:
        super().__init__()
        self.operator, self.arguments = operator, arguments
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"tensor{index}", tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = self._buffers.values()
        return self.operator(x.bfloat16(), first, *self.arguments, *rest).float()


def dynamic_int8(linear: nn.Linear) -> Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)


def int8_weight_only(linear: nn.Linear) -> Module:
    scale = linear.weight.detach().abs().amax(1) / 127
    rounded = (linear.weight.detach() / scale[:, None]).round().to(torch.int8)
    return Packed(torch.ops.aten._weight_int8pack_mm, rounded, scale.bfloat16())


def int4_weight_only(linear: nn.Linear, group: int = 32) -> Module:
    m, n = linear.weight.shape
    groups = linear.weight.detach().reshape(m, n // group, group)
    scale = groups.abs().amax(2) / 7
    rounded = ((groups / scale[..., None]).round() + 8).clamp(0, 15).to(torch.int32).reshape(m, n)
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous().bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded, 1)
    return Packed(torch.ops.aten._weight_int4pack_mm_for_cpu, packed, scale_and_zero, arguments=(group,))


def aqlm_2x8(linear: nn.Linear) -> Module:
    aqlm = importlib.import_module("aqlm")
    m, n = linear.weight.shape
    layer = aqlm.QuantizedLinear(n, m, 8, 1, 2, 8, bias=False, dtype=torch.float32)
    for tensor in layer.parameters():
        tensor.requires_grad_(False)
        tensor.copy_(torch.randint(-128, 128, tensor.shape).to(tensor.dtype) if not tensor.is_floating_point() else torch.randn(tensor.shape) / n**0.5)
    return layer


def bitsandbytes_nf4(linear: nn.Linear) -> Module:
    layer = importlib.import_module("bitsandbytes").nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def hqq_4bit(linear: nn.Linear) -> Module:
    quantize = importlib.import_module("hqq.core.quantize")
    return quantize.HQQLinear(copy.deepcopy(linear), quantize.BaseQuantizeConfig(nbits=4, group_size=64, axis=1), compute_dtype=torch.float32, device="cpu")


def quanto_qint4(linear: nn.Linear) -> Module:
    quanto = importlib.import_module("optimum.quanto")
    layer = quanto.QLinear.from_module(linear, weights=quanto.qint4)
    layer.freeze()
    return layer


def torchao_int8(linear: nn.Linear) -> Module:
    quantization = importlib.import_module("torchao.quantization")
    model = nn.Sequential(copy.deepcopy(linear))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def rbe(linear: nn.Linear, layout: str, accuracy: str) -> Module:
    layer = RBELinear(linear.in_features, linear.out_features, bias=False, layout=layout, seed=0)
    layer.accuracy = accuracy
    return layer


# name -> (bits a weight, how it is made)
CONTESTANTS: dict[str, tuple[float, Callable[[nn.Linear], Module]]] = {
    "dense float32": (32, lambda linear: linear),
    "dense bfloat16": (16, lambda linear: Packed(torch.mm, linear.weight.detach().bfloat16().T)),
    "torch dynamic int8": (8, dynamic_int8),
    "torch int8 weight only, bf16": (8, int8_weight_only),
    "torchao int8 weight only": (8, torchao_int8),
    "torch int4 weight only, bf16": (4.5, int4_weight_only),
    "bitsandbytes nf4": (4.5, bitsandbytes_nf4),
    "hqq 4 bit g64": (4.5, hqq_4bit),
    "quanto qint4": (4.25, quanto_qint4),
    "aqlm 2x8": (2, aqlm_2x8),
    **{f"{layout} {accuracy}": (Layout.parse(layout).bits * Layout.parse(layout).stages / Layout.parse(layout).group,
                                functools.partial(rbe, layout=layout, accuracy=accuracy))
       for layout, accuracy in [("rbe8x4_g8", "exact"), ("rbe8x4_g8", "fast"), ("rbe8x2_g8", "exact"), ("rbe8x2_g8", "fast"), ("rbe22_g64", "exact")]},
}  # fmt: skip


def check(name: str, module: Module, linear: nn.Linear, x: torch.Tensor) -> None:
    """Against the weight that it holds: the layer's own for what quantises it, else what the contestant itself decodes to."""
    y = module(x)
    assert y.shape == (x.shape[0], linear.out_features) and bool(torch.isfinite(y).all()), name
    if name.startswith("aqlm"):  # holds random codes and has no decoded form to compare with
        return
    weight = module.weight if isinstance(module, RBELinear) else linear.weight
    want = x @ weight.detach().float().T
    error = ((y - want).square().mean() / want.square().mean()).sqrt().item()
    assert error < (0.02 if isinstance(module, RBELinear) else ERROR), f"{name}: error {error}"


def run_case(m: int, n: int, tokens: int, machine: harness.Machine, seconds: float) -> list[dict[str, object]]:
    linear, x = nn.Linear(n, m, bias=False), torch.randn(tokens, n)
    calls: dict[str, list[Callable[[], object]]] = {}
    missing = {}
    for name, (_, make) in CONTESTANTS.items():
        try:
            module = make(linear)
        except ImportError as error:
            missing[name] = str(error).splitlines()[0]
            continue
        torch.set_num_threads(machine.threads)  # some peers change it as they are imported
        check(name, module, linear, x)
        calls[name] = [lambda module=module: module(x)]
    with torch.no_grad():
        timings = harness.race(calls, seconds, flush=tokens <= COLD_TOKENS and 4 * m * n > LARGE)
    dense = timings["dense float32"]
    rows = [{"size": f"{m}x{n}", "tokens": tokens, "layer": name, "bits": f"{CONTESTANTS[name][0]:g}", "ms": f"{t.minimum * 1e3:.3f}",
             "ms median": f"{t.median * 1e3:.3f}", "over dense": f"{dense.minimum / t.minimum:.2f}", "by median": f"{dense.median / t.median:.2f}"}
            for name, t in timings.items()]  # fmt: skip
    return rows + [{"size": f"{m}x{n}", "tokens": tokens, "layer": name, "ms": f"not installed: {reason}"} for name, reason in missing.items()]


def main() -> None:
    warnings.filterwarnings("ignore")  # what peers say of themselves
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    cases = {f"{m}x{n} {tokens}": functools.partial(run_case, m, n, tokens, seconds=arguments.seconds) for m, n in SIZES for tokens in TOKENS}
    with torch.no_grad():
        harness.run_cases(arguments, "peers", cases)


if __name__ == "__main__":
    main()
