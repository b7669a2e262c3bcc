"""The AdamW half of the optimizer: torch's own arithmetic, on whatever tensors the framework keeps."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch.optim.adamw import adamw

from muon_dist.optim.binding import Group


def adamw_state(parameter: torch.Tensor) -> dict[str, Any]:
    """Fresh state with torch's names: `step`, `exp_avg`, `exp_avg_sq`."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


@torch.no_grad()
def adamw_step(
    group: Group, state: MutableMapping[torch.Tensor, Any], work: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """One AdamW step of (parameter, gradient) pairs; state is made on first use."""
    for parameter, _ in work:
        if "exp_avg" not in state[parameter]:
            state[parameter].update(adamw_state(parameter))
    states = [state[p] for p, _ in work]
    beta1, beta2 = group["betas"]
    adamw(
        [p for p, _ in work],
        [g for _, g in work],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
