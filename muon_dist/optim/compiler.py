"""Compiles the programs of a rank's steps from the ownership plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from muon_dist.exchange.readers import Listing, Part, parts_on
from muon_dist.exchange.schedule import (
    Bucket,
    bucket_elements,
    elements_by_rank,
    gather_parts,
    make_buckets,
    moves,
    relayed_parts,
    scatter_parts,
    smallest_bucket,
)
from muon_dist.exchange.transport import Region, Transport
from muon_dist.numerics import compute_dtype
from muon_dist.numerics.newton_schulz import orthogonalizer
from muon_dist.optim.options import Options
from muon_dist.optim.places import in_message, in_stacks, key, laid_out, one_run, received_of, sent_of
from muon_dist.optim.program import (
    BucketProgram,
    Copies,
    Envelope,
    GroupProgram,
    Pieces,
    Program,
    Rebroadcast,
    Sent,
    Stack,
    Views,
)
from muon_dist.optim.rules import Group, MuonRule
from muon_dist.optim.rules.scale import update_scale
from muon_dist.ownership import OwnershipPlan

COMPILED = ("scale", "ns_dtype", "ns_schedule", "ns_steps")
"""Options of a parameter group that a program depends on."""


@dataclass(frozen=True)
class ProgramCompiler:
    """Makes the programs of one rank.

    Attributes:
        plan, transport, options: those of the runtime.
        device: the device of the exchange.
        matrices: numbers of the matrices in each buffer.
        group_of: parameter-group index of each buffer.
        rules: the rule of each parameter group.
        everywhere: buffers whose momentum every holder keeps.
    """

    plan: OwnershipPlan
    transport: Transport
    options: Options
    device: torch.device
    matrices: Mapping[int, Sequence[int]]
    group_of: Mapping[int, int]
    rules: Mapping[int, MuonRule]
    everywhere: Set[int]

    def compile(
        self, parameters: Mapping[int, Tensor], gradients: Mapping[int, Tensor], groups: Mapping[int, Group]
    ) -> Program:
        """The program of a step over the buffers of `parameters`; `groups` are the options of each parameter group."""
        rank, layouts = self.transport.rank, self.plan.layout.matrices
        shapes = {b: tuple(p.shape) for b, p in parameters.items()}
        held = [m.fragments for m in layouts]
        weights = Listing({b: parts_on(rank, self.matrices[b], held) for b in shapes}, shapes)
        sources = Listing({b: parts_on(rank, self.matrices[b], self.plan.sources) for b in shapes}, shapes)
        places = {}
        for b, p in parameters.items():
            group = self.group_of[b]
            for i in self.matrices[b]:
                places[i] = Place(group, update_scale(groups[group]["scale"], layouts[i].matrix), p.device)
        iteration = _iteration_dtypes(groups.values(), self.device)
        widest = max((d.itemsize for d in iteration), default=4)
        rules = [self.rules[index] for index in groups]
        also = max((len(rule.sends) + rule.gradient_stays for rule in rules), default=0)
        elements = bucket_elements(self.options.bucket_bytes, widest, moves(self.plan, places), also)
        smallest = smallest_bucket(self.device.type)
        buckets = make_buckets(self.plan, sorted(places), elements, self.options.overlap, smallest)
        updates = self.options.wire_dtype or _update_dtype(iteration, {self.rules[g] for g in groups})
        compiler = BucketCompiler(
            self.plan,
            rank,
            self.transport.column_ranks,
            weights,
            sources,
            places,
            (self.options.wire_dtype or torch.float32, updates),
            self._gradient_dtypes(gradients, groups),
            self.device,
            elements,
            groups,
            self.rules,
            self.options.ns_compile,
        )
        of_groups = [self._group(index, weights, sources, gradients) for index in groups]
        return Program(
            weights,
            sources,
            of_groups,
            [p for p in of_groups if p.rule.looks_at_norms],
            [compiler.compile(bucket, number) for number, bucket in enumerate(buckets)],
            updates,
        )

    def _group(self, index: int, weights: Listing, sources: Listing, gradients: Mapping[int, Tensor]) -> GroupProgram:
        buffers = tuple(b for b in gradients if self.group_of[b] == index)
        matrices = tuple(i for b in buffers for i in self.matrices[b])
        position = {i: n for n, i in enumerate(matrices)}
        held = [n for n, i in enumerate(weights.matrices) if i in position]
        sent = [n for n, i in enumerate(sources.matrices) if i in position]
        everywhere = [b for b in buffers if b in self.everywhere]
        of_copies = {i for b in everywhere for i in self.matrices[b]}
        positions = [position[sources.matrices[n]] for n in sent]
        return GroupProgram(
            index=index,
            rule=self.rules[index],
            buffers=buffers,
            matrices=matrices,
            position=position,
            weights=held,
            weight_positions=[position[weights.matrices[n]] for n in held],
            sources=sent,
            source_positions=torch.tensor(positions, dtype=torch.int64, device=self.device),
            everywhere=everywhere,
            remembered=[
                n for n in sent if sources.matrices[n] not in of_copies and not self.rules[index].momentum_at_owner
            ],
            fp32=all(gradients[b].dtype == torch.float32 for b in buffers),
        )

    def _gradient_dtypes(self, gradients: Mapping[int, Tensor], groups: Mapping[int, Group]) -> dict[int, torch.dtype]:
        """The gradient dtype of each parameter group whose owners keep the momentum; equal on all ranks."""
        found = {}
        for index in groups:
            dtypes = {g.dtype for b, g in gradients.items() if self.group_of[b] == index}
            if self.rules[index].momentum_at_owner and len(dtypes) == 1:
                found[index] = dtypes.pop()
        return found


def _iteration_dtypes(groups: Iterable[Group], device: torch.device) -> set[torch.dtype]:
    return {compute_dtype(g["ns_dtype"], device, g["ns_schedule"]) for g in groups}


def _update_dtype(iteration: Set[torch.dtype], rules: Set[MuonRule]) -> torch.dtype:
    """The narrowest dtype that holds every update without rounding; equal on all ranks."""
    if not all(rule.sends_iteration for rule in rules):
        return torch.float32
    only = next(iter(iteration)) if len(iteration) == 1 else torch.float32
    return only if only.itemsize < torch.float32.itemsize else torch.float32


@dataclass(frozen=True)
class Place:
    """The facts about a matrix's parameter group and its buffer on this rank that the compiler needs."""

    group: int
    scale: float
    device: torch.device


