"""How fast weights become codes: the search of all 256 vectors and all scales, and the calibrated search, against torch and the machine's rate.

The bound is the multiply-adds of the search at the rate of a large float32 product: 256 a weight for one stage; for M stages at least
256 (1 + 8 (M - 1) + M), a beam of 8 and one round of every stage again. torch's contestant is the same search of one stage written with addmm and
argmin, in pieces that stay in cache; it chooses no scales. Codes are verified first: for one stage against that search in float64, for several by their error.
"""

from __future__ import annotations

import harness
import torch

from rbe_torch import Layout

BEAM = 8
CASES = ["rbe8_g8", "rbe8_g16", "rbe16s_g8", "rbe22_g16", "rbe22_g64", "rbe4r_g9", "rbe8x2_g8", "rbe8x4_g8", "rbe22x2_g32"]
CALIBRATED = ["rbe8_g8", "rbe8x2_g8", "rbe8x4_g8", "rbe16s_g8"]
PIECE = 4096  # groups whose 256 scores stay in L2


def search(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """idx [groups] of the nearest vector: least |b|^2 / 2 - <v, b>."""
    half = 0.5 * basis.square().sum(1)
    return torch.cat([torch.addmm(half, part, basis.t(), alpha=-1).argmin(1) for part in weight.split(PIECE)])


def searches(layout: Layout) -> int:
    """Searches of 256 vectors a group, at least."""
    return 1 if layout.stages == 1 else 1 + BEAM * (layout.stages - 1) + layout.stages


def problem(layout: Layout, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, cols)
    basis = torch.randn(layout.stages, 256, layout.group) * (0.7 ** torch.arange(layout.stages))[:, None, None]
    return weight, basis, torch.ones(rows)


def error_of(codes: torch.Tensor, weight: torch.Tensor, basis: torch.Tensor, gain: torch.Tensor, name: str, cols: int) -> float:
    decoded = torch.ops.rbe.decode(codes, basis, gain, layout=name, in_features=cols)
    return float((decoded - weight).norm() / weight.norm())


def plain(name: str, rows: int, cols: int, seconds: float, machine: harness.Machine) -> dict[str, object]:
    layout = Layout.parse(name)
    weight, basis, gain = problem(layout, rows, cols)
    encode = lambda: torch.ops.rbe.encode(weight, basis, gain, layout=name, in_features=cols)
    codes = encode()
    error = error_of(codes, weight, basis, gain, name, cols)
    contestants = {"rbe": [encode]}
    if name.startswith("rbe8_"):
        groups = weight.reshape(-1, layout.group)
        truth = search(groups.double(), basis[0].double())
        wrong = int((truth != (codes.flatten() >> 10 & 255)).sum())  # ties aside, the float64 search must agree
        if wrong > truth.numel() // 10000:
            raise SystemExit(f"{name}: {wrong} of {truth.numel()} idx are not the nearest")
        contestants["torch"] = [lambda: search(groups, basis[0])]
    elif not error < 1:
        raise SystemExit(f"{name}: relative error {error}")
    times = harness.race(contestants, seconds)
    share = rows * cols * 256 * searches(layout) / times["rbe"].minimum / machine.fma_per_second
    rival = times.get("torch")
    return {
        "layout": name,
        "search": "plain",
        "size": f"{rows}x{cols}",
        "ms": round(1e3 * times["rbe"].minimum, 2),
        "M weights/s": round(rows * cols / times["rbe"].minimum / 1e6, 2),
        "of FMA rate": "idx from a seed" if layout.seeded else round(share, 3),
        "over torch": round(rival.minimum / times["rbe"].minimum, 2) if rival else "",
        "error": round(error, 4),
    }


def calibrated(name: str, rows: int, cols: int, seconds: float) -> dict[str, object]:
    layout = Layout.parse(name)
    weight, basis, gain = problem(layout, rows, cols)
    inputs = torch.randn(2 * cols, cols, dtype=torch.float64) * torch.rand(cols, dtype=torch.float64).add(0.1)
    hessian = inputs.t() @ inputs / len(inputs) + 0.01 * torch.eye(cols, dtype=torch.float64)
    factor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).float()
    hessian = hessian.float()
    encode = lambda: torch.ops.rbe.encode_calibrated(weight, basis, gain, hessian, factor, layout=name, in_features=cols, sweeps=2)
    codes = encode()
    kept = [
        (torch.ops.rbe.decode(c, basis, gain, layout=name, in_features=cols) - weight)
        for c in (codes, torch.ops.rbe.encode(weight, basis, gain, layout=name, in_features=cols))
    ]
    loss = [float(left.mm(hessian).mul_(left).sum()) for left in kept]
    if not loss[0] < loss[1]:
        raise SystemExit(f"{name}: calibrated codes lose more than plain ones")
    time = harness.race({"rbe": [encode]}, seconds)["rbe"]
    return {
        "layout": name,
        "search": "calibrated, 2 sweeps",
        "size": f"{rows}x{cols}",
        "ms": round(1e3 * time.minimum, 2),
        "M weights/s": round(rows * cols / time.minimum / 1e6, 2),
        "of FMA rate": "",
        "over torch": "",
        "error": round(error_of(codes, weight, basis, gain, name, cols), 4),
    }


def main() -> int:
    parser = harness.parser(__doc__.splitlines()[0])
    arguments = parser.parse_args()
    rows, cols = (4096, 4096) if arguments.full else (1024, 1152)
    cases = {
        name: lambda machine, name=name: plain(name, rows, cols, arguments.seconds, machine) for name in CASES
    }  # fmt: skip
    for name in CALIBRATED:
        for width in (384, 1536):
            cases[f"{name} calibrated {width}"] = lambda machine, name=name, width=width: calibrated(name, 384, width, arguments.seconds)
    harness.run_cases(arguments, "encode", cases)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
