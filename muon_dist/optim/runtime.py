"""Executes a plan: momentum on the sources, gather to owners, orthogonalize, scatter, update on destinations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from muon_dist.exchange.overlap import pipeline
from muon_dist.exchange.schedule import (
    Bucket,
    Part,
    bucket_elements,
    elements_by_rank,
    gather_parts,
    make_buckets,
    relayed_parts,
    scatter_parts,
)
from muon_dist.exchange.transport import Transport
from muon_dist.layout.fragment import Fragment, Matrix, Span
from muon_dist.numerics import compute_dtype, kernel_name, newton_schulz_
from muon_dist.optim.binding import Binding, Group
from muon_dist.optim.options import Options
from muon_dist.optim.passage import Observer, Orthogonalize, Passage, Piece, Recipe, Stack, Step, Work, view
from muon_dist.ownership import OwnershipPlan

__all__ = ["Observer", "Runtime", "Work", "view"]


class Runtime:
    """Momentum shards of one rank, and the step over them.

    Args:
        binding, plan: what is stepped and who owns it.
        transport: over the binding's process group.
        group_of: parameter-group index of each buffer.
        options: dtype and size of what travels, overlap, and how Newton-Schulz runs.
        orthogonalize: what is done with a stack of momentum; by default Newton-Schulz with the group's options.

    Attributes:
        momentum: buffer -> this rank's fp32 momentum: of the local buffer's shape, padding included, where the rank is
            a source of all that it holds or must keep it all, else one flat tensor of the source fragments in matrix
            order, or nothing.
        orthogonalized: matrices orthogonalized on this rank since the start.
    """

    def __init__(
        self,
        binding: Binding,
        plan: OwnershipPlan,
        transport: Transport,
        group_of: Mapping[int, int],
        options: Options,
        orthogonalize: Orthogonalize | None = None,
    ) -> None:
        self.plan = plan
        self.binding = binding
        self.transport = transport
        self.observer: Observer | None = None
        self.orthogonalized = 0
        self.momentum: dict[int, torch.Tensor] = {}
        self._group_of = group_of
        self._bucket_elements = bucket_elements(options.bucket_bytes)
        self._options = options
        self._orthogonalize = orthogonalize if orthogonalize is not None else self._newton_schulz
        self._recipes: dict[tuple[int, ...], list[Recipe]] = {}
        self._matrices = [m.matrix for m in plan.layout.matrices]
        self._momentum_spans: list[list[tuple[Fragment, list[Span], list[Span]]]] = []
        self._matrices_of: dict[int, list[int]] = {}
        self._place_momentum()

    # Momentum ---------------------------------------------------------------------------------------------------

    def _place_momentum(self) -> None:
        rank = self.transport.rank
        everywhere = self.binding.everywhere(self.plan)
        sourced: dict[int, list[tuple[int, Fragment]]] = {b: [] for b in range(len(self.binding.buffers))}
        held = dict.fromkeys(sourced, 0)
        for i, layout in enumerate(self.plan.layout.matrices):
            held[layout.buffer] += layout.held(rank)
            sourced[layout.buffer] += [(i, f) for f in self.plan.sources[i].on(rank)]
        self._momentum_spans = [[] for _ in self._matrices]
        for buffer, pieces in sourced.items():
            tensor = self.binding.local(self.binding.buffers[buffer])
            length = sum(f.length for _, f in pieces)
            whole = length == held[buffer] or buffer in everywhere
            if not whole and not pieces:
                continue
            size = tensor.shape if whole else (length,)
            self.momentum[buffer] = torch.zeros(size, dtype=torch.float32, device=tensor.device)
            at = 0
            self._matrices_of[buffer] = list(dict.fromkeys(i for i, _ in pieces))
            for i, f in pieces:
                spans = f.spans(self._matrices[i])
                places = spans if whole else _packed(spans, at)
                self._momentum_spans[i].append((f, spans, places))
                at += f.length

    def momentum_pieces(self, buffer: int) -> list[tuple[Matrix, Span, torch.Tensor]]:
        """This rank's momentum in `buffer`: matrix, place in the buffer, and the `(rows, cols)` view of it."""
        flat = self.momentum[buffer].view(-1)
        return [
            (self._matrices[i], span, view(flat, place))
            for i in self._matrices_of[buffer]
            for _, spans, places in self._momentum_spans[i]
            for span, place in zip(spans, places, strict=True)
        ]

    def _update_momentum(self, work: Mapping[int, Work], factor: float) -> None:
        for buffer, w in work.items():
            momentum = self.momentum.get(buffer)
            if momentum is None:
                continue
            weight = 1 - w.group["momentum"]
            gradient = w.gradient.reshape(-1)
            if momentum.numel() != w.parameter.numel():
                for _, span, piece in self.momentum_pieces(buffer):
                    piece.lerp_(_scaled(view(gradient, span), factor), weight)
            elif gradient.dtype == torch.float32 and factor == 1.0:
                momentum.view(-1).lerp_(gradient, weight)
            else:  # in parts, so that no second gradient is ever alive
                parts = zip(*(t.split(self._bucket_elements) for t in (momentum.view(-1), gradient)), strict=True)
                for part, g in parts:
                    part.lerp_(_scaled(g, factor), weight)

    # One step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, work: dict[int, Work]) -> None:
        """Step the buffers of `work`; the same buffers on every rank.

        Momentum first, then weight decay on everything held, then the orthogonalized update, bucket by bucket.
        """
        progress = self.transport.progress
        progress.enter("momentum")
        factor = self.binding.gradient_factor()
        self._update_momentum(work, factor)
        for w in work.values():
            w.parameter.mul_(1 - w.group["lr"] * w.group["weight_decay"])
        recipes = self._recipes_for(tuple(sorted(work)))
        step = self._shared(work, factor)
        passages: dict[int, Passage] = {}
        for stage, bucket in pipeline(len(recipes), self._options.overlap):
            if stage == "gather":
                passages[bucket] = Passage(recipes[bucket], bucket, step)
            if stage == "orthogonalize":
                self.orthogonalized += sum(len(s.matrices) for s in recipes[bucket].stacks)
            getattr(passages[bucket], stage)()
            if stage == "update":
                del passages[bucket]
        phases = self.plan.layout.phases
        if len(phases) <= 1 or any(buffer in work for buffer in phases[-1]):
            progress.finish_step()
        else:
            progress.enter("idle")

    def _newton_schulz(self, stack: torch.Tensor, group: Group) -> None:
        compiled = self._options.ns_compile
        newton_schulz_(stack, group["ns_steps"], group["ns_schedule"], group["ns_dtype"], compiled=compiled)

    def kernels(self, groups: Sequence[Group]) -> dict[tuple[int, int], str]:
        """For each shape that this rank orthogonalizes, which form of the iteration runs and what multiplies.

        `groups` are the optimizer's parameter groups.
        """
        names: dict[tuple[int, int], str] = {}
        compiled = self._options.ns_compile
        for i in self.plan.owned_by(self.transport.rank):
            m, group = self._matrices[i], groups[self._group_of[self.plan.layout.matrices[i].buffer]]
            dtype = compute_dtype(group["ns_dtype"], self.binding.device, group["ns_schedule"])
            names[m.rows, m.cols] = kernel_name(m.rows, m.cols, dtype, self.binding.device, compiled=compiled)
        return names

    def _shared(self, work: Mapping[int, Work], factor: float) -> Step:
        return Step(
            work=work,
            factor=factor,
            wire=(self._options.wire_dtype or torch.float32, self._scatter_dtype(work)),
            rounds=self._options.wire_dtype is not None,
            matrices=self._matrices,
            momentum=self.momentum,
            transport=self.transport,
            device=self.binding.device,
            orthogonalize=self._orthogonalize,
            observer=self.observer,
        )

    def _scatter_dtype(self, work: Mapping[int, Work]) -> torch.dtype:
        """The narrowest dtype that loses nothing of any result (or the option); the same on all ranks."""
        if self._options.wire_dtype is not None:
            return self._options.wire_dtype
        dtypes = {
            compute_dtype(w.group["ns_dtype"], self.binding.device, w.group["ns_schedule"]) for w in work.values()
        }
        only = dtypes.pop() if len(dtypes) == 1 else torch.float32
        return only if only.itemsize < torch.float32.itemsize else torch.float32

    def _recipes_for(self, buffers: tuple[int, ...]) -> list[Recipe]:
        if buffers not in self._recipes:
            chosen = [i for i, m in enumerate(self.plan.layout.matrices) if m.buffer in buffers]
            buckets = make_buckets(self.plan, chosen, self._bucket_elements, self._options.overlap)
            self._recipes[buffers] = [self._compile(bucket) for bucket in buckets]
        return self._recipes[buffers]

    # Recipes ----------------------------------------------------------------------------------------------------

    def _compile(self, bucket: Bucket) -> Recipe:
        rank, world, plan = self.transport.rank, self.transport.world_size, self.plan
        bucket = replace(bucket, matrices=tuple(sorted(bucket.matrices, key=self._place_in_bucket)))
        stacks, starts = self._stacks(bucket)
        owned = [i for i in bucket.matrices if plan.owners[i] == rank]
        momentum, asked = gather_parts(plan, bucket, rank)
        updates, awaited = scatter_parts(plan, bucket, rank)
        column = self.transport.column_ranks if bucket.relay else []
        copies = relayed_parts(plan, bucket, rank, [r for r in column if r != rank])
        # beside relays there is no gather under DDP, which leaves room for one more
        times = 1 if bucket.gathers else 2

        def of_owners(parts: list[Part]) -> list[int]:
            return elements_by_rank(world, (plan.owners[i] for i, _ in parts), parts)

        def of_holders(parts: list[Part]) -> list[int]:
            return elements_by_rank(world, (f.rank for _, f in parts), parts)

        return Recipe(
            stacks=stacks,
            stacked=sum(s.numel for s in stacks),
            own_sources=self._pieces([(i, f) for i in owned for f in plan.sources[i].on(rank)], starts),
            gather_send=self._pieces(momentum, starts),
            gather_receive=self._pieces(asked, starts),
            gather_splits=(of_owners(momentum), of_holders(asked)),
            own_destinations=self._pieces([(i, f) for i in owned for f in plan.layout.matrices[i].on(rank)], starts),
            scatter_send=self._pieces(updates, starts),
            scatter_receive=self._pieces(awaited, starts),
            scatter_splits=(of_holders(updates), of_owners(awaited)),
            gathers=bucket.gathers,
            scatters=bucket.scatters,
            relay=tuple(bucket.relay.get(r, 0) for r in column),
            relay_receive=self._pieces(copies, starts),
            room=times * max(self._bucket_elements, *bucket.relay.values()) if bucket.relay else 0,
        )

    def _place_in_bucket(self, i: int) -> tuple[int, int, int, int, int]:
        """Owner by owner, and what makes one stack side by side; the same on all ranks."""
        m = self._matrices[i]
        return self.plan.owners[i], m.rows, m.cols, self._group_of[self.plan.layout.matrices[i].buffer], i

    def _stacks(self, bucket: Bucket) -> tuple[tuple[Stack, ...], dict[int, int]]:
        """What this rank orthogonalizes, and where each of its matrices begins."""
        owned = (i for i in bucket.matrices if self.plan.owners[i] == self.transport.rank)
        stacks: list[Stack] = []
        starts: dict[int, int] = {}
        at = 0
        for (_, rows, cols, _), equal in groupby(owned, key=lambda i: self._place_in_bucket(i)[:4]):
            members = tuple(equal)
            stacks.append(Stack(members, self.plan.layout.matrices[members[0]].buffer, rows, cols, at))
            starts.update({i: at + b * rows * cols for b, i in enumerate(members)})
            at += stacks[-1].numel
        return tuple(stacks), starts

    def _pieces(self, fragments: list[Part], starts: Mapping[int, int]) -> tuple[Piece, ...]:
        """The fragments laid end to end in a message, with their places on this rank."""

        def pieces() -> Iterator[Piece]:
            at = 0
            for i, f in fragments:
                here = f.rank == self.transport.rank
                yield Piece(
                    matrix=i,
                    buffer=f.buffer,
                    length=f.length,
                    message=at,
                    stacked=starts[i] + f.offset if i in starts else -1,
                    spans=tuple(f.spans(self._matrices[i])) if here else (),
                    kept=tuple(next((p for g, _, p in self._momentum_spans[i] if here and g == f), ())),
                )
                at += f.length

        return tuple(pieces())


def _scaled(gradient: torch.Tensor, factor: float) -> torch.Tensor:
    """`gradient` in fp32, times `factor`; itself where that is what it is."""
    gradient = gradient.to(torch.float32)
    return gradient if factor == 1.0 else gradient * factor


def _packed(spans: list[Span], at: int) -> list[Span]:
    """The same spans laid end to end from `at` on."""
    packed = []
    for s in spans:
        packed.append(Span(s.offset, at, s.rows, s.cols, s.cols))
        at += s.rows * s.cols
    return packed
