"""Binds Muon to DTensors, as `torch.distributed.fsdp.fully_shard` and tensor parallelism make them.

Bound at the first step, since accelerate replaces the optimizer's parameters after it is made.
"""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.adapters.fsdp2.state import DTensorState
from muon_dist.adapters.fsdp2.storage import check_parameter, is_sharded, local_part, local_parts, sharded
from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import Layout, dtensor_layout
from muon_dist.optim.binding import Binding, Bound, ParameterSpec
from muon_dist.optim.muon import Muon


def bind(optimizer: Muon) -> Bound | None:
    """The binder: None where no parameter of `optimizer` is a DTensor.

    Raises:
        FrameworkError: a placement, mesh or process group that cannot be exact, FSDP1, or parameters that are not
            the model's any more; names it.
        LayoutError: the parameters are not those that the optimizer was given.
    """
    pairs = _matched(optimizer)
    if not any(is_sharded(p) for _, p, _ in pairs):
        _refuse_left_behind(pairs)
        return None
    ours = [(index, p, spec) for index, p, spec in pairs if spec.matrices]
    if not ours:
        return None
    meshes = [_mesh(p, spec.name) for _, p, spec in ours]
    group = _process_group(optimizer, meshes, [spec.name for *_, spec in ours])
    parameters: list[Any] = [p for _, p, _ in ours]
    placed = [
        sharded(spec.name, p, spec.matrices, lambda rank: dist.get_group_rank(group, rank)) for _, p, spec in ours
    ]
    state = DTensorState(parameters, placed, group)
    layout = dtensor_layout(placed, dist.get_world_size(group))
    binding = Binding(
        layout=layout,
        buffers=tuple(parameters),
        group=group,
        device=_device(meshes[0], parameters[0]),
        local=local_part,
        parts=partial(local_parts, names={id(p): spec.name for _, p, spec in pairs}),
        column=_column(layout, meshes, group),
        everywhere=state.everywhere,
        stored=state.momentum,
        stored_rows=state.rows,
    )
    return binding, {buffer: index for buffer, (index, *_) in enumerate(ours)}


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
        if is_sharded(p) and tuple(p.shape) != spec.shape:
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
    modules = [m for m in gc.get_objects() if issubclass(type(m), torch.nn.Module)]
    used = {id(p) for m in modules for p in vars(m).get("_parameters", {}).values()}
    shapes = {tuple(p.shape) for m in modules if issubclass(type(m), fsdp.FSDPModule) for p in m.parameters()}
    # Parameters that a module still uses, or of shapes that no model under fully_shard has, were not replaced.
    if shapes and not any(id(p) in used for _, p, _ in pairs) and all(spec.shape in shapes for *_, spec in pairs):
        raise FrameworkError(
            "no parameter of Muon has a gradient and none is a DTensor, while a model here is under fully_shard, "
            "which replaces its parameters: make Muon after fully_shard, or hand both to accelerator.prepare"
        )


def _mesh(p: Any, name: str) -> DeviceMesh:
    if not is_sharded(p):
        raise FrameworkError(
            f"{name} is a plain tensor while other parameters are DTensors: nobody averages its gradient. Call "
            "fully_shard on the root module too, without ignored_params, or freeze the parameter"
        )
    local = local_part(p)
    if local.is_meta:
        raise FrameworkError(
            f"{name} is still on the meta device: call model.to_empty(device=...) and initialize the weights before "
            "the first step"
        )
    if not local.is_contiguous():
        raise FrameworkError(f"{name}: its local shard is not contiguous: call .contiguous() before fully_shard")
    mesh: DeviceMesh = p.device_mesh
    return mesh


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
    """Among its members alone: the other ranks may never step this optimizer.

    Raises:
        FrameworkError: the default process group is bound to a device. torch then splits its communicator, which all
            its ranks would have to do.
    """
    world = dist.group.WORLD
    if getattr(world, "bound_device_id", None) is not None and len(ranks) < dist.get_world_size():
        raise FrameworkError(
            f"Muon needs a process group of ranks {ranks} and cannot make it while others wait elsewhere: "
            "init_process_group(device_id=...) makes a new group a collective of all ranks. Leave device_id out, or "
            "make the group on all ranks with torch.distributed.new_group and pass it as process_group="
        )
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device(mesh: DeviceMesh, parameter: Any) -> torch.device:
    """Where the mesh computes: the shard's own device, but for shards that are offloaded to the CPU."""
    local = local_part(parameter).device
    if mesh.device_type == local.type:
        return local
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
