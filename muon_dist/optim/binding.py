"""What an adapter hands to the optimizer, and the registry through which it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError
from muon_dist.layout.fragment import Layout, Matrix
from muon_dist.ownership import OwnershipPlan

if TYPE_CHECKING:
    from muon_dist.optim.muon import Muon


@dataclass
class Binding:
    """The optimizer's parameters as a framework really keeps them.

    Attributes:
        layout: where every matrix lies, in terms of `buffers`.
        buffers: by buffer index, the tensors that `param_groups` hold while they are stepped.
        group: ranks that share the work; None for a single process.
        device: where gathered matrices are orthogonalized and collectives run; buffers may be elsewhere (offload).
        gradient_factor: multiplies the gradients of Muon groups before momentum; an adapter uses it to take back a
            clip that the framework has applied to all gradients alike.
        finite: whether all gradients of this step are finite, the same answer on every rank; None where the framework
            has not found out: then the optimizer looks at the gradients itself.
        local: this rank's part of a buffer, its gradient or its stored momentum, where those are distributed tensors;
            asked anew in every step, since a framework may move what lies below.
        column: ranks of `group` with the same of `layout.columns` as this one; None: all.
        everywhere: buffers of which every holder keeps the momentum, not the sources alone: those whose sources the
            framework's checkpoint cannot express.
        stored: the momentum of a buffer as it stands in the optimizer's `state`, of this rank's part (None where it
            keeps none); None to store nothing.
    """

    layout: Layout
    buffers: tuple[torch.Tensor, ...]
    group: dist.ProcessGroup | None
    device: torch.device
    gradient_factor: Callable[[], float] = field(default=lambda: 1.0)
    finite: Callable[[], bool | None] = field(default=lambda: None)
    local: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)
    column: dist.ProcessGroup | None = None
    everywhere: Callable[[OwnershipPlan], Set[int]] = field(default=lambda plan: frozenset())
    stored: Callable[[OwnershipPlan, int, torch.Tensor | None], torch.Tensor | None] = field(
        default=lambda plan, buffer, momentum: momentum
    )


class NotReady:
    """A binder's answer while the framework is still being built: the step that it makes then must change nothing."""


Bound = tuple[Binding, dict[int, int]]
"""A binding, and the index of the parameter group of each of its buffers."""

Binder = Callable[["Muon"], "Bound | NotReady | None"]
BINDERS: list[Binder] = []
"""Asked in turn at the first step; each answers None for an optimizer that is not under its framework."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the optimizer was given it, before any framework replaced it.

    Attributes:
        name: FQN.
        shape: logical shape.
        matrices: how it is cut; empty under AdamW.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...] = ()


def update_scale(kind: str, matrix: Matrix) -> float:
    """Factor on the orthogonalized update.

    match_rms_adamw: 0.2 sqrt(max(out, in)), so that the update has the root mean square of AdamW's and an AdamW
    learning rate carries over (Liu et al. 2025, arXiv 2502.16982, section 2.2). spectral: sqrt(max(1, out / in))
    (Jordan et al. 2024, Muon). none: 1.

    Raises:
        ConfigError: an unknown kind.
    """
    out, fan_in = matrix.fan
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out, fan_in))
    if kind == "spectral":
        return math.sqrt(max(1.0, out / fan_in))
    if kind == "none":
        return 1.0
    raise ConfigError(f"scale '{kind}' is unknown: use match_rms_adamw, spectral or none")


Group = dict[str, Any]
"""A parameter group of torch.optim."""
