"""Encoding one weight matrix with a given basis (or one trained on it): gain per row, codes, and the residual that the codes leave over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .codebook import cannot_encode, fit_basis
from .layout import Layout
from .outliers import row_size

GAIN_MIN, GAIN_MAX = 2.0**-24, 65504.0  # positive fp16
_LARGEST_SCALE = 6.0  # codes reach exp(2) - 1 = 6.39; a little room is left
_PROBED_ROWS = 64
_MUCH_BETTER = 0.9  # of the squared error
_LARGER_GAINS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 14.0)  # times the root mean square
_SOLVED = 1 << 22  # numbers of the blocks solved at once


@dataclass
class EncodedLayer:
    """codes int32 [m, K, M], basis float32 [M, 256, g], gain float32 [m], residual tensors by name (Layout.residual_shapes)."""

    codes: Tensor
    basis: Tensor
    gain: Tensor
    residual: dict[str, Tensor] = field(default_factory=dict)


def encode_layer(weight: Tensor, layout: Layout, basis: Tensor | None = None, gain: Tensor | None = None, seed: int = 0,
                 round_basis: bool = True) -> EncodedLayer:
    """Encodes weight [m, n] (finite, any float dtype).

    basis None: trained on this weight. gain None: fitted to each row. Both are rounded to what fp16 holds; `round_basis=False` takes the basis as
    it is. ValueError or TypeError names what is wrong.
    """
    problem = cannot_encode(weight)
    if problem:
        raise ValueError(f"weight: {problem}")
    weight = weight.detach().to(torch.float32).contiguous()
    if basis is None:
        basis = fit_basis([weight], layout, seed=seed)
    if not isinstance(basis, Tensor) or not basis.is_floating_point():
        raise TypeError(f"basis: is a {basis.dtype if isinstance(basis, Tensor) else type(basis).__name__}, must be a floating-point tensor")
    if tuple(basis.shape) != layout.basis_shape:
        raise ValueError(f"basis: has shape {tuple(basis.shape)}, must be {layout.basis_shape} for {layout}")
    shared = basis
    basis = basis.detach().to(weight.device, torch.float32)
    basis = fp16_values("basis", basis) if round_basis else basis
    options = {"layout": str(layout), "in_features": weight.shape[1], "seed": seed if layout.seeded else 0}
    if gain is None:
        fit = _fit_gain_to_largest if layout.residual == "int8" else _fit_gain
        gain, codes = fit(weight, basis, layout, options)
    else:
        if tuple(gain.shape) != (weight.shape[0],):
            raise ValueError(f"gain: has shape {tuple(gain.shape)}, must be {(weight.shape[0],)}")
        wrong = ~(torch.isfinite(gain) & (gain > 0))
        if bool(wrong.any()):
            raise ValueError(f"gain: has {int(wrong.sum())} values that are not finite and positive, the first in row {int(wrong.nonzero()[0])}")
        gain = fp16_values("gain", gain.detach().to(weight.device, torch.float32))
        codes = torch.ops.rbe.encode(weight, basis, gain, **options)
    residual = {}
    if layout.residual is not None:
        plain = {**options, "layout": str(layout).partition("+")[0]}
        residual = fit_residual(weight - torch.ops.rbe.decode(codes, basis, gain, **plain), layout)
    same = isinstance(shared, torch.nn.Parameter) and shared.dtype == torch.float32 and torch.equal(shared.detach().to(basis.device), basis)
    return EncodedLayer(codes, shared if same and shared.device == basis.device else basis, gain, residual)


def fp16_values(name: str, tensor: Tensor) -> Tensor:
    """The float32 tensor rounded to values that fp16 holds; ValueError where one is too large."""
    rounded = tensor.detach().half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"{name}: holds {float(tensor.detach().abs().max()):.3g}, must be finite and at most 65504, which is all that fp16 holds")
    return rounded


def fp16_gain(gain: Tensor) -> Tensor:
    """The gain rounded to the nearest positive value that fp16 holds, float32."""
    return gain.clamp(GAIN_MIN, GAIN_MAX).half().float()


def _fit_gain(weight: Tensor, basis: Tensor, layout: Layout, options: dict) -> tuple[Tensor, Tensor]:
    """(gain, codes): each row is divided by its root mean square, encoded, and where the codes have no scale of their own gets the gain that fits them
    best. The rows are not encoded again with that gain: in rows with a few large weights it grows towards those and the rest gets coarser, which
    lowers the squared error and still cost MiniLM 0.03-0.07 in cosine to its dense embeddings.
    """
    gain = start_gain(weight, basis, layout, options)
    if layout.has_amplitude:
        return gain, torch.ops.rbe.encode(weight, basis, gain, **options)
    return _encode_rows(weight, basis, gain, options)[:2]


def _fit_gain_to_largest(weight: Tensor, basis: Tensor, layout: Layout, options: dict) -> tuple[Tensor, Tensor]:
    """(gain, codes) that leave the smallest largest rest in each row, which is what sets the step of an int8 residual: in rows with a few large weights a
    gain of several times the root mean square lets the codes reach those."""
    plain = {**options, "layout": str(layout).partition("+")[0]}
    gain, codes = _fit_gain(weight, basis, layout, options)
    spread = weight.square().mean(1).sqrt() / row_size(weight).clamp(min=1e-30)  # 1 in rows without outliers
    start = start_gain(weight, basis, layout, options) * spread.clamp(min=1)
    largest = (weight - torch.ops.rbe.decode(codes, basis, gain, **plain)).abs().amax(1)
    for factor in _LARGER_GAINS:
        tried = fp16_gain(start * factor)
        words = torch.ops.rbe.encode(weight, basis, tried, **options)
        rest = (weight - torch.ops.rbe.decode(words, basis, tried, **plain)).abs().amax(1)
        better = rest < largest
        gain, largest = torch.where(better, tried, gain), torch.where(better, rest, largest)
        codes = torch.where(better[:, None, None], words, codes)
    return gain, codes


def start_gain(weight: Tensor, basis: Tensor, layout: Layout, options: dict) -> Tensor:
    """The gain [m] at which the rows of `weight` [m, n] meet the basis: a row's root mean square in units of the basis
    where codes have a scale, else its size without outliers."""
    m, n = weight.shape
    # a typical vector of the reconstruction at gain 1 has this root mean square
    unit = basis.square().mean((1, 2)).sum().sqrt().clamp(min=1e-20)
    if layout.has_amplitude:
        size = weight.square().mean(1).sqrt()
        padded = torch.nn.functional.pad(weight, (0, layout.groups(n) * layout.group - n))
        largest = padded.view(m, -1, layout.group).square().mean(2).sqrt().amax(1)
        return _checked_gain(torch.maximum(size / unit, largest / (unit * _LARGEST_SCALE * layout.stages**0.5)), unit)
    size = row_size(weight)
    # fit_basis makes tables for rows of size 1, whatever their unit; another table is met by its unit
    some = slice(None, None, -(-m // _PROBED_ROWS))
    one, met = (float(_encode_rows(weight[some], basis, _checked_gain(gain[some], unit), options)[2]) for gain in (size, size / unit))
    return _checked_gain(size / unit if met < _MUCH_BETTER * one else size, unit)


def _encode_rows(weight: Tensor, basis: Tensor, gain: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Codes at a given gain; the least-squares gain of each row for those codes; the squared error with it. Returned as (gain, codes, error)."""
    codes = torch.ops.rbe.encode(weight, basis, gain, **options)
    plain = {**options, "layout": str(options["layout"]).partition("+")[0]}
    unscaled = torch.ops.rbe.decode(codes, basis, torch.ones_like(gain), **plain)
    fitted = (unscaled * weight).sum(1) / unscaled.square().sum(1).clamp(min=1e-30)
    gain = torch.where(fitted > 0, fp16_gain(fitted), gain)
    return gain, codes, (weight - gain[:, None] * unscaled).square().sum()


