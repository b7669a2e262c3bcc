"""The algorithm in a few lines; every sharded, bucketed or overlapped step must give its result. Read it first.

The update rule is Keller Jordan's (https://kellerjordan.github.io/posts/muon/) as in `torch.optim.Muon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from muon_dist.layout import Matrix, view
from muon_dist.numerics import ScheduleLike, get_schedule

Iteration = Callable[[torch.Tensor], torch.Tensor]


def plain_newton_schulz(x: torch.Tensor, steps: int = 5, schedule: ScheduleLike = "keller") -> torch.Tensor:
    """An approximation of the polar factor U V^T of x = U S V^T, (rows, cols), in the dtype of `x`.

    Each step replaces every singular value s by a s + b s^3 + c s^5 and leaves U and V unchanged. The coefficients
    move the singular values towards 1.
    """
    if x.size(0) > x.size(1):
        return plain_newton_schulz(x.mT, steps, schedule).mT
    chosen = get_schedule(schedule)
    norm = x.norm()
    x = x / norm if norm > 0 else x  # now no singular value is above 1
    if chosen.normalization == "aol":
        x = x / (x @ x.mT).abs().sum(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    x = x / chosen.safety
    for a, b, c in chosen.coefficients(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor,
    matrices: tuple[Matrix, ...],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_schedule: str = "keller",
    ns_dtype: torch.dtype | None = None,
    scale: str = "match_rms_adamw",
    iteration: Iteration | None = None,
) -> None:
    """One Muon step of one parameter, in place, matrix by matrix, on whole tensors.

    Args:
        parameter, gradient, momentum_buffer: all of one shape; the buffer is fp32 and starts at zero.
        matrices: the matrices of the parameter (`cut_parameter`).
        iteration: orthogonalizes a matrix (rows, cols); by default `plain_newton_schulz`. Tests of communication pass
            the optimizer's own iteration and require equal bits.
    """
    gradient = gradient.float().contiguous()
    momentum_buffer.lerp_(gradient, 1 - momentum)
    update = gradient.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    parameter.mul_(1 - lr * weight_decay)
    for m in matrices:
        u = view(update, m.block)
        if iteration is not None:
            o = iteration(u)
        else:
            o = plain_newton_schulz(u.to(ns_dtype or u.dtype), ns_steps, ns_schedule)
        out, fan_in = m.fan
        factors = {
            "match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)),
            "spectral": math.sqrt(max(1, out / fan_in)),
            "none": 1.0,
        }
        view(parameter, m.block).sub_(o.to(parameter.dtype), alpha=lr * factors[scale])
