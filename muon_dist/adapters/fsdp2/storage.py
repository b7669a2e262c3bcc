"""Reads placements of DTensors. Layouts, checkpoints and comparisons of copies are derived from the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import Fragment, Matrix, ShardedParameter
from muon_dist.layout.cuts import Cut
from muon_dist.ranks import Ranks

_FSDP1 = (
    "{name} belongs to FSDP1 (FullyShardedDataParallel), which flattens parameters so that no matrix is left: use "
    "FSDP2, that is torch.distributed.fsdp.fully_shard, or fsdp_version=2 in accelerate and the Trainer"
)


def check_parameter(name: str, parameter: Any) -> None:
    """Raise FrameworkError for a parameter that FSDP1 has flattened; it marks them."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise FrameworkError(_FSDP1.format(name=name))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Let `model.parameters()` be DTensors again after a forward pass that no backward pass followed (an evaluation):
    `fully_shard` leaves the outermost module gathered then, with plain tensors that have no storage of their own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; under no_grad `to_local` is the DTensor's own storage, so that a write reaches it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local_parts(parameter: torch.Tensor, names: Mapping[int, str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's part of a parameter and of its gradient, which is first placed as the parameter is.

    names: by `id()` of the parameter, for messages.

    Raises:
        FrameworkError: the gradient lies on other ranks than the parameter, or is not a DTensor.
    """
    gradient = parameter.grad
    if not isinstance(parameter, DTensor):
        return parameter, gradient
    if gradient is not None:
        if not isinstance(gradient, DTensor) or gradient.device_mesh != parameter.device_mesh:
            raise _misplaced(names.get(id(parameter), "a parameter"), parameter, gradient)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        gradient = gradient.to_local()
    return parameter._local_tensor, gradient  # as to_local, without the view that torch makes for a Parameter


def _misplaced(name: str, parameter: DTensor, gradient: torch.Tensor) -> FrameworkError:
    found = f"on {gradient.device_mesh}" if isinstance(gradient, DTensor) else "a plain tensor"
    return FrameworkError(
        f"{name} is a DTensor on {parameter.device_mesh}, its gradient is {found}: let backward() make it, or make it "
        "with distribute_tensor(gradient, p.device_mesh, p.placements)"
    )


def sharded(
    name: str,
    tensor: Any,
    matrices: tuple[Matrix, ...] = (),
    rank_of: Callable[[int], int] = lambda rank: rank,
) -> ShardedParameter:
    """Which rank of its mesh holds which block of a DTensor.

    Args:
        name: for messages.
        tensor: the DTensor.
        matrices: how it is cut into matrices.
        rank_of: from global ranks to those of the layout.

    Raises:
        FrameworkError: a placement that does not say which elements a rank holds, or this rank holds another number
            of elements than its placement says.
    """
    mesh = tensor.device_mesh
    cuts = tuple(_cut(name, placement, mesh, axis) for axis, placement in enumerate(tensor.placements))
    ranks = tuple(rank_of(rank) for rank in mesh.mesh.flatten().tolist())
    try:
        found = ShardedParameter(name, tuple(tensor.shape), tuple(mesh.mesh.shape), ranks, cuts, matrices)
    except LayoutError as error:
        raise FrameworkError(f"{name} is placed {tensor.placements}: {error}") from error
    own = int(found.fragments(0).on(rank_of(dist.get_rank())).length.sum())
    if own != local_part(tensor).numel():
        raise FrameworkError(
            f"{name} of shape {tuple(tensor.shape)} is placed {tensor.placements} over a mesh of "
            f"{tuple(mesh.mesh.shape)}: this rank should hold {own} elements of it, and holds "
            f"{local_part(tensor).numel()}"
        )
    return found


def placed_over(
    group: dist.ProcessGroup, parameters: Sequence[tuple[str, torch.Tensor, tuple[Matrix, ...]]]
) -> list[ShardedParameter]:
    """Which rank of `group` holds which blocks of the parameters. A collective.

    A DTensor whose mesh has some of the ranks only (a norm or a router beside tensor parallelism) is on other meshes
    on the other ranks: each of these meshes holds a copy. A plain tensor is a copy on every rank.

    Args:
        parameters: (name, tensor, its matrices), the same on all ranks.

    Raises:
        FrameworkError: as `sharded`, or the meshes of a parameter do not hold each rank once.
    """
    every = tuple(range(dist.get_world_size(group)))

    def rank_of(rank: int) -> int:
        return dist.get_group_rank(group, rank)

    placed = [_on_its_mesh(name, p, m, rank_of, every) for name, p, m in parameters]
    narrow = {i: p.ranks for i, p in enumerate(placed) if len(p.ranks) < len(every)}
    by_rank = Ranks(group).gather(narrow)
    for i in sorted({i for of_rank in by_rank for i in of_rank}):
        name, copies = placed[i].name, sorted({of_rank.get(i, every) for of_rank in by_rank})
        ranks = tuple(rank for copy in copies for rank in copy)
        if sorted(ranks) != list(every):
            raise FrameworkError(
                f"{name} lies on the meshes {[list(copy) for copy in copies]} of ranks, which do not hold each of the "
                f"{len(every)} ranks of the model once: pass the group of the ranks that hold it as process_group="
            )
        own = placed[i]
        placed[i] = replace(own, mesh_shape=(len(copies), *own.mesh_shape), ranks=ranks, cuts=(None, *own.cuts))
    return placed


def _on_its_mesh(
    name: str, tensor: Any, matrices: tuple[Matrix, ...], rank_of: Callable[[int], int], every: tuple[int, ...]
) -> ShardedParameter:
    if is_sharded(tensor):
        return sharded(name, tensor, matrices, rank_of)
    return ShardedParameter(name, tuple(tensor.shape), (len(every),), every, (None,), matrices)


def fragments(name: str, tensor: torch.Tensor) -> Sequence[Fragment]:
    """The elements of a parameter that this rank holds, whether it is a DTensor or whole."""
    if not isinstance(tensor, DTensor):
        return [Fragment.run(0, 0, tensor.numel(), 0, 0)]
    return sharded(name, tensor).fragments(0).on(dist.get_rank())


def _cut(name: str, placement: Placement, mesh: DeviceMesh, axis: int) -> Cut | None:
    """The cut that a placement makes along an axis of the mesh. By exact type: a strided shard is a subclass."""
    if type(placement) is Replicate:
        return None
    if type(placement) is Shard:
        return placement.dim, 1
    split_factor = getattr(placement, "split_factor", None)
    if split_factor is not None:  # _StridedShard: what fully_shard makes of a tensor that is cut already
        return int(placement.dim), int(split_factor)  # type: ignore[attr-defined]
    label = f"'{mesh.mesh_dim_names[axis]}'" if mesh.mesh_dim_names else str(axis)
    advice = "its value is a sum not yet taken: redistribute it to Replicate or Shard" if placement.is_partial() else (
        "this placement is unknown"
    )  # fmt: skip
    raise FrameworkError(f"{name} is placed {placement} over mesh axis {label}: {advice}, or send it to adamw")


def replica_groups(tensor: Any) -> list[Any]:
    """The process groups over which copies of this rank's shard lie, one for each such axis of the mesh."""
    mesh = tensor.device_mesh
    return [
        mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if type(placement) is Replicate and mesh.size(axis) > 1
    ]


def cutting_axes(tensor: Any) -> tuple[tuple[DeviceMesh, int], ...]:
    """(mesh, axis) of the mesh axes with several ranks that cut a tensor; none for one that is whole on every rank."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        (mesh, axis)
        for axis, placement in enumerate(tensor.placements)
        if type(placement) is not Replicate and mesh.size(axis) > 1
    )
