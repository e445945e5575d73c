"""RBELinear across processes: FSDP2 that leaves the basis whole, and tensor parallelism by DTensor rules of rbe::linear.

    rbe_torch.parallel.fully_shard(model)                          data parallel: amplitudes, gains and biases sharded, codes and basis in
    every process parallelize_module(model, mesh, {"up": ColumnParallel(), "down": RowParallel()})      torch.distributed.tensor.parallel's
    own call

    column    rows of W are split      codes, gain, bias, amplitude Shard(0); x Replicate; y Shard(-1); gradients of x and basis Partial
    row       groups of W are split    codes, amplitude Shard(1); x Shard(-1); y Partial; gradients of basis and gain Partial; bias added
    once

The basis is 256 vectors that every row uses, so it is replicated and its gradient summed. DDP needs nothing from here. Importing this
module registers the rules; it needs torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .layout import Layout
from .linear import RBELinear

_OPS = torch.ops.rbe
_TENSORS = ("x", "codes", "basis", "gain", "bias", "amplitude", "residual", "residual_scale", "residual_right", "residual_right_scale")
_PLACES = {  # by how the codes lie: what the other tensors must be, by name
    "column": {"codes": Shard(0), "gain": Shard(0), "bias": Shard(0), "amplitude": Shard(0)},
    "row": {"codes": Shard(1), "amplitude": Shard(1)},
    "whole": {},
}


# ---- FSDP2 -------------------------------------------------------------------------------------------------------------------------
def fully_shard(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """torch.distributed.fsdp.fully_shard on every RBELinear of `model` and then on the rest; the bases are replicated and their gradients
    averaged.

    mesh: one-dimensional; by default all processes. options: of torch's fully_shard. Returns the model. Call it after convert or
    prepare_training and before the optimiser is made. ValueError: no RBELinear, or a mesh of more dimensions.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    layers = [layer for layer in model.modules() if isinstance(layer, RBELinear)]
    if not layers:
        raise ValueError("model: has no RBELinear; call rbe_torch.convert or rbe_torch.compress first")
    if mesh is None:
        mesh = init_device_mesh(layers[0].packed.device.type, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"mesh: has {mesh.ndim} dimensions, must have one")
    bases = {layer.basis for layer in layers}
    group = mesh.get_group()
    for basis in bases:
        with torch.no_grad():
            dist.broadcast(basis.data, dist.get_global_rank(group, 0), group=group)
        if basis.requires_grad:
            basis.register_hook(lambda gradient: _mean(gradient, group))
    for layer in layers:
        for buffer in layer.buffers():
            dist.broadcast(buffer, dist.get_global_rank(group, 0), group=group)
        shard(layer, mesh=mesh, ignored_params=bases & set(layer.parameters()), **options)
    return shard(model, mesh=mesh, ignored_params=bases, **options)


def _mean(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    gradient = gradient.clone()
    dist.all_reduce(gradient, group=group)
    return gradient / dist.get_world_size(group)


# ---- tensor parallel ---------------------------------------------------------------------------------------------------------------
class ColumnParallel(ParallelStyle):
    """Splits the out_features of an RBELinear. input_layouts: of a plain tensor that comes in; output_layouts, use_local_output: of what
    goes out."""

    kind = "column"

    def __init__(self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None,
                 use_local_output: bool = True) -> None:
        super().__init__()
        before, after = (Replicate(), Shard(-1)) if self.kind == "column" else (Shard(-1), Replicate())
        self.input_layouts, self.output_layouts = (input_layouts or before,), (output_layouts or after,)
        self.wanted, self.use_local_output = (before,), use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, RBELinear):
            raise TypeError(f"module: is a {type(module).__name__}, must be an RBELinear")
        _check_split(module, self.kind, device_mesh.size())
        places = {**_PLACES[self.kind], "packed": _PLACES[self.kind]["codes"]}
        if self.kind == "column":
            places["log_gain"] = Shard(0)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, DTensor):
                module._parameters[name] = _distributed_parameter(parameter, device_mesh, places.get(name, Replicate()))
        module._buffers["packed"] = distribute_tensor(module.packed, device_mesh, [places["packed"]])
        module.register_forward_pre_hook(lambda _, inputs: (self._come_in(inputs[0], device_mesh), *inputs[1:]))
        module.register_forward_hook(lambda _, __, output: self._go_out(output))
        return module

    def _come_in(self, x: Tensor, mesh: DeviceMesh) -> DTensor:
        x = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return x if x.placements == self.wanted else x.redistribute(placements=self.wanted)

    def _go_out(self, y: DTensor) -> Tensor:
        y = y if y.placements == self.output_layouts else y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y


class RowParallel(ColumnParallel):
    """Splits the in_features of an RBELinear, by whole groups."""

    kind = "row"


_distributed: dict[int, tuple[Tensor, nn.Parameter]] = {}  # a basis that layers share stays one parameter


def _distributed_parameter(parameter: nn.Parameter, mesh: DeviceMesh, place: Placement) -> nn.Parameter:
    if id(parameter) in _distributed and _distributed[id(parameter)][0] is parameter:
        return _distributed[id(parameter)][1]
    made = nn.Parameter(distribute_tensor(parameter.detach(), mesh, [place]), requires_grad=parameter.requires_grad)
    _distributed[id(parameter)] = (parameter, made)
    return made


