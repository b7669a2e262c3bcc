"""A plan: everything that a run will cost, in plain numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from muon_dist.cost import CostModel
from muon_dist.errors import ConfigError
from muon_dist.exchange.schedule import bucket_elements, bytes_of_two_buckets, largest_end, moves
from muon_dist.measured_cost import measure
from muon_dist.numerics import compute_dtype, get_schedule, newton_schulz_flops
from muon_dist.ownership import OwnershipPlan, assign_owners, stack_length
from muon_dist.planner.devices import COLLECTIVE_SECONDS, LINK_SHARE, TRAINING_SHARE, Device
from muon_dist.planner.estimate import (
    BETWEEN,
    INSIDE,
    Exchange,
    buckets_of,
    exchange_of,
    momentum_bytes,
    newton_schulz_seconds,
)
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.placement import Placement, place


@dataclass(frozen=True)
class Plan:
    """The figures of one run; bytes and seconds, of the rank that has most where ranks differ.

    Attributes:
        memory: part -> bytes on a rank.
        moved: part -> (bytes received inside the node, between nodes) by a rank, on average.
        busiest: bytes that the busiest rank receives for Muon, (inside, between).
        collectives, buckets: of Muon's exchange in a step.
        newton_schulz: seconds: "mean" and "max" over the ranks, "in buckets" when each bucket waits for its slowest
            owner, "round robin" the maximum if owners were dealt in turn.
        largest: seconds of the largest single matrix, below which no balance can go.
        seconds: part of a step -> seconds.
        overhead: of Muon over AdamW, as a share of AdamW's step.
        advice: what would be better.
    """

    model: str
    device: str
    layout: str
    ranks: int
    per_node: int
    matrices: int
    elements: tuple[int, int]
    ordered: bool
    memory: dict[str, float]
    moved: dict[str, tuple[float, float]]
    busiest: tuple[float, float]
    collectives: int
    buckets: int
    newton_schulz: dict[str, float]
    largest: float
    teraflops: float
    seconds: dict[str, float]
    overhead: float
    advice: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {name: dict(v) if isinstance(v, dict) else v for name, v in vars(self).items()} | {
            "memory_total": sum(self.memory.values()),
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
) -> Plan:
    """Plan `workload` on `nodes` machines of `per_node` ranks.

    Args:
        cost: seconds of Newton-Schulz and of moves; from the device by default.

    Raises:
        ConfigError: an unknown layout, or numbers that do not fit.
    """
    if nodes < 1 or per_node < 1:
        raise ConfigError(f"--nodes {nodes} --gpus-per-node {per_node}: both must be at least 1")
    world = nodes * per_node
    dtype = iteration_dtype(settings, device)
    model = cost or cost_model(workload, settings, device, world, dtype)
    placement = place(workload, settings, layout, world, per_node)
    wire = settings.wire_dtype
    there, back = (wire or torch.float32).itemsize, (wire or dtype).itemsize
    owners = _owners(placement, settings, model, dtype)
    buckets = buckets_of(owners, _bound(owners, settings, dtype), settings.overlap, device.type)
    exchange = exchange_of(owners, buckets, per_node=per_node, gather_bytes=there, scatter_bytes=back)
    loads, waiting = newton_schulz_seconds(owners, buckets, model, settings.iterations, dtype)
    dealt = _round_robin(owners, model, settings, dtype)
    moved = {"AdamW": _adamw_bytes(workload, settings, layout, world, per_node)}
    moved["Muon"] = _pair(exchange.received.mean(axis=1))
    seconds = _seconds(workload, settings, device, placement, exchange, waiting, moved["AdamW"], owners)
    shapes = Counter((m.matrix.rows, m.matrix.cols) for m in owners.layout.matrices)
    return Plan(
        model=workload.name,
        device=device.name,
        layout=layout,
        ranks=world,
        per_node=per_node,
        matrices=len(owners.layout.matrices),
        elements=(workload.muon_elements, workload.adamw_elements),
        ordered=placement.ordered,
        memory=_memory(workload, settings, placement, owners, buckets, device, dtype),
        moved=moved,
        busiest=_pair(exchange.received.max(axis=1)),
        collectives=exchange.collectives,
        buckets=exchange.buckets,
        newton_schulz={
            "mean": float(loads.mean()),
            "max": float(loads.max()),
            "in buckets": waiting,
            "round robin": dealt,
        },
        largest=max(model.orthogonalize(*shape, settings.iterations, dtype) for shape in shapes),
        teraflops=sum(n * newton_schulz_flops(*s, settings.iterations) for s, n in shapes.items()) / 1e12,
        seconds=seconds,
        overhead=_overhead(seconds),
    )


def _owners(placement: Placement, settings: Settings, model: CostModel, dtype: torch.dtype) -> OwnershipPlan:
    """As `Muon.bind` chooses them."""
    return assign_owners(
        placement.layout,
        policy=settings.owner_policy,
        cost=model,
        steps=lambda m: settings.iterations,
        dtype=lambda m: dtype,
        bytes_per_element=(settings.wire_dtype or torch.float32).itemsize,
    )


def _bound(owners: OwnershipPlan, settings: Settings, dtype: torch.dtype) -> int:
    """Elements of the largest bucket, as `optim.compiler` takes them."""
    messages = moves(owners, range(len(owners.layout.matrices)))
    return bucket_elements(int(settings.bucket_mb * 2**20), dtype.itemsize, messages)


def _pair(both: np.ndarray) -> tuple[float, float]:
    return float(both[INSIDE]), float(both[BETWEEN])


def _overhead(seconds: dict[str, float]) -> float:
    """Of Muon over AdamW, as a share of AdamW's step: communication hides behind arithmetic where it is shorter."""
    adamw = max(seconds["forward and backward"], seconds["AdamW's communication"]) + seconds["AdamW's update"]
    muon = seconds["momentum and update"] + max(seconds["Newton-Schulz"], seconds["exchange"])
    return (muon - seconds["AdamW's update of Muon's"]) / adamw


