"""Reads placements of DTensors. Layouts, checkpoints and comparisons of copies use the result."""

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
    "{name} belongs to FSDP1 (FullyShardedDataParallel), which flattens parameters, so there are no matrices: use "
    "FSDP2, that is torch.distributed.fsdp.fully_shard, or fsdp_version=2 in accelerate and the Trainer"
)


def check_parameter(name: str, parameter: Any) -> None:
    """Raise FrameworkError for a parameter that FSDP1 has flattened (FSDP1 marks these)."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise FrameworkError(_FSDP1.format(name=name))


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, DTensor)


def reshard(model: nn.Module) -> None:
    """Make `model.parameters()` DTensors again after a forward pass without a backward pass (an evaluation).

    After such a pass `fully_shard` leaves the outermost module gathered: its parameters are plain temporary tensors.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor. Under no_grad `to_local` shares the DTensor's storage, so writes reach it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local_parts(parameter: torch.Tensor, names: Mapping[int, str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's part of a parameter and of its gradient, after the gradient got the parameter's placements.

    names: by `id()` of the parameter, for messages.

    Raises:
        FrameworkError: the gradient is on another mesh than the parameter, or is not a DTensor.
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
    return parameter._local_tensor, gradient  # like to_local, but without the view that torch makes for a Parameter


def _misplaced(name: str, parameter: DTensor, gradient: torch.Tensor) -> FrameworkError:
    found = f"on {gradient.device_mesh}" if isinstance(gradient, DTensor) else "a plain tensor"
    return FrameworkError(
        f"{name} is a DTensor on {parameter.device_mesh}, its gradient is {found}: let backward() make the gradient, "
        "or use distribute_tensor(gradient, p.device_mesh, p.placements)"
    )


def sharded(
    name: str,
    tensor: Any,
    matrices: tuple[Matrix, ...] = (),
    rank_of: Callable[[int], int] = lambda rank: rank,
) -> ShardedParameter:
    """The blocks of a DTensor on each rank of its mesh.

    Args:
        name: for messages.
        tensor: the DTensor.
        matrices: its matrices.
        rank_of: maps global ranks to ranks of the layout.

    Raises:
        FrameworkError: a placement does not define the elements of each rank, or does not match the number of elements
            on this rank.
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
            f"{tuple(mesh.mesh.shape)}: this rank should hold {own} elements of it, but holds "
            f"{local_part(tensor).numel()}"
        )
    return found


def placed_over(
    group: dist.ProcessGroup, parameters: Sequence[tuple[str, torch.Tensor, tuple[Matrix, ...]]]
) -> list[ShardedParameter]:
    """The blocks of the parameters on each rank of `group`. A collective.

    The mesh of a DTensor may have only some ranks (a norm or a router with tensor parallelism). Then other ranks have
    it on other meshes, and each mesh holds a copy. A plain tensor is a copy on every rank.

    Args:
        parameters: (name, tensor, its matrices), equal on all ranks.

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
                f"{name} is on meshes of ranks {[list(copy) for copy in copies]}, which do not contain each of the "
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
    """This rank's fragments of a parameter, a DTensor or a plain tensor."""
    if not isinstance(tensor, DTensor):
        return [Fragment.run(0, 0, tensor.numel(), 0, 0)]
    return sharded(name, tensor).fragments(0).on(dist.get_rank())


def _cut(name: str, placement: Placement, mesh: DeviceMesh, axis: int) -> Cut | None:
    """The cut of a placement along a mesh axis. Compares exact types, because a strided shard is a subclass."""
    if type(placement) is Replicate:
        return None
    if type(placement) is Shard:
        return placement.dim, 1
    split_factor = getattr(placement, "split_factor", None)
    if split_factor is not None:  # _StridedShard: fully_shard makes it from a tensor that is already sharded
        return int(placement.dim), int(split_factor)  # type: ignore[attr-defined]
    label = f"'{mesh.mesh_dim_names[axis]}'" if mesh.mesh_dim_names else str(axis)
    advice = "its value is a sum not yet taken: redistribute it to Replicate or Shard" if placement.is_partial() else (
        "this placement is unknown"
    )  # fmt: skip
    raise FrameworkError(f"{name} is placed {placement} over mesh axis {label}: {advice}, or send it to adamw")


def replica_groups(tensor: Any) -> list[Any]:
    """The process groups of ranks with a copy of this rank's shard, one per such mesh axis."""
    mesh = tensor.device_mesh
    return [
        mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if type(placement) is Replicate and mesh.size(axis) > 1
    ]


def cutting_axes(tensor: Any) -> tuple[tuple[DeviceMesh, int], ...]:
    """(mesh, axis) of each mesh axis that shards a tensor over several ranks; empty if every rank holds it whole."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    return tuple(
        (mesh, axis)
        for axis, placement in enumerate(tensor.placements)
        if type(placement) is not Replicate and mesh.size(axis) > 1
    )