def _check_split(layer: RBELinear, kind: str, world: int) -> None:
    layout = layer.layout
    if layout.residual is not None:
        raise ValueError(f"module: is of {layout}; a layer with a residual cannot be split")
    if kind == "column" and layer.out_features % world:
        raise ValueError(f"module: has {layer.out_features} out_features, must be a multiple of the {world} processes")
    groups = layout.groups(layer.in_features)
    if kind == "row" and (layer.in_features % (layout.group * world) or groups // world * layout.stages * layout.bits % 8):
        raise ValueError(f"module: has {layer.in_features} in_features in groups of {layout.group}: {world} processes cannot have whole groups "
                         "of whole bytes each")


# ---- DTensor rules -----------------------------------------------------------------------------------------------------------------
def _split_of(codes: DTensor) -> str:
    if codes.device_mesh.ndim != 1:
        raise ValueError(f"codes: lie on a mesh of {codes.device_mesh.ndim} dimensions, must lie on one of one dimension")
    place = codes.placements[0]
    if place.is_replicate():
        return "whole"
    if isinstance(place, Shard) and place.dim in (0, 1):
        return ("column", "row")[place.dim]
    raise ValueError(f"codes: are {place}, must be Replicate, Shard(0) (rows) or Shard(1) (groups)")


def _local_keywords(split: str, codes: DTensor, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of this process's shard: where it lies in a seeded layout, its own columns in the others."""
    rank, world = codes.device_mesh.get_local_rank(), codes.device_mesh.size()
    layout, n = Layout.parse(keywords["layout"]), keywords["in_features"]
    local = dict(keywords)
    if split == "column":
        local["row0"] = keywords.get("row0", 0) + rank * (codes.shape[0] // world)
    if split == "row":
        groups = layout.groups(n) // world
        local.update({"k0": rank * groups} if layout.seeded else {"in_features": groups * layout.group})
    return local


def _placed(tensor: Any, name: str, mesh: DeviceMesh, place: Placement) -> Any:
    """This process's part of a tensor that must be placed so; a plain tensor is taken as replicated."""
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        if place.is_replicate():
            return tensor
        tensor = distribute_tensor(tensor, mesh, [Replicate()])
    if tensor.device_mesh != mesh:
        raise ValueError(f"{name}: lies on another mesh than codes")
    return (tensor if tensor.placements == (place,) else tensor.redistribute(placements=[place])).to_local()


def _prepare(args: tuple, split: str, codes: DTensor) -> tuple[list[Any], Placement]:
    """Local tensors in the operator's order and how x lies."""
    mesh, x = codes.device_mesh, args[0]
    place = Replicate() if split != "row" else Shard(x.dim() - 1)
    if split == "whole" and isinstance(x, DTensor) and isinstance(x.placements[0], Shard) and x.placements[0].dim < x.dim() - 1:
        place = x.placements[0]  # tokens are split
    local = [_placed(x, "x", mesh, place)]
    for name, tensor in zip(_TENSORS[1:], args[1:], strict=False):
        local.append(_placed(tensor, name, mesh, _PLACES[split].get(name, Replicate())))
    return local, place


def _wrap(tensor: Tensor, mesh: DeviceMesh, place: Placement) -> DTensor:
    return DTensor.from_local(tensor, mesh, [place], run_check=False)


def _codes_of(args: tuple, at: int, name: str) -> DTensor:
    if not isinstance(args[at], DTensor):
        raise ValueError(f"{name}: is a plain tensor among DTensors; distribute it, rbe_torch.parallel.ColumnParallel and RowParallel do")
    return args[at]


def _linear(op: Any, args: tuple, keywords: dict[str, Any]) -> DTensor:
    codes = _codes_of(args, 1, "codes")
    split = _split_of(codes)
    local, place = _prepare(args, split, codes)
    if split == "row" and codes.device_mesh.get_local_rank() and len(local) > 4:
        local[4] = None  # the sum has it once
    y = op(*local, **_local_keywords(split, codes, keywords))
    out = {"column": Shard(y.dim() - 1), "row": Partial(), "whole": place}[split]
    return _wrap(y, codes.device_mesh, out)


def _linear_backward(op: Any, args: tuple, keywords: dict[str, Any]) -> tuple[Tensor, ...]:
    dy, rest = args[0], args[1:]
    codes = _codes_of(rest, 1, "codes")
    split = _split_of(codes)
    local, place = _prepare(rest, split, codes)
    mesh = codes.device_mesh
    dy = _placed(dy, "dy", mesh, {"column": Shard(dy.dim() - 1), "row": Replicate(), "whole": place}[split])
    got = op(dy, *local, **_local_keywords(split, codes, keywords))
    summed = Partial() if isinstance(place, Shard) and split == "whole" else Replicate()
    places = {
        "column": (Partial(), Partial(), Shard(0), Shard(0), Shard(0)),
        "row": (Shard(dy.dim() - 1), Partial(), Partial(), Replicate(), Shard(1)),
        "whole": (place, summed, summed, summed, summed),
    }[split]
    # a gradient that was not wanted is empty, whatever its place would be
    return tuple(_wrap(tensor, mesh, where if tensor.numel() else Replicate()) for tensor, where in zip(got, places, strict=True))


def _same_place(op: Any, args: tuple, keywords: dict[str, Any]) -> DTensor:
    """pack and unpack: what comes out lies as what went in."""
    codes = _codes_of(args, 0, "codes")
    split = _split_of(codes)
    return _wrap(op(codes.to_local(), **_local_keywords(split, codes, keywords)), codes.device_mesh, codes.placements[0])


def _register() -> None:
    handlers = DTensor._op_dispatcher._custom_op_handlers  # where torch keeps its own for convolution
    rules = {"linear": _linear, "linear_inference": _linear, "linear_backward": _linear_backward, "pack": _same_place, "unpack": _same_place}
    for name, rule in rules.items():
        handlers[getattr(_OPS, name).default] = rule


_register()