def iteration_dtype(settings: Settings, device: Device) -> torch.dtype:
    """The dtype of Newton-Schulz on `device`, which may be another machine's: fp16 on a GPU unless one is asked."""
    given = settings.ns_dtype
    if given is None and device.name not in ("cpu", "measured") and not get_schedule(settings.ns_schedule).fp32_only:
        return torch.float16
    here = "cuda" if device.name == "measured" and torch.cuda.is_available() else "cpu"
    return compute_dtype(given, torch.device(here), settings.ns_schedule)


def cost_model(workload: Workload, settings: Settings, device: Device, world: int, dtype: torch.dtype) -> CostModel:
    """Of `device`: analytic, or timed on this machine if that is what the device is."""
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


def _adamw_bytes(
    workload: Workload, settings: Settings, layout: str, world: int, per_node: int
) -> tuple[float, float]:
    """Bytes that a rank receives (inside its node, from others) in a step for what AdamW needs as well.

    Gradients and weights by rings: an all-reduce is 2 (W - 1) / W of the elements, a gather or a reduce-scatter half
    of that (Patarasuk and Yuan 2009). A ring crosses from node to node once a node, through all cards in turn.
    DDP: one all-reduce in fp32. ZeRO-1: one all-reduce of 16-bit gradients and a gather of weights; ZeRO-2 reduces in
    every micro-batch. ZeRO-3 and FSDP2: two gathers and a reduce-scatter in each micro-batch, at most; HSDP beside
    these, inside the node, an all-reduce of the shard between nodes.
    """
    low = 2 if settings.low_precision else 4
    total, rounds = float(workload.parameters), settings.accumulation

    def ring(ranks: int, volume: float) -> float:
        return (ranks - 1) / ranks * volume

    if layout == "hsdp":
        copies = world // per_node
        inside = rounds * ring(per_node, total * (2 * low + 4))
        return inside, 2 * ring(copies, total * 4 / per_node) if copies > 1 else 0.0
    volume = {
        "ddp": 2 * 4 * total,
        "zero1": (2 + 1) * low * total,
        "zero2": (2 * rounds + 1) * low * total,
        "zero3": 3 * rounds * low * total,
        "fsdp2": rounds * (2 * low + 4) * total,
    }[layout]
    received = ring(world, volume)
    between = received / per_node if world > per_node else 0.0
    return received - between, between


