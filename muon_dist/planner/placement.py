"""Where each framework keeps the parameters: the layout that the optimizer would bind to, and bytes of memory a rank.

The rules are those of DeepSpeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py), of FSDP2 and of DDP; the tests
compare the layouts with those that the adapters find on real engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from muon_dist.errors import ConfigError
from muon_dist.layout import (
    FlatGroup,
    Layout,
    PlacedParameter,
    ShardedParameter,
    dtensor_layout,
    flat_layout,
    per_parameter_layout,
    replicated_layout,
)
from muon_dist.layout.per_parameter import slice_length
from muon_dist.partition_order import partition_order, slice_elements
from muon_dist.planner.model import PlannedParameter, Settings, Workload

LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")


@dataclass(frozen=True)
class Placement:
    """The layout of Muon's matrices, and what lies on one rank, in bytes, whatever the optimizer's owners are.

    Attributes:
        kind: one of LAYOUTS.
        layout: of the matrices.
        ordered: Muon's group is in the order of `partition_order`.
        weights: as the model computes with them.
        gradients: at their peak, after the last backward pass.
        master: fp32 copies.
        adamw: both moments of AdamW's groups.
        working: weights gathered for the layer at work, and its gradients.
    """

    kind: str
    layout: Layout
    ordered: bool
    weights: float
    gradients: float
    master: float
    adamw: float
    working: float


def place(workload: Workload, settings: Settings, kind: str, world: int, per_node: int) -> Placement:
    """The placement of `workload` on `world` ranks. Raises ConfigError for an unknown or impossible kind."""
    if kind not in LAYOUTS:
        raise ConfigError(f"--layout {kind}: use one of {', '.join(LAYOUTS)}")
    if kind == "hsdp" and world % per_node:
        raise ConfigError(f"--layout hsdp: {world} ranks are not a multiple of {per_node} a node")
    low = 2 if settings.low_precision else 4
    total, adamw = workload.parameters, workload.adamw_elements
    sharded = per_node if kind == "hsdp" else 1 if kind == "ddp" else world
    layer = low * 2 * total / max(workload.layers, 1)  # weights and gradients of a layer
    layout, ordered = _layout(workload, settings, kind, world, per_node)
    if kind == "ddp":
        # autocast: weights stay fp32 and so do gradients, DDP's buckets are their storage
        figures = (4.0 * total, 4.0 * total, 0.0, 8.0 * adamw, 0.0)
    elif kind in ("zero1", "zero2"):
        gradients = low * total / (world if kind == "zero2" else 1)
        figures = (low * total, gradients, 4.0 * total / world, 8.0 * adamw / world, 0.0)
    elif kind == "zero3":
        figures = (low * total / world, low * total / world, 4.0 * total / world, 8.0 * adamw / world, layer)
    else:
        figures = (4.0 * total / sharded, 4.0 * total / sharded, 0.0, 8.0 * adamw / sharded, layer)
    return Placement(kind, layout, ordered, *figures)


def _layout(workload: Workload, settings: Settings, kind: str, world: int, per_node: int) -> tuple[Layout, bool]:
    muon = workload.muon
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
    mesh = (world // per_node, per_node) if kind == "hsdp" else (world,)
    cuts = (None, 0) if kind == "hsdp" else (0,)
    ranks = tuple(range(world))
    return dtensor_layout(
        [ShardedParameter(p.name, p.shape, mesh, ranks, cuts, p.matrices) for p in muon], world
    ), False


def _end_to_end(parameters: list[PlannedParameter], lengths: list[int]) -> tuple[PlacedParameter, ...]:
    placed = []
    at = 0
    for p, length in zip(parameters, lengths, strict=True):
        placed.append(PlacedParameter(p.name, p.numel, at, p.matrices))
        at += length
    return tuple(placed)


def sub_groups(parameters: tuple[PlannedParameter, ...], world: int, size: int) -> list[list[PlannedParameter]]:
    """Stage 3's sub-groups: parameters until their slices reach `size` elements a rank (`_create_fp16_sub_groups`)."""
    groups: list[list[PlannedParameter]] = [[]]
    reached = 0
    for p in parameters:
        if reached >= size:
            groups.append([])
            reached = 0
        groups[-1].append(p)
        reached += slice_length(p.numel, world)
    return groups
