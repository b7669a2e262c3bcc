"""One bucket on its way through a step: to the owners, through Newton-Schulz, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from muon_dist.exchange.transport import Broadcasts, Message, Transport
from muon_dist.layout.fragment import Matrix, Span
from muon_dist.optim.binding import Group, update_scale


@dataclass
class Work:
    """One buffer of this step: the local tensor, its gradient, its parameter group."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    group: Group


@dataclass(frozen=True)
class Piece:
    """A fragment of a matrix, wherever it stands.

    Attributes:
        matrix, buffer: indices in the layout.
        length: elements.
        message: its place in the packed message, in elements; 0 for a fragment that does not travel.
        stacked: its place in this rank's stacks, where it owns the matrix; else -1.
        spans: its places in the buffer, where this rank holds it.
        kept: its places in this rank's momentum, where it is a source.
    """

    matrix: int
    buffer: int
    length: int
    message: int
    stacked: int
    spans: tuple[Span, ...] = ()
    kept: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Owned matrices of one shape and parameter group, that of `buffer`: (len(matrices), rows, cols) from element `at`
    of the stacks."""

    matrices: tuple[int, ...]
    buffer: int
    rows: int
    cols: int
    at: int

    @property
    def numel(self) -> int:
        return len(self.matrices) * self.rows * self.cols


@dataclass(frozen=True)
class Recipe:
    """A bucket as one rank executes it.

    Attributes:
        stacks: what it orthogonalizes; `stacked` elements in all.
        own_sources: what it stacks without a message.
        gather_send, gather_receive: what travels to owners; `gather_splits` are the elements to and from each rank.
        own_destinations: updates that stay here.
        scatter_send, scatter_receive, scatter_splits: what owners send back.
        gathers, scatters: on any rank, so that all enter the collective or none does.
        relay: elements that each rank of the column broadcasts along it, in their order; empty if nobody does.
        relay_receive: what comes from the others, one message after another.
        room: elements that may be under way along the column at a time.
    """

    stacks: tuple[Stack, ...]
    stacked: int
    own_sources: tuple[Piece, ...]
    gather_send: tuple[Piece, ...]
    gather_receive: tuple[Piece, ...]
    gather_splits: tuple[list[int], list[int]]
    own_destinations: tuple[Piece, ...]
    scatter_send: tuple[Piece, ...]
    scatter_receive: tuple[Piece, ...]
    scatter_splits: tuple[list[int], list[int]]
    gathers: bool
    scatters: bool
    relay: tuple[int, ...] = ()
    relay_receive: tuple[Piece, ...] = ()
    room: int = 0


def view(flat: torch.Tensor, span: Span) -> torch.Tensor:
    """The `(rows, cols)` block of a flat buffer that `span` names."""
    return flat.as_strided((span.rows, span.cols), (span.stride, 1), flat.storage_offset() + span.position)


Observer = Callable[[Matrix, torch.Tensor, torch.Tensor], None]
"""Called on the owner with a matrix, its (Nesterov) momentum and its orthogonalized update, both (rows, cols)."""

Orthogonalize = Callable[[torch.Tensor, Group], None]
"""Replaces a stack (B, rows, cols) of fp32 momentum by its update, with the options of a parameter group."""


@dataclass
class Step:
    """What all buckets of a step share.

    Attributes:
        work: by buffer, what is stepped.
        factor: multiplies every gradient.
        wire: dtype of momentum and of updates on their way.
        rounds: the wire is narrower than what Newton-Schulz returns, so owners round what they keep as well.
    """

    work: Mapping[int, Work]
    factor: float
    wire: tuple[torch.dtype, torch.dtype]
    rounds: bool
    matrices: list[Matrix]
    momentum: Mapping[int, torch.Tensor]
    transport: Transport
    device: torch.device
    orthogonalize: Orthogonalize
    observer: Observer | None


class Passage:
    """A bucket in a step; its methods are the stages of `exchange.overlap`, each called once, in their order."""

    def __init__(self, recipe: Recipe, bucket: int, step: Step) -> None:
        self.recipe = recipe
        self.bucket = bucket
        self.step = step
        self._message: Message | None = None
        self._returning: Message | Broadcasts | None = None
        self._stacks: torch.Tensor | None = None

    def _enter(self, operation: str) -> None:
        self.step.transport.progress.enter(operation, self.bucket)

    def gather(self) -> None:
        """Send this rank's momentum of the bucket to its owners."""
        self._enter("gather")
        if not self.recipe.gathers:
            return
        sends, receives = self.recipe.gather_splits
        packed = torch.empty(sum(sends), dtype=self.step.wire[0], device=self.step.device)
        for p in self.recipe.gather_send:
            self._fill(p, packed[p.message : p.message + p.length])
        self._message = self.step.transport.all_to_all(packed, sends, receives)

    def stack(self) -> None:
        """Wait for it, and stack what this rank owns."""
        self._enter("gather")
        received = None
        if self._message is not None:
            received = self._message.wait()
            self._message = None
        stacks = torch.empty(self.recipe.stacked, dtype=torch.float32, device=self.step.device)
        for p in self.recipe.own_sources:
            self._fill(p, stacks[p.stacked : p.stacked + p.length])
        for p in self.recipe.gather_receive:
            assert received is not None
            stacks[p.stacked : p.stacked + p.length].copy_(received[p.message : p.message + p.length])
        self._stacks = stacks

    def orthogonalize(self) -> None:
        """Replace the stacks by their updates."""
        self._enter("orthogonalize")
        assert self._stacks is not None
        for s in self.recipe.stacks:
            stack = self._stacks[s.at : s.at + s.numel].view(len(s.matrices), s.rows, s.cols)
            before = stack.clone() if self.step.observer is not None else None
            self.step.orthogonalize(stack, self.step.work[s.buffer].group)
            if self.step.observer is not None:
                assert before is not None
                for i, momentum, update in zip(s.matrices, before, stack, strict=True):
                    self.step.observer(self.step.matrices[i], momentum, update)
            if self.step.rounds:
                stack.copy_(stack.to(self.step.wire[1]))

    def scatter(self) -> None:
        """Send the updates back, and apply those that stay here."""
        assert self._stacks is not None
        stacks, self._stacks = self._stacks, None
        self._enter("scatter")
        wire = self.step.wire[1]
        message = None
        if self.recipe.scatters:
            sends, receives = self.recipe.scatter_splits
            packed = torch.empty(sum(sends), dtype=wire, device=self.step.device)
            for p in self.recipe.scatter_send:
                packed[p.message : p.message + p.length].copy_(stacks[p.stacked : p.stacked + p.length])
            message = self.step.transport.all_to_all(packed, sends, receives)
        self._enter("update")
        for p in self.recipe.own_destinations:
            self._apply(p, stacks[p.stacked : p.stacked + p.length])
        self._returning = message
        if self.recipe.relay:
            self._enter("scatter")
            self._relay(stacks, message)

    def _relay(self, stacks: torch.Tensor, message: Message | None) -> None:
        """Send what the owners of this domain have made for this rank on along its column."""
        received = message.wait() if message is not None else stacks.new_empty(0, dtype=self.step.wire[1])
        self._enter("update")
        for p in self.recipe.scatter_receive:
            self._apply(p, received[p.message : p.message + p.length])
        self._enter("scatter")
        packed = stacks.to(self.step.wire[1])
        if len(received) or sum(p.length for p in self.recipe.own_destinations) < len(stacks):
            own = [packed[p.stacked : p.stacked + p.length] for p in self.recipe.own_destinations]
            below = sum(self.recipe.scatter_splits[1][: self.step.transport.rank])
            packed = torch.cat([received[:below], *own, received[below:]])  # in the order of the owners
        self._returning = self.step.transport.broadcast(packed, self.recipe.relay, self.recipe.room)

    def update(self) -> None:
        """Wait for the updates of the others, and apply them as they come."""
        if self._returning is None:
            return
        self._enter("scatter")
        pieces = deque(self.recipe.relay_receive if self.recipe.relay else self.recipe.scatter_receive)
        at = 0
        for part in self._returning.parts():
            self._enter("update")
            while pieces and pieces[0].message < at + part.numel():
                p = pieces.popleft()
                self._apply(p, part[p.message - at : p.message - at + p.length])
            at += part.numel()
            self._enter("scatter")
        self._returning = None

    def _fill(self, piece: Piece, target: torch.Tensor) -> None:
        """Write what is orthogonalized (momentum, or its Nesterov look-ahead) of a source into `target`."""
        work = self.step.work[piece.buffer]
        momentum, gradient = self.step.momentum[piece.buffer].view(-1), work.gradient.reshape(-1)
        whole = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        at = 0
        for span, place in zip(piece.spans, piece.kept, strict=True):
            out = whole[at : at + span.rows * span.cols].view(span.rows, span.cols)
            if work.group["nesterov"]:
                out.copy_(view(gradient, span))
                if self.step.factor != 1.0:
                    out.mul_(self.step.factor)
                out.lerp_(view(momentum, place).to(out.device), work.group["momentum"])
            else:
                out.copy_(view(momentum, place))
            at += span.rows * span.cols
        if whole is not target:
            target.copy_(whole)

    def _apply(self, piece: Piece, update: torch.Tensor) -> None:
        work = self.step.work[piece.buffer]
        flat = work.parameter.view(-1)
        step = -float(work.group["lr"]) * update_scale(work.group["scale"], self.step.matrices[piece.matrix])
        at = 0
        for span in piece.spans:
            block = update[at : at + span.rows * span.cols].view(span.rows, span.cols)
            view(flat, span).add_(block.to(flat.device, torch.float32), alpha=step)
            at += span.rows * span.cols
