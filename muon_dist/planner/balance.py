"""The balance of Newton-Schulz over many ranks, for any layout: the table of docs/plan.md."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muon_dist.layout import replicated_layout
from muon_dist.ownership import OwnershipPlan, assign_owners
from muon_dist.ownership.cost import CostModel
from muon_dist.planner.devices import Device
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.plan import iteration_dtype

Row = tuple[str, int, int, float, float, float, float]
"""model, matrices, ranks, even share in seconds, and max / mean of: the lower bound, our owners, round-robin owners"""


def balance(workload: Workload, settings: Settings, device: Device, ranks: Sequence[int]) -> list[Row]:
    """Load of the busiest rank divided by the mean, for each number of ranks.

    The lower bound is 1, or the largest matrix divided by the mean if that is more: a matrix is never split.
    """
    dtype, model = iteration_dtype(settings, device), CostModel(device.matmul(iteration_dtype(settings, device)))
    rows = []
    for world in ranks:
        layout = replicated_layout([p.matrices for p in workload.muon], world)
        plans = (
            assign_owners(
                layout, policy=policy, cost=model, steps=lambda m: settings.iterations, dtype=lambda m: dtype
            )
            for policy in ("balanced", "round_robin")
        )
        seconds = [
            model.orthogonalize(m.matrix.rows, m.matrix.cols, settings.iterations, dtype) for m in layout.matrices
        ]
        mean = sum(seconds) / world
        ours, dealt = (_busiest(plan, seconds) / mean for plan in plans)
        rows.append((workload.name, len(seconds), world, mean, max(1.0, max(seconds) / mean), ours, dealt))
    return rows


def _busiest(plan: OwnershipPlan, seconds: Sequence[float]) -> float:
    return float(np.bincount(plan.owners, weights=seconds, minlength=plan.layout.world_size).max())


def markdown(rows: Sequence[Row]) -> str:
    """A table of `balance`."""
    lines = [
        "| model | matrices | ranks | even share, ms | best possible | ours (LPT) | round-robin |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, matrices, ranks, mean, best, ours, dealt in rows:
        lines.append(
            f"| {model} | {matrices:,} | {ranks} | {mean * 1e3:.1f} | {best:.2f} | {ours:.2f} | {dealt:.2f} |"
        )
    return "\n".join(lines)
