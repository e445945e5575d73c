"""Other ways to store a weight in few bits, for benchmarks/quality.py: each takes a weight [m, n] and gives what it decodes to and the
bits a weight it takes.

round, gptq   b-bit integers with a scale and a zero point (fp16, b bits) for every 64 weights of a row; the range is the one of 20 shrinks
              of min..max that loses least. gptq feeds errors forward under X^T X (Frantar et al. 2022), column after column
nf4           the 16 quantiles of a normal distribution, a fp16 scale for every 64 weights (Dettmers et al. 2023)
hqq           the package hqq, its optimised zero points, 64 weights a group
quanto        the package optimum-quanto, its own groups (128)
aqlm          the quantiser of AQLM's repository (Egiazarian et al. 2024): additive code-books of a layer, 8 bits for 8 weights each, codes
              by beam search under X^T X in turn with gradient steps on code-books and scales

Nothing of this belongs to rbe_torch. hqq and optimum-quanto: pip install --no-deps --target DIR hqq optimum-quanto termcolor ninja;
PYTHONPATH=DIR. The package aqlm can only run what was quantised: aqlm needs a clone of github.com/Vahe1994/AQLM (e79a896) in PYTHONPATH.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

GROUP = 64
NF4 = torch.tensor([-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152,
                    0.4407098, 0.5626170, 0.7229568, 1.0])  # fmt: skip
_SHRINKS = 20


def grid_of(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1] of groups [..., 64]: of 20 shrinks of the range min..max, the one with the least squared error."""
    top = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, float("inf"))
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for step in range(_SHRINKS):
        shrink = 1 - step / (1.6 * _SHRINKS)
        tried = ((high - low) * shrink / top).clamp(min=1e-8).half().float().clamp(min=1e-7)
        point = (-low * shrink / tried).round().clamp(0, top)
        error = (on_grid(groups, tried, point, bits) - groups).square().sum(-1, keepdim=True)
        better = error < best
        best, scale, zero = torch.where(better, error, best), torch.where(better, tried, scale), torch.where(better, point, zero)
    return scale, zero


def on_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scale * ((values / scale).round().add(zero).clamp(0, 2**bits - 1) - zero)


def integer_bits(bits: int) -> float:
    return bits + (16 + bits) / GROUP


def rounded(weight: Tensor, bits: int) -> Tensor:
    groups = weight.reshape(-1, GROUP)
    return on_grid(groups, *grid_of(groups, bits), bits).view_as(weight)


def gptq(weight: Tensor, factor: Tensor, bits: int) -> Tensor:
    """weight T [m, n], factor V upper triangular with H = V V^T: column j takes (T_j + what the columns before it left, in units of V_jj)
    to the grid."""
    m, n = weight.shape
    decoded, pull = torch.empty_like(weight), torch.zeros_like(weight)
    for first in range(0, n, GROUP):
        last = min(first + GROUP, n)
        block = factor[first:last, first:last]
        target = weight[:, first:last] + pull[:, first:last] / block.diagonal()
        scale, zero = grid_of(target, bits)
        error, here = torch.empty(m, last - first), pull[:, first:last].clone()
        for j in range(last - first):
            column = weight[:, first + j] + here[:, j] / block[j, j]
            decoded[:, first + j] = on_grid(column, scale[:, 0], zero[:, 0], bits)
            error[:, j] = weight[:, first + j] - decoded[:, first + j]
            here[:, j + 1 :] += error[:, j : j + 1] * block[j, j + 1 :]
        pull[:, last:] += error @ factor[first:last, last:]
    return decoded


def gptq_published(weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """gptq under raw X^T X [n, n] with damping 0.01."""
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    return gptq(weight, torch.linalg.cholesky(damped.double().flip(0, 1)).flip(0, 1).float(), bits)


def nf4(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True).half().float().clamp(min=1e-8)
    nearest = torch.bucketize(groups / scale, (NF4[1:] + NF4[:-1]) / 2)
    return (NF4[nearest] * scale).view_as(weight)


def hqq(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """The package's quantiser; scale and zero point counted as fp16 each."""
    from hqq.core.quantize import Quantizer

    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=GROUP, axis=1, optimize=True, compute_dtype=torch.float32, device="cpu"
    )
    return Quantizer.dequantize(packed, meta).float().view_as(weight), bits + 32 / GROUP


def quanto(weight: Tensor, bits: int) -> tuple[Tensor, float]:
    """optimum-quanto's quantiser for linear weights; its scale and shift counted as fp16 each, at its group of 128."""
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    scale, shift = MaxOptimizer()(weight, qtype={2: qint2, 4: qint4}[bits], axis=0, group_size=128)
    made = quantize_weight(weight, {2: qint2, 4: qint4}[bits], 0, scale, shift, 128)
    return made.dequantize().float(), bits + 32 / 128


def aqlm(weight: Tensor, hessian: Tensor, codebooks: int, epochs: int) -> tuple[Tensor, float]:
    """AQEngine.quantize under raw X^T X, with the settings of AQLM's readme (stop below 1 % gain an epoch, rate 1e-4, 100 steps an epoch,
    beam of 1), at most `epochs`; code-books are counted, one set a layer, as AQLM stores them."""
    from aq_engine import AQEngine

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    engine = AQEngine(layer)
    engine.XTX = hessian / hessian.diagonal().mean()  # float32: wide layers take half as long as in its float64
    settings = argparse.Namespace(
        devices=[torch.device("cpu")], out_group_size=1, in_group_size=8, num_codebooks=codebooks, nbits_per_codebook=8,
        codebook_value_nbits=16, codebook_value_num_groups=1, scale_nbits=0, init_max_iter=100, init_max_points_per_centroid=None,
        lr=1e-4, max_epochs=epochs, steps_per_epoch=100, relative_mse_tolerance=0.01, print_frequency=1000, beam_size=1,
    )  # fmt: skip
    made = engine.quantize(args=settings, verbose=False)
    return made().detach(), made.estimate_nbits_per_parameter()
