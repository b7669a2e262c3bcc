"""The truth in thirty lines: what every sharded, bucketed, overlapped path must equal.

The update rule is Keller Jordan's (https://kellerjordan.github.io/posts/muon/) as in `torch.optim.Muon`.
"""

from __future__ import annotations

import math

import torch

from muon_dist.layout.fragment import Matrix
from muon_dist.numerics import newton_schulz


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
) -> None:
    """One Muon step of one parameter, in place, matrix by matrix, on whole tensors.

    Args:
        parameter, gradient, momentum_buffer: of one shape; the buffer is fp32 and starts at zero.
        matrices: how the parameter is cut (`cut_parameter`).
    """
    momentum_buffer.lerp_(gradient.float(), 1 - momentum)
    update = gradient.float().lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    parameter.mul_(1 - lr * weight_decay)
    for m in matrices:

        def block(tensor: torch.Tensor, m: Matrix = m) -> torch.Tensor:
            return tensor.as_strided((m.rows, m.cols), (m.stride, 1), tensor.storage_offset() + m.start)

        out, fan_in = m.fan
        factor = {"match_rms_adamw": 0.2 * math.sqrt(max(out, fan_in)), "spectral": math.sqrt(max(1, out / fan_in))}
        orthogonalized = newton_schulz(block(update.contiguous()), ns_steps, ns_schedule, ns_dtype)
        block(parameter).sub_(orthogonalized.to(parameter.dtype), alpha=lr * factor.get(scale, 1.0))
