"""FSDP2: parameters that are DTensors, as `torch.distributed.fsdp.fully_shard` makes them.

Bound at the first step, since accelerate replaces the optimizer's parameters after it is made. Only `Shard(0)` over
one mesh axis with copies over the others can be planned; everything else is refused by name, as is FSDP1.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import Layout, ShardedParameter, dtensor_layout
from muon_dist.optim.binding import Binding, Bound, ParameterSpec
from muon_dist.optim.muon import Muon
from muon_dist.ownership import OwnershipPlan

_FSDP1 = (
    "{name} belongs to FSDP1 (FullyShardedDataParallel), which flattens parameters so that no matrix is left: use "
    "FSDP2, that is torch.distributed.fsdp.fully_shard, or fsdp_version=2 in accelerate and the Trainer"
)


def check_parameter(name: str, parameter: Any) -> None:
    """Raise FrameworkError for a parameter that FSDP1 has flattened; it marks them."""
    if getattr(parameter, "_fsdp_flattened", False):
        raise FrameworkError(_FSDP1.format(name=name))


def bind(optimizer: Muon) -> Bound | None:
    """The binder: None where no parameter of `optimizer` is a DTensor.

    Raises:
        FrameworkError: a placement, mesh or process group that cannot be exact, FSDP1, or parameters that are not
            the model's any more; names it.
        LayoutError: the parameters are not those that the optimizer was given.
    """
    pairs = _matched(optimizer)
    if not any(isinstance(p, DTensor) for _, p, _ in pairs):
        _refuse_left_behind(pairs)
        return None
    ours = [(index, p, spec) for index, p, spec in pairs if spec.matrices]
    if not ours:
        return None
    meshes = [_mesh(p, spec.name) for _, p, spec in ours]
    group = _process_group(optimizer, meshes, [spec.name for *_, spec in ours])
    placed = [_placed(p, spec, group) for _, p, spec in ours]
    storage = _Storage([p for _, p, _ in ours], placed, group)
    layout = dtensor_layout(placed, dist.get_world_size(group))
    binding = Binding(
        layout=layout,
        buffers=tuple(p for _, p, _ in ours),
        group=group,
        device=_device(meshes[0]),
        local=_local,
        column=_column(layout, meshes, group),
        everywhere=storage.everywhere,
        stored=storage.stored,
    )
    return binding, {buffer: index for buffer, (index, *_) in enumerate(ours)}


@torch.no_grad()
def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; under no_grad `to_local` is the DTensor's own storage, so that a write reaches it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _matched(optimizer: Muon) -> list[tuple[int, torch.Tensor, ParameterSpec]]:
    """(group index, parameter, what the optimizer was given), in order."""
    pairs: list[tuple[int, torch.Tensor, ParameterSpec]] = []
    if len(optimizer.param_groups) != len(optimizer.specs):
        return []
    for index, (group, specs) in enumerate(zip(optimizer.param_groups, optimizer.specs, strict=True)):
        if len(group["params"]) != len(specs):
            return []  # another framework's doing, which the optimizer's own check names
        pairs += [(index, p, spec) for p, spec in zip(group["params"], specs, strict=True)]
    for _, p, spec in pairs:
        check_parameter(spec.name, p)
        if isinstance(p, DTensor) and tuple(p.shape) != spec.shape:
            raise LayoutError(
                f"{spec.name} was given with shape {spec.shape} and is now a DTensor of shape {tuple(p.shape)}: the "
                "parameters of the optimizer were replaced in another order"
            )
    return pairs


# Refusals ----------------------------------------------------------------------------------------------------------


def _refuse_left_behind(pairs: list[tuple[int, torch.Tensor, ParameterSpec]]) -> None:
    """`fully_shard` replaces a model's parameters: an optimizer made before would step tensors that nobody uses."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or any(p.grad is not None for _, p, _ in pairs):
        return
    if any(issubclass(type(candidate), fsdp.FSDPModule) for candidate in gc.get_objects()):
        raise FrameworkError(
            "no parameter of Muon has a gradient and none is a DTensor, while a model here is under fully_shard, "
            "which replaces its parameters: make Muon after fully_shard, or hand both to accelerator.prepare"
        )


def _mesh(p: torch.Tensor, name: str) -> DeviceMesh:
    if not isinstance(p, DTensor):
        raise FrameworkError(
            f"{name} is a plain tensor while other parameters are DTensors: nobody averages its gradient. Call "
            "fully_shard on the root module too, without ignored_params, or freeze the parameter"
        )
    local = _local(p)
    if local.is_meta:
        raise FrameworkError(
            f"{name} is still on the meta device: call model.to_empty(device=...) and initialize the weights before "
            "the first step"
        )
    if not local.is_contiguous():
        raise FrameworkError(f"{name}: its local shard is not contiguous: call .contiguous() before fully_shard")
    return p.device_mesh


def _cut(placement: Placement, spec: ParameterSpec, mesh: DeviceMesh, axis: int) -> int | None:
    """The tensor axis that a mesh axis cuts. Exact types: a strided shard is ordered differently."""
    if type(placement) is Replicate:
        return None
    if type(placement) is Shard and placement.dim == 0:
        return 0
    label = f"'{mesh.mesh_dim_names[axis]}'" if mesh.mesh_dim_names else str(axis)
    if type(placement) is Shard:
        advice = "let shard_placement_fn of fully_shard return Shard(0) for matrices, and use no tensor parallelism"
    elif placement.is_partial():
        advice = "its value is a sum not yet taken: redistribute it to Replicate or Shard(0)"
    else:
        advice = "tensor parallelism below fully_shard is not supported: leave parallelize_module out for it"
    raise FrameworkError(
        f"{spec.name} is placed {placement} over mesh axis {label}; Muon plans Shard(0) and Replicate only: {advice}, "
        "or send it to adamw with an override"
    )


