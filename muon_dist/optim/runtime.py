"""Executes a plan: momentum on the sources, gather to owners, orthogonalize, scatter, update on destinations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from muon_dist.exchange.schedule import Bucket, make_buckets, outgoing, returning, splits
from muon_dist.exchange.transport import Transport
from muon_dist.layout.fragment import Fragment, Matrix, Span
from muon_dist.numerics import compute_dtype, newton_schulz
from muon_dist.optim.binding import Binding, Group, update_scale
from muon_dist.ownership import OwnershipPlan


@dataclass
class Work:
    """One buffer of this step: the local tensor, its gradient, its parameter group."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    group: Group


@dataclass(frozen=True)
class Piece:
    """A fragment's place in a packed message: elements `[at, at + length)`."""

    matrix: int
    fragment: Fragment
    at: int


@dataclass(frozen=True)
class Recipe:
    """A bucket as one rank executes it."""

    stacks: dict[tuple[int, int, int], tuple[int, ...]]  # (rows, cols, group index) -> owned matrices
    gather_send: tuple[Piece, ...]
    gather_receive: tuple[Piece, ...]
    gather_splits: tuple[list[int], list[int]]
    scatter_send: tuple[Piece, ...]
    scatter_receive: tuple[Piece, ...]
    scatter_splits: tuple[list[int], list[int]]
    gathers: bool  # on any rank, so that all enter the collective or none does
    scatters: bool


def view(flat: torch.Tensor, span: Span) -> torch.Tensor:
    """The `(rows, cols)` block of a flat buffer that `span` names."""
    return flat.as_strided((span.rows, span.cols), (span.stride, 1), flat.storage_offset() + span.position)


Observer = Callable[[Matrix, torch.Tensor, torch.Tensor], None]
"""Called on the owner with a matrix, its (Nesterov) momentum and its orthogonalized update, both (rows, cols)."""


