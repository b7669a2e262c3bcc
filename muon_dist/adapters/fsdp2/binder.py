"""Binds Muon to DTensors, which `torch.distributed.fsdp.fully_shard` and tensor parallelism make.

Binds at the first step, because accelerate replaces parameters after the optimizer was made.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.adapters.fsdp2.state import DTensorState
from muon_dist.adapters.fsdp2.storage import (
    check_parameter,
    fragments,
    is_sharded,
    local_part,
    local_parts,
    placed_over,
)
from muon_dist.adapters.living import living
from muon_dist.errors import FrameworkError, LayoutError
from muon_dist.layout import Layout, dtensor_layout
from muon_dist.optim.binding import Binding, Bound, ParameterSpec
from muon_dist.optim.muon import Muon


def bind(optimizer: Muon) -> Bound | None:
    """The binder: None if no parameter of `optimizer` is a DTensor.

    Raises:
        FrameworkError: a placement, mesh or process group with which Muon cannot be exact, FSDP1, or parameters that
            the model no longer uses; names it.
        LayoutError: the parameters are not those with which the optimizer was made.
    """
    pairs = _matched(optimizer)
    if not any(is_sharded(p) for _, p, _ in pairs):
        _refuse_left_behind(pairs)
        return None
    ours = [(index, p, spec) for index, p, spec in pairs if spec.matrices]
    parameters: list[Any] = [p for _, p, _ in ours]
    for p, (*_, spec) in zip(parameters, ours, strict=True):
        _check_local(p, spec.name)
    # If all of Muon's parameters are plain tensors, AdamW's parameters tell which ranks hold the model.
    placed_on_some = [pair for pair in ours if is_sharded(pair[1])] or [pair for pair in pairs if is_sharded(pair[1])]
    known: list[tuple[Any, ParameterSpec]] = [(p, spec) for _, p, spec in placed_on_some]
    on_meshes = [(spec.name, p.device_mesh) for p, spec in known]
    group = _process_group(optimizer, on_meshes)
    placed = placed_over(group, [(spec.name, p, spec.matrices) for _, p, spec in ours])
    state = DTensorState(parameters, placed, group)
    layout = dtensor_layout(placed, dist.get_world_size(group))
    binding = Binding(
        layout=layout,
        buffers=tuple(parameters),
        group=group,
        device=_device(known[0][0]),
        local=local_part,
        parts=partial(local_parts, names={id(p): spec.name for _, p, spec in pairs}),
        column=_column(layout, [mesh for _, mesh in on_meshes], group),
        everywhere=state.everywhere,
        stored=state.momentum,
        stored_by_owner=state.by_owner,
        fragments=fragments,
    )
    return binding, {buffer: index for buffer, (index, *_) in enumerate(ours)}


def _matched(optimizer: Muon) -> list[tuple[int, torch.Tensor, ParameterSpec]]:
    """(group index, parameter, its spec) of all parameters, in order."""
    pairs: list[tuple[int, torch.Tensor, ParameterSpec]] = []
    if len(optimizer.param_groups) != len(optimizer.specs):
        return []
    for index, (group, specs) in enumerate(zip(optimizer.param_groups, optimizer.specs, strict=True)):
        if len(group["params"]) != len(specs):
            return []  # another framework has changed the groups; the optimizer's check reports it
        pairs += [(index, p, spec) for p, spec in zip(group["params"], specs, strict=True)]
    for _, p, spec in pairs:
        check_parameter(spec.name, p)
        if is_sharded(p) and tuple(p.shape) != spec.shape:
            raise LayoutError(
                f"{spec.name} had shape {spec.shape} and is now a DTensor of shape {tuple(p.shape)}: the optimizer's "
                "parameters were replaced in another order"
            )
    return pairs


# Refusals ----------------------------------------------------------------------------------------------------------


def _refuse_left_behind(pairs: list[tuple[int, torch.Tensor, ParameterSpec]]) -> None:
    """Raise FrameworkError if Muon was made before `fully_shard`, which has then replaced its parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not dist.is_initialized() or any(p.grad is not None for _, p, _ in pairs):
        return
    modules = living(torch.nn.Module)
    used = {id(p) for m in modules for p in vars(m).get("_parameters", {}).values()}
    shapes = {tuple(p.shape) for m in modules if isinstance(m, fsdp.FSDPModule) for p in m.parameters()}
    # Not replaced: parameters that a module still uses, or whose shapes no model under fully_shard has.
    if shapes and not any(id(p) in used for _, p, _ in pairs) and all(spec.shape in shapes for *_, spec in pairs):
        raise FrameworkError(
            "no parameter of Muon has a gradient and none is a DTensor, but a model is under fully_shard, which "
            "replaces parameters: make Muon after fully_shard, or pass both to accelerator.prepare"
        )


def _check_local(p: Any, name: str) -> None:
    local = local_part(p)
    if local.is_meta:
        raise FrameworkError(
            f"{name} is still on the meta device: call model.to_empty(device=...) and initialize the weights before "
            "the first step"
        )
    if not local.is_contiguous():
        raise FrameworkError(f"{name}: its local shard is not contiguous: call .contiguous() before fully_shard")


def _process_group(optimizer: Muon, meshes: list[tuple[str, DeviceMesh]]) -> dist.ProcessGroup:
    """The process group of all ranks that hold a parameter: the largest mesh, which must contain all other meshes.

    meshes: (name of a parameter, its mesh).
    """
    every = [(name, sorted(mesh.mesh.flatten().tolist()), mesh) for name, mesh in meshes]
    widest, ranks, _ = max(every, key=lambda entry: len(entry[1]))
    given = optimizer.process_group
    if not isinstance(given, str):
        ranks = [dist.get_rank()] if given is None else sorted(dist.get_process_group_ranks(given))
    for name, own, _ in every:
        if not set(own) <= set(ranks):
            if isinstance(given, str):
                raise FrameworkError(
                    f"{widest} is on ranks {ranks}, but {name} on {own}: pass the group of all ranks that hold the "
                    "model as process_group=, or make one Muon per set of ranks"
                )
            raise FrameworkError(
                f"process_group has ranks {ranks}, but the mesh of {name} has {own}: leave process_group out, or pass "
                "a group of all ranks that hold the model"
            )
    if not isinstance(given, str) and given is not None:
        return given
    line = next((mesh for _, own, mesh in every if mesh.ndim == 1 and own == ranks), None)
    if line is not None:
        return line.get_group()
    if ranks == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return _new_group(ranks)


def _column(layout: Layout, meshes: list[DeviceMesh], group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The process group of the ranks that hold the same shard as this rank: the mesh's own group if there is one."""
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
    """A new process group, made by its members only, because other ranks may never step this optimizer.

    Raises:
        FrameworkError: the default process group is bound to a device. Then torch splits its communicator, which is a
            collective of all ranks.
    """
    world = dist.group.WORLD
    if getattr(world, "bound_device_id", None) is not None and len(ranks) < dist.get_world_size():
        raise FrameworkError(
            f"Muon needs a process group of ranks {ranks} and cannot make it, because "
            "init_process_group(device_id=...) makes a new group a collective of all ranks. Leave device_id out, or "
            "make the group on all ranks with torch.distributed.new_group and pass it as process_group="
        )
    group = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _device(parameter: Any) -> torch.device:
    """The device that computes: the shard's own device, or the mesh's device if the shard is offloaded to the CPU."""
    local, mesh = local_part(parameter).device, parameter.device_mesh
    if mesh.device_type == local.type:
        return local
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())
