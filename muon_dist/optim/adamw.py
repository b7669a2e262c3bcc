"""The AdamW half of the optimizer: torch's own arithmetic, on whatever tensors the framework keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
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


AdamWork = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The parameter that the state belongs to, this rank's part of it, and the gradient of that part."""


@torch.no_grad()
def adamw_step(
    group: Group,
    state: MutableMapping[torch.Tensor, Any],
    work: list[AdamWork],
    local: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    part_bytes: int = 2**28,
) -> None:
    """One AdamW step; state is made on first use.

    Parameters are stepped in lists of at most `part_bytes`, a larger one alone: torch allocates once more what a list
    holds. `local` gives this rank's part of a state tensor.
    """
    for parameter, _, _ in work:
        if "exp_avg" not in state[parameter]:
            state[parameter].update(adamw_state(parameter))
    beta1, beta2 = group["betas"]
    for part in _in_parts(work, part_bytes):
        states = [state[p] for p, _, _ in part]
        adamw(
            [p for _, p, _ in part],
            [g for _, _, g in part],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            foreach=any(p.device.type != "cpu" for _, p, _ in part),  # as torch.optim.AdamW by default, bit for bit
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _in_parts(work: list[AdamWork], part_bytes: int) -> Iterator[list[AdamWork]]:
    part: list[AdamWork] = []
    taken = 0
    for item in work:
        size = item[1].numel() * item[1].element_size()
        if part and taken + size > part_bytes:
            yield part
            part, taken = [], 0
        part.append(item)
        taken += size
    if part:
        yield part
