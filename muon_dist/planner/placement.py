"""How each framework stores the parameters: the layout that the optimizer will use, and bytes per rank.

The rules are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), of FSDP2 and of DDP; tests compare
the layouts with those that the adapters read from real engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.layout import (
    FlatGroup,
    Layout,
    PlacedParameter,
    StoredParameter,
    dtensor_layout,
    flat_layout,
    matrix_layouts,
    per_parameter_layout,
    replicated_layout,
)
from muon_dist.layout.per_parameter import slice_length, sub_group
from muon_dist.ownership.partition_order import partition_order, slice_elements
from muon_dist.planner.autotp import over_tensor_parallel_ranks
from muon_dist.planner.mesh import LAYOUTS, Mesh, make_mesh
from muon_dist.planner.model import PlannedParameter, Settings, Workload
from muon_dist.planner.sharding import largest_part, sharded_parameter, whole_parts

__all__ = ["LAYOUTS", "Held", "Placement", "held_bytes", "place", "place_on", "sub_groups"]


@dataclass(frozen=True)
class Held:
    """Bytes on the fullest rank, for any owners.

    Attributes:
        weights: in the dtype of the model's computation. gradients: at their peak, after the last backward pass.
        master: fp32 copies.
        adamw: both moments of AdamW's groups.
        working: gathered weights of the layer that computes, and its gradients.
    """

    weights: float
    gradients: float
    master: float
    adamw: float
    working: float


@dataclass(frozen=True)
class Placement:
    """The layout of Muon's matrices on the ranks of a mesh, and whether Muon's group was sorted by
    `partition_order`."""

    mesh: Mesh
    layout: Layout
    ordered: bool


def place(workload: Workload, settings: Settings, kind: str, world: int, per_node: int) -> Placement:
    """The placement of `workload` on `world` ranks of data parallelism. Raises ConfigError as `make_mesh`."""
    return place_on(workload, settings, make_mesh(kind, world, per_node))


def place_on(workload: Workload, settings: Settings, mesh: Mesh) -> Placement:
    """The placement of one pipeline stage on its ranks. workload: the stage's part of the model."""
    layout, ordered = _layout(workload, settings, mesh)
    return Placement(mesh, layout, ordered)


def held_bytes(workload: Workload, settings: Settings, mesh: Mesh) -> Held:
    """Bytes of the rank with most memory in a stage. workload: the stage's part of the model."""
    low = 2 if settings.low_precision else 4
    world, layers = mesh.stage_ranks // mesh.tp, max(workload.layers, 1)
    total = sum(n * p.numel / whole_parts(p, mesh)[0] for p, n, _ in workload.kinds)
    adamw = sum(n * p.numel / whole_parts(p, mesh)[0] for p, n, muon in workload.kinds if not muon)
    layer = low * 2 * total / layers  # weights and gradients of a layer
    if mesh.layout == "ddp":
        # autocast: weights and gradients stay fp32; DDP's buckets store the gradients
        return Held(4.0 * total, 4.0 * total, 0.0, 8.0 * adamw, 0.0)
    if mesh.layout in ("zero1", "zero2"):
        gradients = low * total / (world if mesh.layout == "zero2" else 1)
        return Held(low * total, gradients, 4.0 * total / world, 8.0 * adamw / world, 0.0)
    if mesh.layout == "zero3":
        share = low * total / world
        return Held(share, share, 4.0 * total / world, 8.0 * adamw / world, layer)
    held = sum(n * largest_part(p, mesh) for p, n, _ in workload.kinds)
    moments = 8.0 * sum(n * largest_part(p, mesh) for p, n, muon in workload.kinds if not muon)
    gathered = sum(n * p.numel / whole_parts(p, mesh)[0] for p, n, _ in workload.kinds)
    return Held(4.0 * held, 4.0 * held, 0.0, moments, low * 2 * gathered / layers)


def _layout(workload: Workload, settings: Settings, mesh: Mesh) -> tuple[Layout, bool]:
    muon, world, kind = workload.muon, mesh.stage_ranks, mesh.layout
    if kind == "ddp":
        return replicated_layout([p.matrices for p in muon], world), False
    if kind in ("zero1", "zero2", "zero3"):
        return _zero_layout(workload, settings, mesh)
    return dtensor_layout([sharded_parameter(p, mesh) for p in muon], world), False


def _zero_layout(workload: Workload, settings: Settings, mesh: Mesh) -> tuple[Layout, bool]:
    """ZeRO over the ranks that hold the same part: all ranks, unless there is AutoTP."""
    ranks, stage3, ordered = mesh.stage_ranks // mesh.tp, mesh.layout == "zero3", False
    members = [list(group) for group in workload.by_muon_group]
    if not stage3 and settings.ordered:
        orders = [partition_order([p.matrices for p in group], ranks) for group in members]
        ordered = any(order != sorted(order) for order in orders)
        members = [[group[i] for i in order] for group, order in zip(members, orders, strict=True)]
    size = settings.sub_group_size
    if mesh.tp == 1 and stage3:
        return per_parameter_layout(_placed_sub_groups(members, ranks, size), ranks), False
    if mesh.tp == 1:
        return flat_layout(_flat_groups(members, ranks), ranks), ordered

    def zero(of_rank: Sequence[Sequence[PlannedParameter]]) -> list[list[StoredParameter]]:
        if stage3:
            return [sub_group(g, i, ranks) for i, g in enumerate(_placed_sub_groups(of_rank, ranks, size))]
        return [group.stored(i, ranks) for i, group in enumerate(_flat_groups(of_rank, ranks))]

    buffers = over_tensor_parallel_ranks(members, mesh.tp, ranks, zero)
    matrices = matrix_layouts([p for buffer in buffers for p in buffer])
    phases = tuple((number,) for number in range(len(buffers)))
    kind = "per_parameter" if stage3 else "flat"
    return Layout(kind, mesh.stage_ranks, matrices, phases, complete_gradients=True), ordered


def _flat_groups(members: Sequence[Sequence[PlannedParameter]], ranks: int) -> list[FlatGroup]:
    """Stages 1 and 2: the parameters of each group, concatenated and cut into slices."""
    numels = [[p.numel for p in group] for group in members]
    return [FlatGroup(_end_to_end(g, n), slice_elements(n, ranks)) for g, n in zip(members, numels, strict=True)]


def _placed_sub_groups(
    members: Sequence[Sequence[PlannedParameter]], ranks: int, size: int
) -> list[tuple[PlacedParameter, ...]]:
    """Stage 3: the slices of each sub-group's parameters, concatenated."""
    groups = [g for group in members for g in sub_groups(group, ranks, size)]
    return [_end_to_end(g, [slice_length(p.numel, ranks) for p in g]) for g in groups]


def _end_to_end(parameters: Sequence[PlannedParameter], lengths: Sequence[int]) -> tuple[PlacedParameter, ...]:
    placed = []
    at = 0
    for p, length in zip(parameters, lengths, strict=True):
        placed.append(PlacedParameter(p.name, p.numel, at, p.matrices))
        at += length
    return tuple(placed)


def sub_groups(parameters: Sequence[PlannedParameter], world: int, size: int) -> list[list[PlannedParameter]]:
    """Stage 3's sub-groups: their slices reach `size` elements per rank (`_create_fp16_sub_groups`)."""
    groups: list[list[PlannedParameter]] = [[]]
    reached = 0
    for p in parameters:
        if reached >= size:
            groups.append([])
            reached = 0
        groups[-1].append(p)
        reached += slice_length(p.numel, world)
    return groups
