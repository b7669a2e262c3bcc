"""The AdamW half of the optimizer: torch's own arithmetic, on the tensors that the framework keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch.optim.adamw import adamw

from muon_dist.optim.binding import Group
from muon_dist.optim.rounding import AdamWRounding, is_narrow


def adamw_state(parameter: torch.Tensor, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Fresh state with torch's names: `step`, `exp_avg`, `exp_avg_sq`. dtype: by default the parameter's."""
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format, dtype=dtype),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format, dtype=dtype),
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
    rounding: AdamWRounding | None = None,
) -> None:
    """One AdamW step; state is made on first use.

    Parameters are stepped in lists of at most `part_bytes`, because torch allocates as much memory as a list holds. A
    larger parameter is a list of its own. `local` returns this rank's part of a state tensor. `rounding`: step 16-bit
    parameters in fp32 and round them stochastically. With `rounding`, or if the part is an fp32 master, the moments
    are fp32 too.
    """
    for parameter, p, _ in work:
        if "exp_avg" not in state[parameter]:
            wide = is_narrow(parameter) and (rounding is not None or p.dtype != parameter.dtype)
            state[parameter].update(adamw_state(parameter, torch.float32 if wide else None))
    beta1, beta2 = group["betas"]
    for part in _in_parts(work, part_bytes):
        states = [state[p] for p, _, _ in part]
        weights = [p for _, p, _ in part]
        if rounding is not None:
            weights = [p.to(torch.float32) if is_narrow(p) else p for p in weights]
        adamw(
            weights,
            [g if p.dtype != torch.float32 else g.to(p.dtype) for p, (_, _, g) in zip(weights, part, strict=True)],
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
        if rounding is not None:
            for result, (parameter, p, _), s in zip(weights, part, states, strict=True):
                rounding.write(parameter, p, result, int(s["step"]))


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
