"""How each framework stores the parameters: the layout that the optimizer would use, and bytes per rank.

The rules are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), of FSDP2 and of DDP; the tests
compare the layouts with those that the adapters find on real engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from muon_dist.layout import (
    FlatGroup,
    Layout,
    PlacedParameter,
    dtensor_layout,
    flat_layout,
    per_parameter_layout,
    replicated_layout,
)
from muon_dist.layout.per_parameter import slice_length
from muon_dist.partition_order import partition_order, slice_elements
from muon_dist.planner.mesh import LAYOUTS, Mesh, make_mesh
from muon_dist.planner.model import PlannedParameter, Settings, Workload
from muon_dist.planner.sharding import largest_part, sharded_parameter, whole_parts

__all__ = ["LAYOUTS", "Held", "Placement", "held_bytes", "place", "place_on", "sub_groups"]


@dataclass(frozen=True)
class Held:
    """Bytes on the fullest rank, for any owners.

    Attributes:
        weights: as the model computes with them.
        gradients: at their peak, after the last backward pass.
        master: fp32 copies.
        adamw: both moments of AdamW's groups.
        working: weights gathered for the layer at work, and its gradients.
    """

    weights: float
    gradients: float
    master: float
    adamw: float
    working: float


@dataclass(frozen=True)
class Placement:
    """The layout of Muon's matrices on the ranks of a mesh, and whether Muon's group was put into the order of
    `partition_order`."""

    mesh: Mesh
    layout: Layout
    ordered: bool


def place(workload: Workload, settings: Settings, kind: str, world: int, per_node: int) -> Placement:
    """The placement of `workload` on `world` ranks of data parallelism. Raises ConfigError as `make_mesh`."""
    return place_on(workload, settings, make_mesh(kind, world, per_node))


def place_on(workload: Workload, settings: Settings, mesh: Mesh) -> Placement:
    """The placement of one pipeline stage, whose part of the model is `workload`, on the ranks of the stage."""
    layout, ordered = _layout(workload, settings, mesh)
    return Placement(mesh, layout, ordered)


def held_bytes(workload: Workload, settings: Settings, mesh: Mesh) -> Held:
    """Bytes of the rank with most, of a stage whose part of the model is `workload`."""
    low = 2 if settings.low_precision else 4
    total, adamw, world = workload.parameters, workload.adamw_elements, mesh.stage_ranks
    layers = max(workload.layers, 1)
    layer = low * 2 * total / layers  # weights and gradients of a layer
    if mesh.layout == "ddp":
        # autocast: weights stay fp32 and so do gradients, DDP's buckets are their storage
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
    if kind in ("zero1", "zero2"):
        flat, ordered = [], False
        for members in workload.by_muon_group:
            order = partition_order([p.matrices for p in members], world if settings.ordered else 1)
            numels = [members[i].numel for i in order]
            placed = _end_to_end([members[i] for i in order], numels)
            flat.append(FlatGroup(placed, slice_elements(numels, world)))
            ordered = ordered or order != list(range(len(members)))
        return flat_layout(flat, world), ordered
    if kind == "zero3":
        sub = [
            _end_to_end(g, [slice_length(p.numel, world) for p in g])
            for members in workload.by_muon_group
            for g in sub_groups(members, world, settings.sub_group_size)
        ]
        return per_parameter_layout(sub, world), False
    return dtensor_layout([sharded_parameter(p, mesh) for p in muon], world), False


def _end_to_end(parameters: list[PlannedParameter], lengths: list[int]) -> tuple[PlacedParameter, ...]:
    placed = []
    at = 0
    for p, length in zip(parameters, lengths, strict=True):
        placed.append(PlacedParameter(p.name, p.numel, at, p.matrices))
        at += length
    return tuple(placed)


def sub_groups(parameters: tuple[PlannedParameter, ...], world: int, size: int) -> list[list[PlannedParameter]]:
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
