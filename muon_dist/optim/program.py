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
    """`numbers` as an index, copied to `device` once: the host waits for each copy."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Pieces:
    """Fragments of one parameter group, on one device, under one update scale.

    Attributes:
        group: index of the parameter group.
        scale: factor of `update_scale`.
        numbers: of the fragments in a `Listing`.
        views: their places in the memory of the exchange.
        scratch, scratch_views: memory of the same shapes where the fragments are, if that is another device or if
            `views` are narrower than fp32.
        run: all `views` as one run, if they are one: between devices it takes one transfer.
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
    """Elements that are copied from one place of the exchange's memory to another."""

    targets: Views
    origins: Views


@dataclass(frozen=True)
class Envelope:
    """The memory of one exchange of messages between all ranks: elements to and from each rank, in rank order."""

    sent: Region
    received: Region
    sends: list[int]
    receives: list[int]


@dataclass(frozen=True)
class Sent:
    """A tensor that the sources of some matrices send besides the momentum (`MuonRule.sends`).

    Attributes:
        name: of the tensor.
        gather: None if no rank sends anything.
        sent_sources, own_sources, arrivals: as of a `BucketProgram`.
        stacked: where the owner stacks it.
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
        view: (B, rows, cols), in the memory of all stacks.
        newton_schulz: replaces the stack by its orthogonalized update.
        sent: by name of `MuonRule.sends`, that tensor of the matrices, (B, rows, cols).
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
        counts: elements that each rank of the replica group sends, in their order.
        room: elements that may be under way at a time.
        sent: memory of what this rank sends; None if it sends its stacks as they are.
        packing: what is copied into `sent`.
        received: memory for what each other rank sends, by its place in the replica group.
        updates: what each other rank sends, by its place.
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
        number: of the bucket in the step.
        gather, scatter: None if no rank sends anything.
        sent_sources: what this rank sends to owners.
        own_sources: what it is itself the owner of.
        arrivals: from the gathered messages into the stacks.
        stacked, stacks: what this rank orthogonalizes: `owned` matrices.
        sent_updates: from the stacks into the messages.
        own_updates, received_updates: what this rank applies.
        rebroadcast: None if there are no copies to serve.
        also: what the rules of the bucket have sent besides the momentum.
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
        index, rule: of the group.
        buffers, matrices: buffer after buffer.
        position: of each matrix in `matrices`.
        weights, weight_positions: numbers of the fragments that this rank holds, and for each the position of its
            matrix.
        sources, source_positions: the same of the fragments that this rank sends from; the positions as a tensor on
            the device of the exchange.
        everywhere: buffers of which this rank keeps all the momentum, also where it is not a source.
        remembered: `sources` in other buffers.
        fp32: all gradients are.
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
        weights, sources: the fragments that this rank holds, and those that it sends from.
        groups: the parameter groups.
        summed: those whose rule looks at the norms of whole matrices.
        buckets: in the order in which they are stepped.
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
        """Whether some rule looks at norms, or has weights sent."""
        return bool(self.summed) or any(WEIGHT in p.rule.sends or p.rule.feature_norms for p in self.groups)