def _checked_gain(gain: Tensor, unit: Tensor) -> Tensor:
    if float(gain.max()) > GAIN_MAX:
        raise ValueError(f"basis: is so small (root mean square {float(unit):.3g}) that a row needs a gain of {float(gain.max()):.3g}, "
                         f"more than the {GAIN_MAX:.0f} that fp16 holds")
    return fp16_gain(gain)


def fit_residual(rest: Tensor, layout: Layout, hessian: Tensor | None = None, factor: Tensor | None = None) -> dict[str, Tensor]:
    """The layout's residual, encoded on what the codes leave over: rest float32 [m, n] -> tensors of Layout.residual_shapes by name.

    hessian H = factor factor^T [n, n], factor upper triangular: the residual makes tr((rest - residual) H (rest - residual)^T) small instead of the
    squared error. Low rank is then the best there is before its rounding to int8 (the truncated SVD of rest factor), and sparse entries are those
    that lower it most, with values fitted together. int8 and fp8 round either way.
    """
    if layout.residual in ("int8", "fp8"):
        largest, dtype = (127.0, torch.int8) if layout.residual == "int8" else (448.0, torch.float8_e4m3fn)
        scale = rest.abs().amax(1) / largest
        scaled = rest / torch.where(scale > 0, scale, 1)[:, None]
        return {"residual": (scaled.round() if dtype == torch.int8 else scaled).clamp(-largest, largest).to(dtype), "residual_scale": scale}
    if layout.rank:
        m, n = rest.shape
        u, s, vh = torch.linalg.svd(rest if factor is None else rest @ factor, full_matrices=False)
        if factor is not None:
            vh = torch.linalg.solve_triangular(factor, vh[: layout.rank], upper=True, left=False)
        rank = min(layout.rank, s.numel())
        left = torch.zeros(m, layout.rank, dtype=torch.float32, device=rest.device)
        right = torch.zeros(layout.rank, n, dtype=torch.float32, device=rest.device)
        left[:, :rank] = u[:, :rank] * s[:rank].sqrt()
        right[:rank] = vh[:rank] * s[:rank].sqrt()[:, None]
        a_scale, b_scale = left.abs().amax(0) / 127, right.abs().amax(1) / 127
        return {
            "residual": (left / torch.where(a_scale > 0, a_scale, 1)).round().to(torch.int8), "residual_scale": a_scale,
            "residual_right": (right / torch.where(b_scale > 0, b_scale, 1)[:, None]).round().to(torch.int8), "residual_right_scale": b_scale,
        }
    count = layout.sparse_columns(rest.shape[1])
    if hessian is None:
        columns = rest.abs().topk(count, dim=1).indices.sort(1).values
        values = rest.gather(1, columns)
    else:
        columns, values = _sparse_under(rest, hessian, count)
    return {"residual": values.clamp(-65504, 65504).half(), "residual_right": columns.to(torch.int32)}


def _sparse_under(rest: Tensor, hessian: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(columns, values) [m, count]: for each row the entries that lower its loss most by themselves, (rest H)_j^2 / H_jj, with the values that
    together minimise it: H_cc values = (rest H)_c."""
    pull = rest @ hessian
    columns = (pull.square() / hessian.diagonal()).topk(count, dim=1).indices.sort(1).values
    values = torch.empty(columns.shape, dtype=torch.float32, device=rest.device)
    for rows in torch.arange(len(rest), device=rest.device).split(max(1, _SOLVED // count**2)):
        chosen = columns[rows]
        block = hessian[chosen[:, :, None], chosen[:, None, :]].double()
        values[rows] = torch.linalg.solve(block, pull[rows].gather(1, chosen).double()).float()
    return columns, values
