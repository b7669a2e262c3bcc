"""Memory of a rank by purpose, in bytes."""

from __future__ import annotations

import torch

from muon_dist.exchange.schedule import bytes_of_two_buckets, largest_end, moves
from muon_dist.ownership import OwnershipPlan
from muon_dist.planner.devices import Device
from muon_dist.planner.mesh import Mesh
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.placement import Held

USABLE = 0.9
"""Share of a device's memory that a plan may fill; the rest is for fragmentation and the framework."""


def usable(device: Device) -> float:
    """Bytes of a device's memory that a plan may fill."""
    return USABLE * device.memory


def nccl_bytes(world: int) -> float:
    """Bytes that NCCL allocates on a GPU outside torch's allocator; an estimate, not confirmed on a GPU.

    A communicator has 16 channels of 4 MiB (NCCL_BUFFSIZE) each way. An all-to-all opens 2 channels to every peer.
    """
    buffer = 4 * 2**20
    return 0.0 if world == 1 else float(2 * buffer * (16 + 2 * (world - 1)))


def activation_bytes(workload: Workload, settings: Settings, mesh: Mesh) -> float:
    """An estimate for a stage of a pipeline, logits included.

    34 bytes per token, layer and hidden unit in 16 bits with fused attention. Tensor parallelism divides 24 of the 34.
    With recomputation 2 bytes, plus one layer (Korthikanti et al. 2022, arXiv 2205.05198, sections 4.1 and 4.2). cp
    and sp divide the tokens. The first stage of a pipeline holds as many micro-batches as there are stages (1F1B,
    Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Logits in fp32 and in 16 bits, whole on each tp rank.
    """
    tokens = settings.sequence_length * settings.micro_batch / (mesh.cp * mesh.sp)
    scale = 1.0 if settings.low_precision else 2.0
    full = (10 + 24 / mesh.tp) * scale * tokens * workload.hidden
    waiting = min(mesh.pp, settings.accumulation)
    if settings.checkpointing:
        layers = 2 * scale * tokens * workload.hidden * workload.layers * waiting + full
    else:
        layers = full * workload.layers * waiting
    return layers + 6.0 * tokens * workload.vocabulary


def bucket_bytes(settings: Settings, owners: OwnershipPlan, dtype: torch.dtype) -> float:
    """Muon's two buckets: `bucket_mb` each, or more if a single matrix is larger."""
    every = range(len(owners.layout.matrices))
    also = len(settings.rule.sends) + settings.rule.gradient_stays
    alone = bytes_of_two_buckets(dtype.itemsize, moves(owners, every), also) * max(
        (largest_end(owners, i) for i in every), default=0
    )
    return float(max(2 * settings.bucket_mb * 2**20, alone)) if every else 0.0


def memory_of(
    workload: Workload,
    settings: Settings,
    mesh: Mesh,
    device: Device,
    *,
    held: Held,
    momentum: float,
    buckets: float,
) -> dict[str, float]:
    """Bytes of the rank with most memory in one pipeline stage. momentum, buckets: Muon's."""
    return {
        "weights": held.weights,
        "gradients": held.gradients,
        "master weights": held.master,
        "momentum": momentum,
        "AdamW's moments": held.adamw,
        "Muon's buckets": buckets,
        "gathered layers": held.working,
        "NCCL's buffers (estimate)": nccl_bytes(mesh.stage_ranks) if device.type == "cuda" else 0.0,
        "activations (estimate)": activation_bytes(workload, settings, mesh),
    }
