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
    """The buffers with an element that several ranks hold; no buffers if `wanted` is False."""
    copied = (m.buffer for m in plan.layout.matrices if int(m.fragments.length.sum()) > m.matrix.numel)
    return frozenset(copied) if wanted else frozenset()


def _all_of(name: str, tensor: torch.Tensor) -> Sequence[Fragment]:
    return [Fragment.run(0, 0, tensor.numel(), 0, 0)]


@dataclass
class Binding:
    """The optimizer's parameters as the framework stores them.

    Attributes:
        layout: the fragments of every matrix, as positions in `buffers`.
        buffers: by buffer index, the tensors in `param_groups` during the step.
        group: ranks that share the work; None for a single process.
        device: where gathered matrices are orthogonalized and collectives run; buffers may be elsewhere (offload).
        gradient_factor: multiplies the gradients of Muon groups before momentum; an adapter uses it to undo a clip
            that the framework has applied to all gradients.
        finite: whether all gradients of this step are finite, equal on all ranks; None if the framework has not
            checked, so the optimizer checks the gradients itself.
        local: returns this rank's part of a buffer or of its stored momentum, if these are distributed tensors. Called
            every step, because the framework may replace the storage.
        column: the replica group of this rank: the ranks of `group` with its entry in `layout.columns`; None: all.
        everywhere: returns the buffers whose momentum every holder keeps, not only the sources. If its second argument
            is True, these are all buffers with several holders; else those whose sources the framework's checkpoint
            cannot express.
        stored: returns a buffer's momentum in the form that the optimizer's `state` holds, from this rank's part (None
            if this rank keeps none). It returns None to store nothing.
        parts: returns this rank's part of a buffer and of its gradient, the same elements; None if both are plain
            tensors.
        stored_by_owner: as `stored`, for the 1-D tensor that the owner of a matrix keeps (None on other ranks). It
            gets the number of the matrix in the layout, and as last argument the length of that tensor.
        fragments: returns the elements in this rank's part of a parameter, from its name and tensor.
        specs: the parameters of all ranks, if ranks step different parameters (experts); None: the optimizer's.
        contents: returns the parameters inside a tensor that the framework has made of several parameters; None if
            every tensor is a parameter.
        before_step: raises FrameworkError if the framework is in a mode that the step does not support.
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
    """A binder's answer while the framework is still being built. Steps do nothing until then."""


Bound = tuple[Binding, dict[int, int]]
"""A binding, and the index of the parameter group of each of its buffers."""


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the user passed it to the optimizer, before a framework replaced it.

    Attributes:
        name: FQN.
        shape: logical shape.
        matrices: the matrices into which it is split; empty under AdamW.
    """

    name: str
    shape: tuple[int, ...]
    matrices: tuple[Matrix, ...] = ()
