"""A plan: everything that a run will cost, in plain numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from muon_dist.errors import ConfigError
from muon_dist.exchange.schedule import bucket_elements, moves
from muon_dist.numerics import compute_dtype, get_schedule, newton_schulz_flops
from muon_dist.ownership import OwnershipPlan, assign_owners, stack_length
from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.measured_cost import measure
from muon_dist.planner.communication import Links, bytes_by_axis
from muon_dist.planner.devices import COLLECTIVE_SECONDS, LINK_SHARE, Device
from muon_dist.planner.estimate import (
    BETWEEN,
    INSIDE,
    Exchange,
    buckets_of,
    exchange_of,
    momentum_bytes,
    newton_schulz_seconds,
)
from muon_dist.planner.memory import bucket_bytes, memory_of, usable
from muon_dist.planner.mesh import Mesh, check_model, make_mesh, notes
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.placement import Placement, held_bytes, place_on
from muon_dist.planner.times import adamw_seconds, muon_seconds, seconds_of


@dataclass(frozen=True)
class Plan:
    """The figures of one run, in bytes and seconds; if ranks differ, those of the rank with most.

    Attributes:
        mesh: ranks by axis. Under pp the figures are those of the stage with the most parameters.
        run: micro_batch, sequence_length, accumulation, recomputation.
        tokens: tokens per step of the whole run. memory: part -> bytes per rank. usable: bytes of the device's memory
            that a plan may fill (`memory.USABLE`).
        axes: mesh axis -> (bytes received inside the node, between nodes) by a rank for everything except Muon.
        moved: part -> (bytes received inside the node, between nodes) by a rank, on average.
        busiest: bytes that the busiest rank receives for Muon, (inside, between).
        collectives, buckets: numbers of Muon's exchange per step.
        newton_schulz: seconds: "mean" and "max" over the ranks, "in buckets" if each bucket waits for its slowest
            owner, "round robin" the maximum with round-robin owners. largest: seconds of the largest matrix, a lower
            bound for every balance.
        seconds: part of a step -> seconds.
        overhead: of Muon over AdamW, as a share of AdamW's step. notes: requirements of this mesh. advice: better
            settings.
    """

    model: str
    device: str
    layout: str
    ranks: int
    per_node: int
    mesh: Mesh
    run: dict[str, int]
    tokens: int
    matrices: int
    elements: tuple[int, int]
    ordered: bool
    memory: dict[str, float]
    usable: float
    axes: dict[str, tuple[float, float]]
    moved: dict[str, tuple[float, float]]
    busiest: tuple[float, float]
    collectives: int
    buckets: int
    newton_schulz: dict[str, float]
    largest: float
    teraflops: float
    seconds: dict[str, float]
    overhead: float
    notes: tuple[str, ...] = field(default=())
    advice: tuple[str, ...] = field(default=())

    @property
    def memory_total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.memory_total <= self.usable

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: dict(v) if isinstance(v, dict) else v for name, v in vars(self).items()} | {
            "mesh": vars(self.mesh),
            "memory_total": self.memory_total,
            "balance": self.newton_schulz["max"] / self.newton_schulz["mean"],
        }


def make_plan(
    workload: Workload,
    settings: Settings,
    device: Device,
    *,
    layout: str,
    nodes: int,
    per_node: int,
    cost: CostModel | None = None,
    axes: Mapping[str, int] | None = None,
) -> Plan:
    """Plan `workload` on `nodes` machines of `per_node` ranks.

    Args:
        cost: seconds of Newton-Schulz and of moves; from the device by default.
        axes: ranks along the axes of a mesh (`mesh.OPTIONS`); by default only data parallelism.

    Raises:
        ConfigError: an unknown layout, or numbers that do not fit; names the option.
    """
    if nodes < 1 or per_node < 1:
        raise ConfigError(f"--nodes {nodes} --gpus-per-node {per_node}: both must be at least 1")
    mesh = make_mesh(layout, nodes * per_node, per_node, axes)
    check_model(mesh, workload, settings)
    return plan_on(mesh, workload, settings, device, cost)


def plan_on(mesh: Mesh, workload: Workload, settings: Settings, device: Device, cost: CostModel | None = None) -> Plan:
    """Plan `workload` on a `mesh` that fits it; the figures are those of the largest pipeline stage."""
    stage, world = workload.largest_stage(mesh.pp), mesh.stage_ranks
    dtype = iteration_dtype(settings, device)
    model = cost or cost_model(stage, settings, device, world, dtype)
    placement, held = place_on(stage, settings, mesh), held_bytes(stage, settings, mesh)
    owners = _owners(placement, settings, model, dtype)
    buckets = buckets_of(owners, _bound(owners, settings, dtype), settings.overlap, device.type)
    wire = settings.wire_dtype
    there, back = (wire or torch.float32).itemsize, (wire or dtype).itemsize
    gathers = 1 + len(settings.rule.sends)
    exchange = exchange_of(
        owners, buckets, per_node=mesh.per_node, gather_bytes=there, scatter_bytes=back, gathers=gathers
    )
    loads, waiting = newton_schulz_seconds(owners, buckets, model, settings.iterations, dtype)
    axes, momentum = bytes_by_axis(stage, settings, mesh), float(momentum_bytes(owners, settings.rule).max())
    if settings.momentum_everywhere:  # every rank with a copy keeps the momentum of its whole part
        momentum = max(momentum, (held.master or held.weights) * stage.muon_elements / max(stage.parameters, 1))
    parts = seconds_of(
        stage, settings, device, mesh, axes, held=held, momentum=momentum, newton_schulz=waiting,
        exchange=_exchange_seconds(exchange, device, world),
    )  # fmt: skip
    shapes = Counter((m.matrix.rows, m.matrix.cols) for m in owners.layout.matrices)
    return Plan(
        model=workload.name,
        device=device.name,
        layout=mesh.layout,
        ranks=mesh.ranks,
        per_node=mesh.per_node,
        mesh=mesh,
        run=settings.run,
        tokens=mesh.data * settings.tokens,
        matrices=len(owners.layout.matrices),
        elements=(stage.muon_elements, stage.adamw_elements),
        ordered=placement.ordered,
        memory=memory_of(
            stage, settings, mesh, device,
            held=held, momentum=momentum, buckets=bucket_bytes(settings, owners, dtype),
        ),
        usable=usable(device),
        axes=axes,
        moved={"AdamW": _sum(axes.values()), "Muon": _pair(exchange.received.mean(axis=1))},
        busiest=_pair(exchange.received.max(axis=1)),
        collectives=exchange.collectives,
        buckets=exchange.buckets,
        newton_schulz={
            "mean": float(loads.mean()),
            "max": float(loads.max()),
            "in buckets": waiting,
            "round robin": _round_robin(owners, model, settings, dtype),
        },
        largest=max((model.orthogonalize(*shape, settings.iterations, dtype) for shape in shapes), default=0.0),
        teraflops=sum(n * newton_schulz_flops(*s, settings.iterations) for s, n in shapes.items()) / 1e12,
        seconds=parts,
        overhead=muon_seconds(parts) / adamw_seconds(parts),
        notes=notes(mesh),
    )  # fmt: skip


def step_seconds(plan: Plan) -> float:
    """Predicted seconds of a whole step."""
    return adamw_seconds(plan.seconds) + muon_seconds(plan.seconds)


def _exchange_seconds(exchange: Exchange, device: Device, world: int) -> float:
    inside, between = device.inside * LINK_SHARE, device.between * LINK_SHARE
    return exchange.seconds(inside, between, COLLECTIVE_SECONDS if world > 1 else 0.0)


def _sum(links: Iterable[Links]) -> Links:
    every = list(links)
    return sum(inside for inside, _ in every), sum(between for _, between in every)


def _owners(placement: Placement, settings: Settings, model: CostModel, dtype: torch.dtype) -> OwnershipPlan:
    """The owners, chosen as in `Muon.bind`."""
    return assign_owners(
        placement.layout,
        policy=settings.owner_policy,
        cost=model,
        steps=lambda m: settings.iterations,
        dtype=lambda m: dtype,
        bytes_per_element=(settings.wire_dtype or torch.float32).itemsize,
    )


def _bound(owners: OwnershipPlan, settings: Settings, dtype: torch.dtype) -> int:
    """Elements of the largest bucket, counted as in `optim.compiler`."""
    messages = moves(owners, range(len(owners.layout.matrices)))
    also = len(settings.rule.sends) + settings.rule.gradient_stays
    return bucket_elements(int(settings.bucket_mb * 2**20), dtype.itemsize, messages, also)


def _pair(both: np.ndarray) -> tuple[float, float]:
    return float(both[INSIDE]), float(both[BETWEEN])


def iteration_dtype(settings: Settings, device: Device) -> torch.dtype:
    """The dtype of Newton-Schulz on `device`, which may be another machine's: the configured one, else fp16 on a
    GPU."""
    given = settings.ns_dtype
    if given is None and device.name not in ("cpu", "measured") and not get_schedule(settings.ns_schedule).fp32_only:
        return torch.float16
    here = "cuda" if device.name == "measured" and torch.cuda.is_available() else "cpu"
    return compute_dtype(given, torch.device(here), settings.ns_schedule)


def cost_model(workload: Workload, settings: Settings, device: Device, world: int, dtype: torch.dtype) -> CostModel:
    """The cost model of `device`: analytic, or timed if the device is this machine."""
    link = (device.between if world > 1 else device.inside) * LINK_SHARE
    analytic = CostModel(device.matmul(dtype), link)
    if device.name != "measured":
        return analytic
    shapes = Counter((min(m.rows, m.cols), max(m.rows, m.cols)) for p in workload.muon for m in p.matrices)
    stacks = {(*shape, n) for shape, count in shapes.items() for n in (1, stack_length(count, world))}
    return measure(
        stacks,
        steps=settings.ns_steps,
        schedule=settings.ns_schedule,
        dtype=dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        flops_per_second=analytic.flops_per_second,
        bytes_per_second=analytic.bytes_per_second,
    )


def _round_robin(owners: OwnershipPlan, model: CostModel, settings: Settings, dtype: torch.dtype) -> float:
    loads = np.zeros(owners.layout.world_size)
    known: dict[tuple[int, int], float] = {}
    for i, m in enumerate(owners.layout.matrices):
        shape = m.matrix.rows, m.matrix.cols
        if shape not in known:
            known[shape] = model.orthogonalize(*shape, settings.iterations, dtype)
        loads[i % len(loads)] += known[shape]
    return float(loads.max())
