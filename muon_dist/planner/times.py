"""Predicted seconds of a step by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from muon_dist.planner.communication import DATA_AXES, Links
from muon_dist.planner.devices import LINK_SHARE, TRAINING_SHARE, Device
from muon_dist.planner.mesh import Mesh
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.placement import Held


def seconds_of(
    workload: Workload,
    settings: Settings,
    device: Device,
    mesh: Mesh,
    axes: Mapping[str, Links],
    *,
    held: Held,
    momentum: float,
    newton_schulz: float,
    exchange: float,
) -> dict[str, float]:
    """Predicted seconds of a step of one pipeline stage, by part; elementwise work runs at memory bandwidth.

    Args:
        axes: bytes of the step without Muon (`bytes_by_axis`). momentum: bytes of Muon's momentum on the rank with the
            most.
        newton_schulz, exchange: seconds.
    """
    peak = (device.half if settings.low_precision else device.single) * TRAINING_SHARE
    recompute = 4 / 3 if settings.checkpointing else 1.0  # the forward pass is computed twice
    tokens = settings.tokens / (mesh.cp * mesh.sp * mesh.tp)
    arithmetic = workload.flops_per_token * tokens * recompute / peak
    data = _seconds((links for axis, links in axes.items() if axis in DATA_AXES), device)
    inside_layers = _seconds((links for axis, links in axes.items() if axis not in DATA_AXES), device)
    updated = held.master or held.weights  # fp32 bytes
    ours = updated * workload.muon_elements / max(workload.parameters, 1)
    found = {
        "forward and backward": arithmetic,
        "activations' communication": inside_layers,
        # a pipeline of p stages is idle for p - 1 micro-batches (Narayanan et al. 2021, arXiv 2104.04473, 2.2.1)
        "pipeline bubble": (arithmetic + inside_layers) * (mesh.pp - 1) / settings.accumulation,
        "AdamW's communication": data,
        # weight, gradient and both moments read, weight and moments written: 7 passes of fp32
        "AdamW's update": 7 * updated / device.memory_bandwidth,
        "AdamW's update of Muon's": 7 * ours / device.memory_bandwidth,
        # momentum and gradient read, momentum written; stacks written; weight decay and update, read and written
        "momentum and update": (4 * momentum + 6 * ours) / device.memory_bandwidth,
        "Newton-Schulz": newton_schulz,
        "exchange": exchange,
    }
    optional = ("activations' communication", "pipeline bubble")
    return {name: value for name, value in found.items() if value or name not in optional}


def _seconds(links: Iterable[Links], device: Device) -> float:
    inside, between = device.inside * LINK_SHARE, device.between * LINK_SHARE
    return sum(there / inside + other / between for there, other in links)


def adamw_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds of a step if AdamW trained all parameters. Gradients and weights are sent while layers compute. For
    activations ranks wait, so this is an upper bound."""
    layers = sum(
        seconds.get(n, 0.0) for n in ("forward and backward", "activations' communication", "pipeline bubble")
    )
    return max(layers, seconds["AdamW's communication"]) + seconds["AdamW's update"]


def muon_seconds(seconds: Mapping[str, float]) -> float:
    """Seconds that Muon adds to `adamw_seconds`; the exchange is hidden if it is shorter than the arithmetic."""
    muon = seconds["momentum and update"] + max(seconds["Newton-Schulz"], seconds["exchange"])
    return muon - seconds["AdamW's update of Muon's"]
