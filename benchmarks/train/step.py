"""One whole training step of a 4096 x 4096 layer at 512 tokens: forward, backward and AdamW, against nn.Linear with the same optimiser.

Both in float32 (the exact class of products), and both under bfloat16 autocast (the fast class). The two take turns in one process. Also: bytes of parameters, gradients and optimiser state, counted from the tensors; activations that autograd keeps; and what
the step adds to the process's peak memory.

    python benchmarks/train/step.py [--threads 1] [--out out]
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness  # noqa: E402

import rbe_torch  # noqa: E402

SIZE, TOKENS = 4096, 512
LAYOUTS = ["rbe22_g64", "rbe22_g32", "rbe22_g128", "rbe4r_g16", "rbe9r_g64"]


def optimiser_of(layer: nn.Module) -> torch.optim.Optimizer:
    groups = rbe_torch.param_groups(layer) if isinstance(layer, rbe_torch.RBELinear) else layer.parameters()
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def step(layer: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, dy: Tensor) -> None:
    optimiser.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dy.dtype == torch.bfloat16):
        y = layer(x)
    y.backward(dy)
    optimiser.step()


def state_bytes(layer: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Parameters, codes, gradients and optimiser state."""
    tensors = [*layer.parameters(), *layer.buffers(), *(p.grad for p in layer.parameters() if p.grad is not None)]
    tensors += [value for entry in optimiser.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps of a forward pass for its backward, without the layer's own tensors."""
    own, kept = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def run_case(text: str, basis: str, dtype: torch.dtype, machine: harness.Machine, seconds: float) -> dict[str, object]:
    dense = nn.Linear(SIZE, SIZE)
    model = nn.Sequential(nn.Linear(SIZE, SIZE))
    rbe_torch.convert(model, text, basis=basis)
    layers = {"dense": dense, "rbe": model[0]}
    optimisers = {name: optimiser_of(layer) for name, layer in layers.items()}
    x, dy = torch.randn(TOKENS, SIZE, requires_grad=True), (torch.randn(TOKENS, SIZE) / TOKENS).to(dtype)
    timings = harness.race({name: [functools.partial(step, layers[name], optimisers[name], x, dy)] for name in layers}, seconds)
    size = {name: state_bytes(layers[name], optimisers[name]) for name in layers}
    return {
        "layout": text, "basis": basis, "dtype": str(dtype).removeprefix("torch."), "dense ms": f"{timings['dense'].minimum * 1e3:.1f}", "rbe ms": f"{timings['rbe'].minimum * 1e3:.1f}",
        "speed-up": f"{timings['dense'].minimum / timings['rbe'].minimum:.2f}", "by median": f"{timings['dense'].median / timings['rbe'].median:.2f}",
        "dense state MB": f"{size['dense'] / 1e6:.1f}", "rbe state MB": f"{size['rbe'] / 1e6:.2f}", "state": f"1/{size['dense'] / size['rbe']:.1f}",
        "activations MB, dense": f"{kept_bytes(dense, x) / 1e6:.1f}", "activations MB, rbe": f"{kept_bytes(model[0], x) / 1e6:.1f}",
    }  # fmt: skip


def main() -> None:
    arguments = harness.parser(__doc__.splitlines()[0]).parse_args()
    bases = {text: ("trained", "seeded") if text == "rbe22_g64" else ("seeded" if rbe_torch.Layout.parse(text).seeded else "trained",) for text in LAYOUTS}
    cases = {f"{text} {basis} {dtype}": functools.partial(run_case, text, basis, dtype, seconds=max(arguments.seconds, 10.0))
             for dtype in (torch.float32, torch.bfloat16) for text in LAYOUTS for basis in bases[text]}
    harness.run_cases(arguments, "train_step", cases)


if __name__ == "__main__":
    main()