class Runtime:
    """Momentum shards of one rank, and the step over them.

    Args:
        binding, plan: what is stepped and who owns it.
        transport: over the binding's process group.
        group_of: parameter-group index of each buffer.
        bucket_bytes: bound on what this rank sends, receives or stacks at a time, in bytes of fp32.
        wire_dtype: dtype of gathered momentum and scattered updates; None moves both without loss.

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
        *,
        bucket_bytes: int,
        wire_dtype: torch.dtype | None,
    ) -> None:
        self.plan = plan
        self.binding = binding
        self.transport = transport
        self.observer: Observer | None = None
        self.orthogonalized = 0
        self.momentum: dict[int, torch.Tensor] = {}
        self._group_of = group_of
        self._bucket_elements = max(1, bucket_bytes // 4)
        self._wire_dtype = wire_dtype
        self._recipes: dict[tuple[int, ...], list[Recipe]] = {}
        self._matrices = [m.matrix for m in plan.layout.matrices]
        self._momentum_spans: list[list[tuple[Fragment, list[Span], list[Span]]]] = []
        self._place_momentum()

    # Momentum ---------------------------------------------------------------------------------------------------

    def _place_momentum(self) -> None:
        rank = self.transport.rank
        everywhere = self.binding.everywhere(self.plan)
        sourced: dict[int, list[tuple[int, Fragment]]] = {b: [] for b in range(len(self.binding.buffers))}
        held = dict.fromkeys(sourced, 0)
        for i, layout in enumerate(self.plan.layout.matrices):
            held[layout.buffer] += layout.held(rank)
            sourced[layout.buffer] += [(i, f) for f in self.plan.sources[i] if f.rank == rank]
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
            for i, layout in enumerate(self.plan.layout.matrices)
            if layout.buffer == buffer
            for _, spans, places in self._momentum_spans[i]
            for span, place in zip(spans, places, strict=True)
        ]

    def _update_momentum(self, work: Mapping[int, Work]) -> None:
        factor = self.binding.gradient_factor()
        for buffer, w in work.items():
            if factor != 1.0:
                w.gradient = w.gradient * factor
            buf = self.momentum.get(buffer)
            if buf is None:
                continue
            weight = 1 - w.group["momentum"]
            gradient = w.gradient.reshape(-1)
            if buf.numel() == w.parameter.numel():
                buf.view(-1).lerp_(gradient.to(buf.dtype), weight)
            else:
                for _, span, piece in self.momentum_pieces(buffer):
                    piece.lerp_(view(gradient, span).to(buf.dtype), weight)

    # One step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, work: dict[int, Work]) -> None:
        """Step the buffers of `work`; the same buffers on every rank.

        Momentum first, then weight decay on everything held, then bucket by bucket the orthogonalized update.
        """
        progress = self.transport.progress
        progress.enter("momentum")
        self._update_momentum(work)
        for w in work.values():
            w.parameter.mul_(1 - w.group["lr"] * w.group["weight_decay"])
        for index, recipe in enumerate(self._recipes_for(tuple(sorted(work)))):
            progress.enter("gather", index)
            stacks = self._gather(recipe, work)
            progress.enter("orthogonalize", index)
            updates = self._orthogonalize(recipe, stacks, work)
            progress.enter("scatter", index)
            received = self._scatter(recipe, updates, work)
            progress.enter("update", index)
            self._update(recipe, updates, received, work)
        phases = self.plan.layout.phases
        if len(phases) <= 1 or any(buffer in work for buffer in phases[-1]):
            progress.finish_step()
        else:
            progress.enter("idle")

    def _recipes_for(self, buffers: tuple[int, ...]) -> list[Recipe]:
        if buffers not in self._recipes:
            chosen = [i for i, m in enumerate(self.plan.layout.matrices) if m.buffer in buffers]
            buckets = make_buckets(self.plan, chosen, self._bucket_elements)
            self._recipes[buffers] = [self._compile(bucket) for bucket in buckets]
        return self._recipes[buffers]

    def _compile(self, bucket: Bucket) -> Recipe:
        rank, world = self.transport.rank, self.transport.world_size
        stacks: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for i in bucket.matrices:
            if self.plan.owners[i] == rank:
                group = self._group_of[self.plan.layout.matrices[i].buffer]
                stacks[self._matrices[i].rows, self._matrices[i].cols, group].append(i)
        peers = [r for r in range(world) if r != rank]
        return Recipe(
            stacks={key: tuple(members) for key, members in stacks.items()},
            gather_send=_pieces(p for r in peers for p in outgoing(self.plan, bucket, rank, r)),
            gather_receive=_pieces(p for r in peers for p in outgoing(self.plan, bucket, r, rank)),
            gather_splits=splits(bucket.gather, rank, world),
            scatter_send=_pieces(p for r in peers for p in returning(self.plan, bucket, rank, r)),
            scatter_receive=_pieces(p for r in peers for p in returning(self.plan, bucket, r, rank)),
            scatter_splits=splits(bucket.scatter, rank, world),
            gathers=bool(bucket.gather),
            scatters=bool(bucket.scatter),
        )

    def _fill(self, matrix: int, fragment: Fragment, target: torch.Tensor, work: Mapping[int, Work]) -> None:
        """Write what is orthogonalized (momentum, or its Nesterov look-ahead) of a local fragment into `target`."""
        buffer = fragment.buffer
        w = work[buffer]
        momentum, gradient = self.momentum[buffer].view(-1), w.gradient.reshape(-1)
        spans, places = next((s, p) for f, s, p in self._momentum_spans[matrix] if f == fragment)
        at = 0
        for span, place in zip(spans, places, strict=True):
            out = target[at : at + span.rows * span.cols].view(span.rows, span.cols)
            if w.group["nesterov"]:
                out.copy_(view(gradient, span)).lerp_(view(momentum, place).to(out.device), w.group["momentum"])
            else:
                out.copy_(view(momentum, place))
            at += span.rows * span.cols

    def _gather(self, recipe: Recipe, work: Mapping[int, Work]) -> dict[tuple[int, int, int], torch.Tensor]:
        device, rank = self.binding.device, self.transport.rank
        received = None
        if recipe.gathers:
            sends, receives = recipe.gather_splits
            packed = torch.empty(sum(sends), dtype=torch.float32, device=device)
            for p in recipe.gather_send:
                self._fill(p.matrix, p.fragment, packed[p.at : p.at + p.fragment.length], work)
            if self._wire_dtype is not None:
                packed = packed.to(self._wire_dtype)
            received = self.transport.all_to_all(packed, sends, receives)
        stacks: dict[tuple[int, int, int], torch.Tensor] = {}
        flat_of: dict[int, torch.Tensor] = {}
        for key, members in recipe.stacks.items():
            rows, cols, _ = key
            stacks[key] = torch.empty(len(members), rows, cols, dtype=torch.float32, device=device)
            flat_of.update({i: stacks[key][b].view(-1) for b, i in enumerate(members)})
            for i in members:
                for f in self.plan.sources[i]:
                    if f.rank == rank:
                        self._fill(i, f, flat_of[i][f.offset : f.stop], work)
        for p in recipe.gather_receive:
            assert received is not None
            f = p.fragment
            flat_of[p.matrix][f.offset : f.stop].copy_(received[p.at : p.at + f.length])
        return stacks

    def _orthogonalize(
        self, recipe: Recipe, stacks: dict[tuple[int, int, int], torch.Tensor], work: Mapping[int, Work]
    ) -> dict[int, torch.Tensor]:
        """The flattened orthogonalized update of each owned matrix, in the dtype that travels."""
        updates: dict[int, torch.Tensor] = {}
        wire = self._scatter_dtype(work)
        for key, members in recipe.stacks.items():
            group = work[self.plan.layout.matrices[members[0]].buffer].group
            stack = stacks.pop(key)
            result = newton_schulz(stack, group["ns_steps"], group["ns_schedule"], group["ns_dtype"])
            self.orthogonalized += len(members)
            if self.observer is not None:
                for b, i in enumerate(members):
                    self.observer(self._matrices[i], stack[b], result[b])
            result = result.to(wire)
            updates.update({i: result[b].view(-1) for b, i in enumerate(members)})
        return updates

    def _scatter_dtype(self, work: Mapping[int, Work]) -> torch.dtype:
        """The narrowest dtype that loses nothing of any result (or the option); the same on all ranks."""
        if self._wire_dtype is not None:
            return self._wire_dtype
        dtypes = {
            compute_dtype(w.group["ns_dtype"], self.binding.device, w.group["ns_schedule"]) for w in work.values()
        }
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def _scatter(
        self, recipe: Recipe, updates: Mapping[int, torch.Tensor], work: Mapping[int, Work]
    ) -> torch.Tensor | None:
        if not recipe.scatters:
            return None
        sends, receives = recipe.scatter_splits
        packed = torch.empty(sum(sends), dtype=self._scatter_dtype(work), device=self.binding.device)
        for p in recipe.scatter_send:
            f = p.fragment
            packed[p.at : p.at + f.length].copy_(updates[p.matrix][f.offset : f.stop])
        return self.transport.all_to_all(packed, sends, receives)

    def _update(
        self,
        recipe: Recipe,
        updates: Mapping[int, torch.Tensor],
        received: torch.Tensor | None,
        work: Mapping[int, Work],
    ) -> None:
        for i, update in updates.items():
            for f in self.plan.layout.matrices[i].on(self.transport.rank):
                self._apply(i, f, update[f.offset : f.stop], work)
        for p in recipe.scatter_receive:
            assert received is not None
            self._apply(p.matrix, p.fragment, received[p.at : p.at + p.fragment.length], work)

    def _apply(self, matrix: int, fragment: Fragment, update: torch.Tensor, work: Mapping[int, Work]) -> None:
        w = work[fragment.buffer]
        flat = w.parameter.view(-1)
        step = -float(w.group["lr"]) * update_scale(w.group["scale"], self._matrices[matrix])
        at = 0
        for span in fragment.spans(self._matrices[matrix]):
            block = update[at : at + span.rows * span.cols].view(span.rows, span.cols)
            view(flat, span).add_(block.to(flat.device, torch.float32), alpha=step)
            at += span.rows * span.cols


def _packed(spans: list[Span], at: int) -> list[Span]:
    """The same spans laid end to end from `at` on."""
    packed = []
    for s in spans:
        packed.append(Span(s.offset, at, s.rows, s.cols, s.cols))
        at += s.rows * s.cols
    return packed


def _pieces(fragments: Iterable[tuple[int, Fragment]]) -> tuple[Piece, ...]:
    pieces = []
    at = 0
    for matrix, fragment in fragments:
        pieces.append(Piece(matrix, fragment, at))
        at += fragment.length
    return tuple(pieces)