def _process_group(optimizer: Muon, meshes: list[DeviceMesh], names: list[str]) -> dist.ProcessGroup:
    """The ranks of the meshes, which must all be the same."""
    every = [sorted(mesh.mesh.flatten().tolist()) for mesh in meshes]
    for ranks, name in zip(every, names, strict=True):
        if ranks != every[0]:
            raise FrameworkError(
                f"{names[0]} lies on ranks {every[0]}, {name} on {ranks}: make one Muon for each set of ranks"
            )
    given = optimizer.process_group
    if not isinstance(given, str):
        ranks = [dist.get_rank()] if given is None else sorted(dist.get_process_group_ranks(given))
        if ranks != every[0]:
            raise FrameworkError(
                f"process_group has ranks {ranks}, the mesh of {names[0]} has {every[0]}: leave process_group out"
            )
        if given is not None:
            return given
    line = next((mesh for mesh in meshes if mesh.ndim == 1), None)
    if line is not None:
        return line.get_group()
    if every[0] == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return _new_group(every[0])


def _column(layout: Layout, meshes: list[DeviceMesh], group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The process group of the ranks that hold what this one holds: a mesh's own where there is one."""
    if not layout.columns or len(set(layout.columns)) == 1:
        return None
    own = layout.columns[dist.get_rank(group)]
    ranks = [dist.get_global_rank(group, r) for r, column in enumerate(layout.columns) if column == own]
    for mesh in meshes:
        for axis in range(mesh.ndim):
            if sorted(dist.get_process_group_ranks(mesh.get_group(axis))) == sorted(ranks):
                return mesh.get_group(axis)
    return _new_group(ranks)


def _new_group(ranks: list[int]) -> dist.ProcessGroup:
    """Among its members alone: the other ranks may never step this optimizer."""
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _placed(p: Any, spec: ParameterSpec, group: dist.ProcessGroup) -> ShardedParameter:
    mesh: DeviceMesh = p.device_mesh
    cuts = tuple(_cut(placement, spec, mesh, axis) for axis, placement in enumerate(p.placements))
    if sum(cut is not None for cut in cuts) > 1:
        raise FrameworkError(
            f"{spec.name} is placed {p.placements}: its rows are cut over more than one mesh axis; shard over one, "
            "and replicate over the others (HSDP)"
        )
    ranks = tuple(dist.get_group_rank(group, rank) for rank in mesh.mesh.flatten().tolist())
    return ShardedParameter(spec.name, spec.shape, tuple(mesh.mesh.shape), ranks, cuts, spec.matrices)


# State -------------------------------------------------------------------------------------------------------------


class _SourceMesh(DeviceMesh):
    """A mesh that only names its ranks: nothing is sent over it, so it has no process groups."""

    def __init__(self, device_type: str, ranks: list[int]) -> None:
        super().__init__(device_type, ranks, _init_backend=False)

    def __getattr__(self, name: str) -> Any:
        if name != "_dim_group_names":  # what DTensor asks for before it communicates
            raise AttributeError(name)
        raise FrameworkError(
            "momentum under HSDP lies on one rank of each shard only and is not gathered as a tensor: save sharded "
            "(torch.distributed.checkpoint without full_state_dict; SHARDED_STATE_DICT under accelerate)"
        )


class _Storage:
    """Momentum as DTensors, so that torch.distributed.checkpoint saves and reshards it by itself.

    Without copies it is placed like the parameter. With copies (HSDP) only the sources hold it: a DTensor over just
    those ranks, cut as the parameter is. Where the matrices of one parameter (heads, experts) have their sources in
    different copies there is no such mesh, and all copies keep the momentum of that parameter.
    """

    def __init__(self, parameters: list[Any], placed: list[ShardedParameter], group: dist.ProcessGroup) -> None:
        self._parameters = parameters
        self._placed = placed
        self._ranks = dist.get_process_group_ranks(group)
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}
        self._sources: list[tuple[int, ...] | None] = []

    def everywhere(self, plan: OwnershipPlan) -> set[int]:
        """Buffers of which some shard has sources on more than one rank."""
        found: list[list[set[int]]] = [[set() for _ in p.shards()] for p in self._placed]
        shard_of = [{rank: i for i, holders in enumerate(p.shards()) for rank in holders} for p in self._placed]
        for fragments in plan.sources:
            for f in fragments:
                found[f.buffer][shard_of[f.buffer][f.rank]].add(f.rank)
        self._sources = []
        for p, shards in zip(self._placed, found, strict=True):
            if any(len(ranks) > 1 for ranks in shards):
                self._sources.append(None)
                continue
            # An empty shard has no source; any of its holders may stand in the mesh.
            self._sources.append(
                tuple(min(ranks) if ranks else holders[0] for ranks, holders in zip(shards, p.shards(), strict=True))
            )
        return {buffer for buffer, ranks in enumerate(self._sources) if ranks is None}

    def stored(self, plan: OwnershipPlan, buffer: int, momentum: torch.Tensor | None) -> torch.Tensor:
        """`momentum` without a copy, as a DTensor; an empty part on ranks that keep none."""
        p, ranks = self._parameters[buffer], self._sources[buffer]
        mesh, placements = p.device_mesh, p.placements
        if ranks is not None and len(ranks) < mesh.size():
            mesh = self._meshes.setdefault(ranks, _SourceMesh(mesh.device_type, [self._ranks[rank] for rank in ranks]))
            placements = (Shard(0),)
        if momentum is None:
            momentum = torch.empty(0, dtype=torch.float32, device=_local(p).device)
        return DTensor.from_local(momentum, mesh, placements, run_check=False, shape=p.shape, stride=p.stride())