def _seconds(
    workload: Workload,
    settings: Settings,
    device: Device,
    placement: Placement,
    exchange: Exchange,
    waiting: float,
    adamw_bytes: tuple[float, float],
    owners: OwnershipPlan,
) -> dict[str, float]:
    """Parts of a step; what is elementwise runs at the bandwidth of memory."""
    inside, between = device.inside * LINK_SHARE, device.between * LINK_SHARE
    peak = (device.half if settings.low_precision else device.single) * TRAINING_SHARE
    recompute = 4 / 3 if settings.checkpointing else 1.0  # the forward pass once more
    world = owners.layout.world_size
    shards = _shards(placement)
    momentum = _momentum_bytes(workload, settings, placement, owners)
    held = 4.0 * workload.muon_elements / shards
    return {
        "forward and backward": workload.flops_per_token * settings.tokens * recompute / peak,
        "AdamW's communication": adamw_bytes[0] / inside + adamw_bytes[1] / between,
        # weight, gradient and both moments read, weight and moments written: 7 passes of fp32
        "AdamW's update": 7 * 4.0 * workload.parameters / shards / device.memory_bandwidth,
        "AdamW's update of Muon's": 7 * held / device.memory_bandwidth,
        # momentum and gradient read, momentum written; stacks written; weight decay and update, read and written
        "momentum and update": (4 * momentum + 6 * held) / device.memory_bandwidth,
        "Newton-Schulz": waiting,
        "exchange": exchange.seconds(inside, between, COLLECTIVE_SECONDS if world > 1 else 0.0),
    }


def _shards(placement: Placement) -> int:
    """Ranks over which one copy of the model is cut."""
    world = placement.layout.world_size
    if placement.kind == "hsdp":
        return world // len(set(placement.layout.domains or (0,)))
    return 1 if placement.kind == "ddp" else world


def _momentum_bytes(workload: Workload, settings: Settings, placement: Placement, owners: OwnershipPlan) -> float:
    """Of the rank that keeps the most."""
    needed = float(momentum_bytes(owners).max())
    kept = 4.0 * workload.muon_elements / _shards(placement)
    return max(needed, kept) if settings.momentum_everywhere else needed


def nccl_bytes(world: int) -> float:
    """What NCCL itself allocates on a GPU, outside torch's allocator; an estimate that no GPU has confirmed.

    A communicator has 16 channels of 4 MiB (NCCL_BUFFSIZE) each way. An all-to-all opens 2 channels to every peer.
    """
    buffer = 4 * 2**20
    return 0.0 if world == 1 else float(2 * buffer * (16 + 2 * (world - 1)))


def _memory(
    workload: Workload,
    settings: Settings,
    placement: Placement,
    owners: OwnershipPlan,
    buckets: list[list[tuple[int, ...]]],
    device: Device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Bytes of a rank. Activations are an estimate: 34 bytes a token, layer and hidden unit in 16 bits with fused
    attention, 2 with checkpointing and one layer besides (Korthikanti et al. 2022, arXiv 2205.05198, section 4); the
    logits in fp32 and in 16 bits."""
    tokens = settings.sequence_length * settings.micro_batch
    scale = 1.0 if settings.low_precision else 2.0
    full = 34 * scale * tokens * workload.hidden
    layers = 2 * scale * tokens * workload.hidden * workload.layers + full if settings.checkpointing else None
    every = range(len(owners.layout.matrices))
    alone = bytes_of_two_buckets(dtype.itemsize, moves(owners, every)) * max(
        (largest_end(owners, i) for i in every), default=0
    )
    return {
        "weights": placement.weights,
        "gradients": placement.gradients,
        "master weights": placement.master,
        "momentum": _momentum_bytes(workload, settings, placement, owners),
        "AdamW's moments": placement.adamw,
        "Muon's buckets": float(max(2 * settings.bucket_mb * 2**20, alone)) if buckets else 0.0,
        "gathered layers": placement.working,
        "NCCL's buffers (estimate)": nccl_bytes(owners.layout.world_size) if device.type == "cuda" else 0.0,
        "activations (estimate)": (layers or full * workload.layers) + 6.0 * tokens * workload.vocabulary,
    }
