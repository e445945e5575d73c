#!/usr/bin/env python3
"""The same products, gradients and codes by the kernels run on the CPU and on a device.

    vectors.py write FILE     with a copy of rbe_torch whose library is librbe_on_host.so; RBE_CUBLASLT names the stand-in
    vectors.py check FILE     on the device

benchmarks/cuda_on_device.sh does both. RBE_EVERY=N takes every Nth layout.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from operator_cases import make_case, random_codes

import rbe_torch  # noqa: F401  registers the operators

LAYOUTS = ["rbe22_g64", "rbe22_g128", "rbe32_g16", "rbe9r_g16", "rbe8x2_g8", "rbe8x3_g8", "rbe16s_g8", "rbe8x2_g8+int8", "rbe22_g16+lr3"]
EVERY = int(os.environ.get("RBE_EVERY", "1"))
ENCODED = ["rbe22_g16", "rbe32_g8", "rbe9r_g16", "rbe8_g8", "rbe8x2_g8", "rbe16s_g8", "rbe22x2_g5"]
# Largest difference over the largest value: the same roundings in another order of sums, and cuBLASLt's.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 4e-3}


def products(device: str) -> dict[str, list[torch.Tensor]]:
    """Output and gradients of every layout, type and number of tokens around the edges of tiles."""
    results = {}
    for layout in LAYOUTS[::EVERY]:
        for dtype in TOLERANCE:
            for tokens in (1, 3, 16, 65):
                with torch.device(device):
                    case = make_case(layout, 70, 150, (tokens,), dtype).require_grad()
                y = case.run()
                got = [y, *torch.autograd.grad(y, [case.x, case.basis, case.gain, case.bias], torch.ones_like(y))]
                results[f"{layout} {dtype} {tokens}"] = [t.detach().cpu() for t in got]
    return results


def codes(device: str) -> dict[str, list[torch.Tensor]]:
    """Words of a weight as encode, encode_calibrated (with a factor, and from codes), pack and unpack give them: the same bit for bit."""
    results = {}
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(70, 150, generator=generator) / 12, torch.randn(400, 150, generator=generator)
    hessian = x.T @ x / 400 + 0.01 * torch.eye(150)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous()
    for layout in ENCODED[::EVERY]:
        case = make_case(layout, 70, 150, ())
        start = random_codes(layout, 70, 150, generator)
        given = [t.to(device) for t in (weight, case.basis, case.gain)]
        moments = [t.to(device) for t in (hessian, factor, start)]
        words = torch.ops.rbe.encode(*given, **case.keywords)
        packed = torch.ops.rbe.pack(words, **case.keywords)
        calibrated = [torch.ops.rbe.encode_calibrated(*given, moments[0], moments[1], **case.keywords, sweeps=1),
                      torch.ops.rbe.encode_calibrated(*given, moments[0], None, moments[2], **case.keywords, sweeps=1)]  # fmt: skip
        results[f"codes {layout}"] = [t.cpu() for t in (words, packed, torch.ops.rbe.unpack(packed, **case.keywords), *calibrated)]
    return results


def main() -> int:
    verb, path = sys.argv[1:]
    if verb == "write":
        torch.save(products("cpu") | codes("cpu"), path)
        return 0
    worst, failed = 0.0, 0
    for name, want in torch.load(path).items():
        got = results_of(name)
        if name.startswith("codes"):
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                if not torch.equal(a, b):
                    failed += 1
                    print(f"{name}: result {i} has {int((a != b).sum())} of {b.numel()} other codes")
            continue
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
            limit = TOLERANCE[want[0].dtype]
            worst = max(worst, error / limit)
            if not error <= limit:
                failed += 1
                print(f"{name}: result {i} differs by {error:.2e}, allowed {limit:.0e}")
    print(f"largest difference: {worst:.2f} of what is allowed")
    return 1 if failed else 0


_made: dict[str, list[torch.Tensor]] = {}


def results_of(name: str) -> list[torch.Tensor]:
    if not _made:
        _made.update(products("cuda") | codes("cuda"))
    return _made[name]


if __name__ == "__main__":
    sys.exit(main())
