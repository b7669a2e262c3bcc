"""The program of one rank for a step, as data: tensors to read, send, stack and change, and their memory.

Everything here is compiled once (`compiler.ProgramCompiler`) from the ownership plan and from the options that the
ranks have agreed on. A step only runs it (`runtime.Runtime`, `bucket_run.BucketRun`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from muon_dist.exchange.readers import Listing
from muon_dist.exchange.transport import Region
from muon_dist.layout import Matrix
from muon_dist.optim.rules import MuonRule
from muon_dist.optim.rules.muon import WEIGHT

Views = list[Tensor]


@functools.lru_cache(maxsize=4096)
def index_on(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """`numbers` as an int64 index on `device`. Cached, because the host waits for each copy."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Pieces:
    """Fragments with the same parameter group, device and update scale.

    Attributes:
        group: index of the parameter group.
        scale: result of `update_scale`.
        numbers: numbers of the fragments in a `Listing`.
        views: views of the fragments in the memory of the exchange.
        scratch, scratch_views: fp32 memory of the same shapes on the fragments' device, if this is another device or
            if `views` are narrower than fp32.
        run: all `views` as one flat tensor, if they are contiguous, so that one transfer between devices is enough.
    """

    group: int
    scale: float
    numbers: list[int]
    views: Views
    scratch: Region | None = None
    scratch_views: Views = field(default_factory=list)
    run: Tensor | None = None


@dataclass(frozen=True)
class Copies:
    """Copies within the memory of the exchange: `origins[i]` to `targets[i]`."""

    targets: Views
    origins: Views


@dataclass(frozen=True)
class Envelope:
    """The memory of one exchange of messages, and the number of elements sent to and received from each rank."""

    sent: Region
    received: Region
    sends: list[int]
    receives: list[int]


@dataclass(frozen=True)
class Sent:
    """A tensor that the sources of some matrices send besides the momentum (`MuonRule.sends`).

    Attributes:
        name: name of the tensor.
        gather: None if no rank sends anything.
        sent_sources, own_sources, arrivals: as in `BucketProgram`.
        stacked: the owner's stacks of this tensor.
    """

    name: str
    gather: Envelope | None
    sent_sources: list[Pieces]
    own_sources: list[Pieces]
    arrivals: Copies
    stacked: Region


@dataclass(frozen=True)
class Stack:
    """Owned matrices of one shape, parameter group and orientation.

    Attributes:
        matrices, numbers: the matrices, and their numbers in the layout.
        group: index of the parameter group.
        view: (B, rows, cols), a view of the memory of all stacks.
        newton_schulz: replaces the stack by its orthogonalized update.
        sent: the further tensors of the matrices, (B, rows, cols), by name of `MuonRule.sends`.
    """

    matrices: list[Matrix]
    numbers: tuple[int, ...]
    group: int
    view: Tensor
    newton_schulz: Callable[[Tensor], None]
    sent: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rebroadcast:
    """Messages between the ranks of a replica group: each sends the updates that its copy's owners made.

    Attributes:
        counts: elements that each rank of the replica group sends, in group order.
        room: largest number of elements in pending broadcasts.
        sent: memory of the message that this rank sends; None if it sends its stacks directly.
        packing: copies that fill `sent`.
        received: memory for the message of each other rank, by its index in the replica group.
        updates: the updates in the message of each other rank, by its index in the replica group.
    """

    counts: list[int]
    room: int
    sent: Region | None
    packing: Copies
    received: dict[int, Region]
    updates: dict[int, list[Pieces]]


@dataclass(frozen=True)
class BucketProgram:
    """A bucket as one rank executes it.

    Attributes:
        number: index of the bucket in the step.
        gather, scatter: None if no rank sends anything.
        sent_sources: fragments that this rank sends to other owners.
        own_sources: fragments of matrices that this rank owns.
        arrivals: copies from the gathered messages into the stacks.
        stacked, stacks: the memory and the stacks of the `owned` matrices that this rank orthogonalizes.
        sent_updates: copies from the stacks into the messages.
        own_updates, received_updates: updates that this rank applies, from its own stacks and from other ranks.
        rebroadcast: None if no other copies of the model need the updates.
        also: tensors that the bucket's rules have sent besides the momentum.
    """

    number: int
    gather: Envelope | None
    scatter: Envelope | None
    sent_sources: list[Pieces]
    own_sources: list[Pieces]
    arrivals: Copies
    stacked: Region
    stacks: list[Stack]
    owned: int
    sent_updates: Copies
    own_updates: list[Pieces]
    received_updates: list[Pieces]
    rebroadcast: Rebroadcast | None
    also: list[Sent]


@dataclass(frozen=True, eq=False)
class GroupProgram:
    """The matrices of a parameter group that a step changes.

    Attributes:
        index, rule: index and rule of the group.
        buffers, matrices: the group's buffers, and their matrices, buffer after buffer.
        position: index of each matrix in `matrices`.
        weights, weight_positions: numbers of the fragments that this rank holds, and the position of each fragment's
            matrix.
        sources, source_positions: the same for the fragments whose momentum this rank sends; the positions are a
            tensor on the device of the exchange.
        everywhere: buffers whose momentum this rank keeps completely, even where it is not a source.
        remembered: the `sources` in all other buffers.
        fp32: whether all gradients are fp32.
    """

    index: int
    rule: MuonRule
    buffers: tuple[int, ...]
    matrices: tuple[int, ...]
    position: dict[int, int]
    weights: list[int]
    weight_positions: list[int]
    sources: list[int]
    source_positions: Tensor
    everywhere: list[int]
    remembered: list[int]
    fp32: bool


@dataclass(frozen=True)
class Program:
    """A step over some of the buffers, as one rank executes it.

    Attributes:
        weights, sources: the fragments that this rank holds, and the fragments whose momentum it sends.
        groups: the parameter groups.
        summed: the groups whose rule needs norms of whole matrices.
        buckets: the buckets, in the order of the step.
        updates: dtype of the messages to the holders.
    """

    weights: Listing
    sources: Listing
    groups: list[GroupProgram]
    summed: list[GroupProgram]
    buckets: list[BucketProgram]
    updates: torch.dtype

    @functools.cached_property
    def looks_at_weights(self) -> bool:
        """Whether a rule needs norms, or the weights on the owner."""
        return bool(self.summed) or any(WEIGHT in p.rule.sends or p.rule.feature_norms for p in self.groups)
