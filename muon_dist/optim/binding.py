"""The data that an adapter gives to the optimizer: layout, tensors, process group, device."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from muon_dist.layout import Fragment, Layout, Matrix, StoredParameter
from muon_dist.optim.rules import Group
from muon_dist.optim.rules.scale import update_scale
from muon_dist.ownership import OwnershipPlan

__all__ = ["Binding", "Bound", "Group", "NotReady", "ParameterSpec", "update_scale"]


def holders_of_copies(plan: OwnershipPlan, wanted: bool = False) -> Set[int]:
    """The buffers of which some element lies on several ranks, if they are `wanted`."""
    copied = (m.buffer for m in plan.layout.matrices if int(m.fragments.length.sum()) > m.matrix.numel)
    return frozenset(copied) if wanted else frozenset()


def _all_of(name: str, tensor: torch.Tensor) -> Sequence[Fragment]:
    return [Fragment.run(0, 0, tensor.numel(), 0, 0)]


@dataclass
class Binding:
    """The optimizer's parameters as a framework really keeps them.

    Attributes:
        layout: where every matrix lies, in terms of `buffers`.
        buffers: by buffer index, the tensors that `param_groups` hold while they are stepped.
        group: ranks that share the work; None for a single process.
        device: where gathered matrices are orthogonalized and collectives run; buffers may be elsewhere (offload).
        gradient_factor: multiplies the gradients of Muon groups before momentum; an adapter uses it to take back a
            clip that the framework has applied to all gradients.
        finite: whether all gradients of this step are finite, the same answer on every rank; None if the framework
            has not found out: then the optimizer looks at the gradients itself.
        local: this rank's part of a buffer or of its stored momentum, where those are distributed tensors; called in
            every step, because a framework may replace the storage.
        column: the replica group of this rank: ranks of `group` with the same of `layout.columns`; None: all.
        everywhere: buffers of which every holder keeps the momentum, not the sources alone: all that have several
            holders if its second argument is True, else those whose sources the framework's checkpoint cannot express.
        stored: the momentum of a buffer as it is in the optimizer's `state`, of this rank's part (None if it
            keeps none); None to store nothing.
        parts: this rank's part of a buffer and of its gradient, the same elements; None if those are plain tensors.
        stored_by_owner: as `stored`, of what the owner of a matrix keeps, a 1-D tensor (None on other ranks); given
            the number of the matrix in the layout, and at the end the length of that tensor.
        fragments: given name and tensor of any parameter, which elements of it this rank's part is.
        specs: the parameters that all ranks step, where these step different ones (experts); None: the optimizer's.
        contents: what lies in a tensor that a framework has made of several parameters; None if every tensor is a
            parameter.
        before_step: raises FrameworkError where the framework is in a mode that the step cannot follow.
    """

    layout: Layout
    buffers: tuple[torch.Tensor, ...]
    group: dist.ProcessGroup | None
    device: torch.device
    gradient_factor: Callable[[], float] = field(default=lambda: 1.0)
    finite: Callable[[], bool | None] = field(default=lambda: None)
    local: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda tensor: tensor)
    column: dist.ProcessGroup | None = None
    everywhere: Callable[[OwnershipPlan, bool], Set[int]] = field(default=holders_of_copies)
    stored: Callable[[OwnershipPlan, int, torch.Tensor | None], torch.Tensor | None] = field(
        default=lambda plan, buffer, momentum: momentum
    )
    parts: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]] | None = None
    stored_by_owner: Callable[[OwnershipPlan, int, torch.Tensor | None, int], torch.Tensor | None] = field(
        default=lambda plan, matrix, kept, length: kept
    )
    fragments: Callable[[str, torch.Tensor], Sequence[Fragment]] = field(default=_all_of)
    specs: Sequence[Sequence[ParameterSpec]] | None = None
    contents: Callable[[torch.Tensor], Sequence[StoredParameter]] | None = None
    before_step: Callable[[], None] = field(default=lambda: None)


class NotReady:
    """A binder's answer while the framework is still being built: the step that it makes then must change nothing."""


Bound = tuple[Binding, dict[int, int]]
"""A binding, and the index of the parameter group of each of its buffers."""


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