@dataclass(frozen=True)
class BucketCompiler:
    """Makes the program of a bucket.

    Attributes:
        plan, rank: the plan, and the rank that runs the program.
        replica_group: ranks that hold the same shard, in order.
        weights, sources: the fragments that this rank updates, and the fragments whose momentum it sends.
        places: parameter group, scale and device of each matrix.
        wire: dtypes of the messages to the owners and back.
        gradients: gradient dtype of each parameter group that sends only gradients.
        device: the device of the exchange.
        bucket_elements: largest number of elements in pending messages.
        groups, rules: options and rule of each parameter group.
        ns_compile: see `Options`.
    """

    plan: OwnershipPlan
    rank: int
    replica_group: Sequence[int]
    weights: Listing
    sources: Listing
    places: Mapping[int, Place]
    wire: tuple[torch.dtype, torch.dtype]
    gradients: Mapping[int, torch.dtype]
    device: torch.device
    bucket_elements: int
    groups: Mapping[int, Group]
    rules: Mapping[int, MuonRule]
    ns_compile: bool

    def compile(self, bucket: Bucket, number: int) -> BucketProgram:
        """The program of `bucket`, the step's `number`-th."""
        plan, rank = self.plan, self.rank
        bucket = replace(bucket, matrices=tuple(sorted(bucket.matrices, key=self._order)))
        owned = [i for i in bucket.matrices if plan.owners[i] == rank]
        stacked, stacks, starts = self._stacks(owned)
        momentum, asked = gather_parts(plan, bucket, rank)
        updates, awaited = scatter_parts(plan, bucket, rank)
        dtype = self._gathered_dtype(bucket)
        gather = self._envelope(dtype, self._to_owners(momentum), self._to_holders(asked), bucket.gathers)
        scatter = self._envelope(self.wire[1], self._to_holders(updates), self._to_owners(awaited), bucket.scatters)
        own = [(i, f) for i in owned for f in plan.sources[i].on(rank)]
        kept = [(i, f) for i in owned for f in plan.layout.matrices[i].on(rank)]

        def stacked_views(listing: Listing | None) -> Callable[[list[Part]], Views]:
            return lambda parts: in_stacks(stacked, parts, starts, listing)

        program = BucketProgram(
            number=number,
            gather=gather,
            scatter=scatter,
            sent_sources=self._sources(momentum, in_message(sent_of(gather), self.sources), dtype),
            own_sources=self._sources(own, stacked_views(self.sources), torch.float32),
            arrivals=Copies(stacked_views(None)(asked), in_message(received_of(gather), None)(asked)),
            stacked=stacked,
            stacks=stacks,
            owned=len(owned),
            sent_updates=Copies(in_message(sent_of(scatter), None)(updates), stacked_views(None)(updates)),
            own_updates=self._updates(kept, stacked_views(self.weights)),
            received_updates=self._updates(awaited, in_message(received_of(scatter), self.weights)),
            rebroadcast=self._rebroadcast(bucket, stacked, scatter, kept, awaited, starts),
            also=[self._sent(name, bucket, stacks) for name in self._sends(bucket)],
        )
        program.stacked.allocated = False
        for envelope in filter(None, (gather, scatter)):
            envelope.sent.allocated = False
            envelope.received.allocated = False
        return program

    def _gathered_dtype(self, bucket: Bucket) -> torch.dtype:
        """The dtype of the gather: that of the gradients if only gradients are sent and they are narrower than `wire`;
        else `wire`."""
        dtypes = {self.gradients.get(self.places[i].group, torch.float32) for i in bucket.matrices}
        only = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return only if only.itemsize < self.wire[0].itemsize else self.wire[0]

    def _sends(self, bucket: Bucket) -> list[str]:
        """The tensors that the rules of the bucket's matrices send besides momentum; equal on all ranks."""
        return sorted({name for i in bucket.matrices for name in self.rules[self.places[i].group].sends})

    def _sent(self, name: str, bucket: Bucket, stacks: list[Stack]) -> Sent:
        """The gather of tensor `name`. Also puts its views into `sent` of this rank's stacks."""
        plan, rank = self.plan, self.rank
        members = tuple(i for i in bucket.matrices if name in self.rules[self.places[i].group].sends)
        owned = [i for i in members if plan.owners[i] == rank]
        sent, asked = gather_parts(plan, replace(bucket, matrices=members), rank)
        used = any(bool((plan.sources[i].rank != plan.owners[i]).any()) for i in members)
        gather = self._envelope(self.wire[0], self._to_owners(sent), self._to_holders(asked), used)
        region = Region(sum(plan.layout.matrices[i].matrix.numel for i in owned), torch.float32, self.device)
        starts: dict[int, int] = {}
        at = 0
        for s in stacks:
            if name in self.rules[s.group].sends:
                s.sent[name] = region.run(at, s.view.numel(), tuple(s.view.shape))
                starts.update({i: at + b * s.view[0].numel() for b, i in enumerate(s.numbers)})
                at += s.view.numel()
        own = [(i, f) for i in owned for f in plan.sources[i].on(rank)]
        to_stacks = in_stacks(region, asked, starts, None)
        found = Sent(
            name=name,
            gather=gather,
            sent_sources=self._sources(sent, in_message(sent_of(gather), self.sources), self.wire[0]),
            own_sources=self._sources(
                own, lambda parts: in_stacks(region, parts, starts, self.sources), torch.float32
            ),
            arrivals=Copies(to_stacks, in_message(received_of(gather), None)(asked)),
            stacked=region,
        )
        for memory in filter(None, (region, sent_of(gather), received_of(gather))):
            memory.allocated = False
        return found

    def _order(self, i: int) -> tuple[int, int, int, int, bool, int]:
        """Sort key of a matrix: by owner, then with the members of one stack side by side. Equal on all ranks."""
        m = self.plan.layout.matrices[i].matrix
        return self.plan.owners[i], m.rows, m.cols, self.places[i].group, m.transposed, i

    def _stacks(self, owned: list[int]) -> tuple[Region, list[Stack], dict[int, int]]:
        """The memory of the matrices that this rank orthogonalizes, their stacks, and the first element of each."""
        matrices = self.plan.layout.matrices
        region = Region(sum(matrices[i].matrix.numel for i in owned), torch.float32, self.device)
        stacks: list[Stack] = []
        starts: dict[int, int] = {}
        at = 0
        for (_, rows, cols, group, _), equal in groupby(owned, key=lambda i: self._order(i)[:5]):
            members = tuple(equal)
            starts.update({i: at + b * rows * cols for b, i in enumerate(members)})
            length = len(members) * rows * cols
            run = region.run(at, length, (len(members), rows, cols))
            of_members = [matrices[i].matrix for i in members]
            stacks.append(Stack(of_members, members, group, run, self._newton_schulz(rows, cols, group)))
            at += length
        return region, stacks, starts

    def _newton_schulz(self, rows: int, cols: int, group: int) -> Callable[..., None]:
        g, compiled = self.groups[group], self.ns_compile
        steps, schedule, dtype = g["ns_steps"], g["ns_schedule"], g["ns_dtype"]
        return orthogonalizer(rows, cols, self.device, steps, schedule, dtype, compiled=compiled)

    # Messages -------------------------------------------------------------------------------------------------------

    def _to_owners(self, parts: list[Part]) -> list[int]:
        return elements_by_rank(self.plan.layout.world_size, (self.plan.owners[i] for i, _ in parts), parts)

    def _to_holders(self, parts: list[Part]) -> list[int]:
        return elements_by_rank(self.plan.layout.world_size, (f.rank for _, f in parts), parts)

    def _envelope(self, dtype: torch.dtype, sends: list[int], receives: list[int], used: bool) -> Envelope | None:
        if not used:
            return None
        sent, received = (Region(sum(counts), dtype, self.device) for counts in (sends, receives))
        return Envelope(sent, received, sends, receives)

    def _sources(self, parts: list[Part], views: Callable[[list[Part]], Views], dtype: torch.dtype) -> list[Pieces]:
        return self._pieces(
            parts, views, self.sources, lambda place: place.device != self.device or dtype != torch.float32
        )

    def _updates(self, parts: list[Part], views: Callable[[list[Part]], Views]) -> list[Pieces]:
        return self._pieces(parts, views, self.weights, lambda place: place.device != self.device)

    def _pieces(
        self,
        parts: list[Part],
        views: Callable[[list[Part]], Views],
        listing: Listing,
        elsewhere: Callable[[Place], bool],
    ) -> list[Pieces]:
        """`parts` sorted into `Pieces`: one call processes each."""
        alike: dict[Place, list[int]] = {}
        for n, (i, _) in enumerate(parts):
            alike.setdefault(self.places[i], []).append(n)
        numbers, places = listing.numbers(parts), views(parts)
        found = []
        for place, members in alike.items():
            of_group = [places[n] for n in members]
            scratch = None
            if elsewhere(place):
                scratch = Region(sum(v.numel() for v in of_group), torch.float32, place.device)
            chosen = [numbers[n] for n in members]
            scratch_views = laid_out(scratch, of_group)
            run = one_run(of_group) if scratch is not None else None
            found.append(Pieces(place.group, place.scale, chosen, of_group, scratch, scratch_views, run))
        return found

    # Copies of the model --------------------------------------------------------------------------------------------

    def _rebroadcast(
        self,
        bucket: Bucket,
        stacked: Region,
        scatter: Envelope | None,
        kept: list[Part],
        awaited: list[Part],
        starts: Mapping[int, int],
    ) -> Rebroadcast | None:
        """Messages within the replica group: the updates that each copy's owners made; None if there are none."""
        if not bucket.relay:
            return None
        column = list(self.replica_group)
        counts = [bucket.relay.get(r, 0) for r in column]
        sent, packing = None, Copies([], [])
        dtype = self.wire[1]
        as_it_is = len(kept) == len(starts) and sum(f.length for _, f in kept) == stacked.numel
        if awaited or dtype != torch.float32 or not as_it_is:
            made = sorted([*kept, *awaited], key=lambda part: self.plan.owners[part[0]])
            sent = Region(sum(f.length for _, f in made), dtype, self.device)
            own = dict(zip(map(key, kept), in_stacks(stacked, kept, starts, None), strict=True))
            others = dict(zip(map(key, awaited), in_message(received_of(scatter), None)(awaited), strict=True))
            packing = Copies(in_message(sent, None)(made), [(own | others)[key(part)] for part in made])
            sent.allocated = False
        received, updates = {}, {}
        for place, r in enumerate(column):
            if r == self.rank or not counts[place]:
                continue
            copies = relayed_parts(self.plan, bucket, self.rank, [r])
            received[place] = Region(counts[place], dtype, self.device)
            updates[place] = self._updates(copies, in_message(received[place], self.weights))
            received[place].allocated = False
        # Under DDP nothing is gathered, so the gather's memory can hold a second broadcast.
        times = 1 if bucket.gathers else 2
        room = times * max(self.bucket_elements, *bucket.relay.values())
        return Rebroadcast(counts, room, sent, packing, received, updates)
