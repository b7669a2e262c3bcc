"""Norms of whole matrices, and multiplication of weights by one factor per matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scale_weights(weights: Sequence[Tensor], positions: Sequence[int], factors: Tensor) -> None:
    """Multiply `weights[i]` by `factors[positions[i]]`, in place; `factors` is (n,) in fp64."""
    if not weights:
        return
    if any(w.device != factors.device for w in weights):
        factors = factors.cpu()  # a 0-d CPU tensor can multiply a tensor on any device
    each = factors.unbind()
    torch._foreach_mul_(list(weights), [each[p] for p in positions])


def stack_norms(stack: Tensor) -> Tensor:
    """The Frobenius norm of every matrix of a stack (B, M, N), as (B, 1, 1)."""
    rows = torch.linalg.vector_norm(stack, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
