"""One bucket on its way through a step: to the owners, through the rule, and back to all holders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from muon_dist.exchange.progress import Progress
from muon_dist.exchange.transport import Broadcasts, Transport
from muon_dist.layout import Matrix
from muon_dist.optim.program import BucketProgram, Pieces, index_on
from muon_dist.optim.rounding import MuonRounding
from muon_dist.optim.rules import Group, HeldWeights, MuonRule, Owned
from muon_dist.optim.rules.muon import GRADIENT

Observer = Callable[[Matrix, Tensor, Tensor], None]
"""Called on the owner with a matrix, the tensor that its sources sent, and its update; both (rows, cols)."""

Orthogonalize = Callable[[Tensor, Group], None]
"""Replaces an fp32 stack (B, rows, cols) by its orthogonalized update, with the options of a parameter group."""


@dataclass(frozen=True)
class GroupStep:
    """A parameter group in this step.

    Attributes:
        lr: learning rate.
        factors: the result of `MuonRule.begin`, (matrices,); None if the rule needs no factors.
        position: by matrix, its index in `factors`.
        features: by matrix, the norms of the output features of its weight, for a rule with `feature_norms`.
    """

    group: Group
    rule: MuonRule
    lr: float
    factors: Tensor | None
    position: Mapping[int, int]
    features: Mapping[int, Tensor]


@dataclass(frozen=True)
class StepContext:
    """Data shared by all buckets of a step.

    Attributes:
        groups: the parameter groups of this step, by index.
        weights, gradients, momentum: this rank's fragments, by their numbers in the program's listings.
        matrices: number of the matrix of each fragment in `weights`.
        source_weights: the weights, numbered as the gradients are; empty if no rule sends them.
        gradient_factor: multiplies every gradient.
        owners: by name of `owner_memory` and by matrix, the tensors that this rank keeps as an owner.
        orthogonalize: replaces Newton-Schulz; None: Newton-Schulz.
        rest: factor on the update of each matrix whose gradient is zero, by matrix.
        rounding: rounds bfloat16 weights stochastically; None: torch rounds them to the nearest.
        rounded: dtype of the messages if it may be narrower than the updates, else None. The owner rounds its own part
            of an update too, so that all holders apply equal numbers.
    """

    transport: Transport
    progress: Progress
    groups: Mapping[int, GroupStep]
    weights: list[Tensor]
    matrices: Sequence[int]
    gradients: list[Tensor]
    momentum: list[Tensor]
    source_weights: list[Tensor]
    gradient_factor: float
    owners: Mapping[str, Mapping[int, Tensor]]
    orthogonalize: Orthogonalize | None
    observer: Observer | None
    rounded: torch.dtype | None
    rest: Mapping[int, float]
    rounding: MuonRounding | None


@dataclass
class BucketRun:
    """A bucket in a step: call `gather`, `stack`, `orthogonalize`, `scatter` and `update` once, in this order.

    `gather` may be left out if `program.gather` is None.
    """

    program: BucketProgram
    step: StepContext
    _works: Sequence[Any] = ()
    _broadcasts: Broadcasts | None = None

    def gather(self) -> None:
        """Start sending this rank's fragments of the bucket to their owners."""
        program, step, envelope = self.program, self.step, self.program.gather
        step.progress.enter("gather", program.number)
        if envelope is None:
            return
        envelope.sent.allocated = True
        self._write(program.sent_sources)
        envelope.received.allocated = True
        sent, received = envelope.sent.flat, envelope.received.flat
        self._works = step.transport.all_to_all(sent, envelope.sends, received, envelope.receives)
        for also in program.also:
            if also.gather is not None:
                also.gather.sent.allocated = True
                self._copy(also.sent_sources, also.name)
                also.gather.received.allocated = True
                sent, received = also.gather.sent.flat, also.gather.received.flat
                works = step.transport.all_to_all(sent, also.gather.sends, received, also.gather.receives)
                self._works = [*self._works, *works]

    def stack(self) -> None:
        """Wait for the fragments of the matrices that this rank owns, and copy them into the stacks."""
        program, envelope = self.program, self.program.gather
        self.step.progress.enter("gather", program.number)
        if envelope is not None:
            for work in self._works:
                work.wait()
            envelope.sent.allocated = False
        program.stacked.allocated = True
        self._write(program.own_sources)
        if envelope is not None:
            if program.arrivals.targets:
                torch._foreach_copy_(program.arrivals.targets, program.arrivals.origins)
            envelope.received.allocated = False
        for also in program.also:
            also.stacked.allocated = True
            self._copy(also.own_sources, also.name)
            if also.gather is not None:
                also.gather.sent.allocated = False
                if also.arrivals.targets:
                    torch._foreach_copy_(also.arrivals.targets, also.arrivals.origins)
                also.gather.received.allocated = False

    def orthogonalize(self) -> None:
        """Replace the stacks by their updates."""
        step = self.step
        step.progress.enter("orthogonalize", self.program.number)
        for s in self.program.stacks:
            of_group = step.groups[s.group]
            owned = Owned(s.view, s.matrices, s.newton_schulz, sent=s.sent)
            if step.orthogonalize is not None:
                owned.orthogonalize = partial(_replaced, step.orthogonalize, of_group.group)
            owned.memory = {name: [step.owners[name][i] for i in s.numbers] for name in of_group.rule.owner_memory}
            if of_group.factors is not None:
                places = tuple(of_group.position[i] for i in s.numbers)
                owned.factors = of_group.factors[index_on(of_group.factors.device, places)]
            if of_group.rule.feature_norms:
                owned.feature_norms = torch.stack([of_group.features[i] for i in s.numbers])
            if of_group.rule.momentum_at_owner:
                of_group.rule.receive(owned, of_group.group)
            before = s.view.clone() if step.observer is not None else None
            of_group.rule.direction(owned, of_group.group)
            for place, i in enumerate(s.numbers) if step.rest else ():
                if i in step.rest:
                    s.view[place].mul_(step.rest[i])
            if before is not None and step.observer is not None:
                for matrix, sent, update in zip(s.matrices, before, s.view, strict=True):
                    step.observer(matrix, sent, update)
            if step.rounded is not None:
                s.view.copy_(s.view.to(step.rounded))
        for also in self.program.also:
            also.stacked.allocated = False

    def scatter(self) -> None:
        """Start sending the updates to the holders, and apply the updates of this rank's own fragments."""
        program, step, envelope, again = self.program, self.step, self.program.scatter, self.program.rebroadcast
        step.progress.enter("scatter", program.number)
        if envelope is not None:
            envelope.sent.allocated = True
            if program.sent_updates.targets:
                torch._foreach_copy_(program.sent_updates.targets, program.sent_updates.origins)
            envelope.received.allocated = True
            sent, received = envelope.sent.flat, envelope.received.flat
            self._works = step.transport.all_to_all(sent, envelope.sends, received, envelope.receives)
        step.progress.enter("update", program.number)
        self._apply(program.own_updates)
        if again is None:
            program.stacked.allocated = False
            return
        # This rank passes on the updates made by owners in its own copy of the model to its replica group.
        if envelope is not None:
            self.update()
        step.progress.enter("scatter", program.number)
        sent = program.stacked.flat
        if again.sent is not None:
            again.sent.allocated = True
            if again.packing.targets:
                torch._foreach_copy_(again.packing.targets, again.packing.origins)
            sent = again.sent.flat
            program.stacked.allocated = False
        if envelope is not None:
            envelope.received.allocated = False
        self._broadcasts = Broadcasts(step.transport, sent, again.counts, again.received, again.room)

    def update(self) -> None:
        """Wait for the updates from other ranks, and apply them."""
        program, progress, envelope, again = self.program, self.step.progress, self.program.scatter, self._broadcasts
        if again is None and envelope is None:
            return
        progress.enter("scatter", program.number)
        if again is None and envelope is not None:
            for work in self._works:
                work.wait()
            envelope.sent.allocated = False
            progress.enter("update", program.number)
            self._apply(program.received_updates)
            envelope.received.allocated = program.rebroadcast is not None  # the rebroadcast still sends it
        if again is not None and program.rebroadcast is not None:
            for place in again.arrived():
                progress.enter("update", program.number)
                self._apply(program.rebroadcast.updates[place])
                progress.enter("scatter", program.number)
            (program.rebroadcast.sent or program.stacked).allocated = False

    def _write(self, sources: list[Pieces]) -> None:
        """Let the rule write its messages for these fragments into the memory of the exchange."""
        step = self.step
        for p in sources:
            of_group = step.groups[p.group]
            out = p.views
            if p.scratch is not None:
                p.scratch.allocated = True
                out = p.scratch_views
            if of_group.group["nesterov"] or of_group.rule.momentum_at_owner:
                torch._foreach_copy_(out, [step.gradients[n] for n in p.numbers])
                if step.gradient_factor != 1.0:
                    torch._foreach_mul_(out, step.gradient_factor)
            of_group.rule.send(out, [step.momentum[n] for n in p.numbers], of_group.group)
            if p.scratch is not None:
                if p.run is not None:
                    p.run.copy_(p.scratch.flat)
                else:
                    torch._foreach_copy_(p.views, out)
                p.scratch.allocated = False

    def _copy(self, sources: list[Pieces], name: str) -> None:
        """Copy the gradient or weight (`name`) of these fragments into the memory of the exchange."""
        step = self.step
        for p in sources:
            given = step.gradients if name == GRADIENT else step.source_weights
            out = p.views
            if p.scratch is not None:
                p.scratch.allocated = True
                out = p.scratch_views
            torch._foreach_copy_(out, [given[n] for n in p.numbers])
            if name == GRADIENT and step.gradient_factor != 1.0:
                torch._foreach_mul_(out, step.gradient_factor)
            if p.scratch is not None:
                torch._foreach_copy_(p.views, out)
                p.scratch.allocated = False

    def _apply(self, updates: list[Pieces]) -> None:
        """Apply the updates of these fragments to their weights."""
        for p in updates:
            of_group = self.step.groups[p.group]
            given = p.views
            if p.scratch is not None:
                p.scratch.allocated = True
                if p.run is not None:
                    p.scratch.flat.copy_(p.run)
                else:
                    torch._foreach_copy_(p.scratch_views, given)
                given = p.scratch_views
            weights = [self.step.weights[n] for n in p.numbers]
            # lr times scale is rounded to fp32, never to 16 bits. fp64 messages hold fp32 numbers.
            if given[0].dtype == torch.float64 or weights[0].dtype == given[0].dtype != torch.float32:
                given = [u.to(torch.float32) for u in given]
            if self.step.rounding is None:
                if of_group.rule.decays_late:
                    self._decay_late(p, weights, given)
                of_group.rule.apply(weights, given, of_group.lr * p.scale)
            else:
                self._apply_rounded(self.step.rounding, p, weights, given)
            if p.scratch is not None:
                p.scratch.allocated = False

    def _decay_late(self, p: Pieces, weights: list[Tensor], given: list[Tensor]) -> None:
        g = self.step.groups[p.group]
        positions = [g.position[self.step.matrices[n]] for n in p.numbers]
        g.rule.decay(HeldWeights(weights, positions, g.factors, g.lr, given), g.group)

    def _apply_rounded(self, rounding: MuonRounding, p: Pieces, weights: list[Tensor], given: list[Tensor]) -> None:
        """Decay and update these weights in fp32, so that each weight is rounded only once."""
        g = self.step.groups[p.group]
        for some in rounding.opened(p.numbers, weights):
            of_members = [rounding.listing.matrices[p.numbers[n]] for n in some.members]
            updates = [given[n][rows] for n, rows in zip(some.members, some.slices, strict=True)]
            late = updates if g.rule.decays_late else None
            positions = [g.position[i] for i in of_members]
            g.rule.decay(HeldWeights(some.wide, positions, g.factors, g.lr, late), g.group)
            g.rule.apply(some.wide, updates, g.lr * p.scale)


def _replaced(orthogonalize: Orthogonalize, group: Group, stack: Tensor) -> None:
    orthogonalize(stack, group)
