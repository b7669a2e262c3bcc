"""Gradient norms over all ranks, separately for Muon's and AdamW's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muon_dist.adapters.fsdp2.storage import cutting_axes, local_part, local_parts


class GradientNorms:
    """The gradients of an optimizer's parameters by algorithm ("muon", "adamw"), and their 2-norms over all ranks.

    A plain tensor is whole on every rank and needs no message. Parts of DTensors are summed over the mesh axes that
    shard them: per such axis of each mesh, one all-reduce with one number per algorithm. Every rank takes part, even
    if its parameters have no gradient.

    Args:
        groups: parameter groups; a group without "algorithm" belongs to AdamW.

    Attributes:
        norms: algorithm -> its norm, fp32 because an fp16 norm would overflow; no entry for an algorithm without
            gradients.
    """

    @torch.no_grad()
    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        self._gradients: dict[str, list[Tensor]] = {}
        norms: dict[tuple[Any, ...], dict[str, list[Tensor]]] = {}
        for group in groups:
            algorithm = group.get("algorithm", "adamw")
            for p in group["params"]:
                of_place = norms.setdefault(cutting_axes(p), {}).setdefault(algorithm, [])
                if p.grad is not None:
                    self._gradients.setdefault(algorithm, []).append(local_part(p.grad))
                    part = local_parts(p, {})[1]
                    assert part is not None
                    of_place.append(torch.linalg.vector_norm(part, dtype=torch.float32))
        found: dict[str, list[Tensor]] = {}
        for axes, by_algorithm in norms.items():
            for algorithm, norm in _over(axes, by_algorithm).items():
                found.setdefault(algorithm, []).append(norm)
        self.norms = {algorithm: _joint(parts) for algorithm, parts in found.items()}

    @property
    def total(self) -> Tensor:
        """The norm over all parameters. At least one parameter must have a gradient."""
        return torch.linalg.vector_norm(torch.stack(list(self.norms.values())))

    @torch.no_grad()
    def scale(self, algorithm: str, factor: Tensor) -> None:
        """Multiply the gradients of an algorithm by a number."""
        if self._gradients.get(algorithm):
            torch._foreach_mul_(self._gradients[algorithm], factor)


def _joint(norms: list[Tensor]) -> Tensor:
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _over(axes: tuple[Any, ...], by_algorithm: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """The norms over the mesh axes that shard the parts; unchanged without such axes."""
    if not axes:
        return {name: torch.linalg.vector_norm(torch.stack(n)) for name, n in by_algorithm.items() if n}
    device = axes[0][0].device_type
    squares = torch.stack(
        [torch.stack(n).square().sum() if n else torch.zeros((), device=device) for n in by_algorithm.values()]
    )
    for mesh, axis in axes:
        dist.all_reduce(squares, group=mesh.get_group(axis))
    return dict(zip(by_algorithm, squares.sqrt().unbind(), strict=True))
