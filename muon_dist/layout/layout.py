"""`Layout`: the fragments of every matrix on every rank, as frozen data with checks.

A parameter is split into matrices (one per weight, head or expert). A rank holds fragments of matrices inside local
tensors, called buffers. This data contains every difference between DDP, ZeRO and FSDP2, so no code asks which
framework is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.cover import check_cover
from muon_dist.layout.fragments import Fragment, Fragments
from muon_dist.layout.matrix import Matrix


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """One matrix and its fragments on all ranks; copies are allowed, gaps are not.

    `fragments` may be any sequence of `Fragment`; it is stored as `Fragments`.

    Raises LayoutError if the fragments leave a gap, run past the end, or overlap on one rank.
    """

    matrix: Matrix
    fragments: Fragments

    def __post_init__(self) -> None:
        f = Fragments.of(self.fragments)
        object.__setattr__(self, "fragments", f)
        if not f.tiles(self.matrix.numel):
            check_cover(f, self.matrix)

    @property
    def buffer(self) -> int:
        """Index of the buffer that holds this matrix; equal on all ranks that hold a part."""
        return int(self.fragments.buffer[0])

    def on(self, rank: int) -> Fragments:
        """The fragments on `rank`."""
        return self.fragments.on(rank)

    def held(self, rank: int) -> int:
        """Elements of the matrix that `rank` holds."""
        return int(self.fragments.length[self.fragments.rank == rank].sum())

    def held_by_rank(self, world_size: int) -> np.ndarray:
        """Elements of the matrix that each rank holds, (world_size,)."""
        held = np.zeros(world_size, dtype=np.int64)
        np.add.at(held, self.fragments.rank, self.fragments.length)
        return held

    def sources(self, owner: int, domains: Sequence[int] = ()) -> Fragments:
        """The matrix's sources: fragments that cover it without overlap, in order; these ranks keep its momentum.

        If several ranks hold a copy, prefer the owner itself, then a rank in the owner's copy of the model, then the
        fragment that ends last, then the lowest rank. If copies overlap, a source may be a part of a fragment.
        Deterministic: every rank computes the same sources.
        """
        own = self.on(owner)
        if int(own.length.sum()) == self.matrix.numel:
            return own.chosen(np.argsort(own.start, kind="stable"))
        domain = np.asarray(domains)
        own_copy = (
            self.fragments.chosen(domain[self.fragments.rank] == domain[owner]) if len(domain) else self.fragments
        )
        if int(own_copy.length.sum()) == self.matrix.numel:  # no second copy in the owner's domain
            return own_copy.chosen(np.argsort(own_copy.start, kind="stable"))
        near = set(own_copy.rank.tolist()) if len(domain) else set()
        if self.fragments.all_runs:
            return self._runs(own, near, owner)
        best: dict[int, Fragment] = {}  # copies have equal blocks: choose one holder of each block
        for f in sorted(self.fragments, key=lambda f: (f.rank != owner, f.rank not in near, f.rank)):
            best.setdefault(f.block.start, f)
        if sum(f.length for f in best.values()) != self.matrix.numel:
            raise LayoutError(f"{self.matrix.name}: its copies are divided into different blocks")
        return Fragments.of(sorted(best.values(), key=lambda f: f.block.start))

    def _runs(self, own: Fragments, near: set[int], owner: int) -> Fragments:
        """`sources` for runs, whose copies may be divided at different positions."""
        others = [f for f in self.fragments if f.rank != owner]
        ordered = sorted(own, key=lambda f: f.block.start)
        cover = list(ordered)
        at = 0
        for f in (*ordered, None):
            stop = f.block.start if f is not None else self.matrix.numel
            while at < stop:
                holding = (o for o in others if o.block.start <= at < o.block.stop)
                best = max(holding, key=lambda o: (o.rank in near, o.block.stop, -o.rank))
                reach = min(best.block.stop, stop)
                position = best.local.start + at - best.block.start
                cover.append(Fragment.run(best.rank, at, reach - at, best.buffer, position))
                at = reach
            if f is not None:
                at = f.block.stop
        return Fragments.of(sorted(cover, key=lambda f: f.block.start))


@dataclass(frozen=True)
class Layout:
    """Every matrix of a model over one process group.

    Attributes:
        kind: name of the layout: "replicated", "flat", "per_parameter" or "dtensor".
        world_size: number of ranks in the process group.
        matrices: all matrices in the order of the parameters, equal on all ranks.
        phases: groups of buffers that one call steps; each phase is balanced separately. By default one phase.
        complete_gradients: the framework gives every rank a gradient for every stepped buffer, so the ranks need not
            compare which gradients are missing.
        domains: copy-of-the-model id per rank (HSDP: usually a node). Sources are preferably in the owner's domain.
            Empty: one copy.
        columns: replica-group id per rank: ranks with equal ids hold the same shard in different copies of the model
            (all ranks under DDP, the holders of one shard under HSDP) and can broadcast to each other. See `relayed`.
            Empty: there are no copies.
    """

    kind: str
    world_size: int
    matrices: tuple[MatrixLayout, ...]
    phases: tuple[tuple[int, ...], ...] = ()
    complete_gradients: bool = False
    domains: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    _phase_of: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)
    _relayed: dict[int, bool] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = [m.matrix.name for m in self.matrices]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise LayoutError(f"{twice} is in the layout twice")
        if self.domains and len(self.domains) != self.world_size:
            raise LayoutError(f"{len(self.domains)} domains for {self.world_size} ranks")
        if self.columns and not len(self.columns) == len(self.domains) == self.world_size:
            raise LayoutError(
                f"{len(self.columns)} columns and {len(self.domains)} domains for {self.world_size} ranks"
            )
        for m in self.matrices:
            wrong = m.fragments.rank[(m.fragments.rank < 0) | (m.fragments.rank >= self.world_size)]
            if len(wrong):
                raise LayoutError(f"{m.matrix.name}: rank {wrong[0]} of a world of {self.world_size}")
            if (m.fragments.buffer != m.fragments.buffer[0]).any():
                raise LayoutError(f"{m.matrix.name}: its fragments are in different buffers")
        self._phase_of.update({buffer: i for i, phase in enumerate(self.phases) for buffer in phase})

    def phase(self, matrix: MatrixLayout) -> int:
        """Index of the phase in which `matrix` is stepped."""
        return self._phase_of.get(matrix.buffer, 0)

    def relayed(self, i: int) -> bool:
        """Whether the owner sends the update of matrix `i` only within its domain, and each rank of this domain then
        broadcasts its part to its column. Requires a copy in every domain, with equal fragments along each column."""
        if i not in self._relayed:
            self._relayed[i] = bool(self.columns) and self._agree(self.matrices[i].fragments)
        return self._relayed[i]

    def _agree(self, f: Fragments) -> bool:
        domain, column = (np.asarray(numbers)[f.rank] for numbers in (self.domains, self.columns))
        copies = len(set(self.domains))
        if len(f) % copies:
            return False
        order = np.lexsort((f.start, column, domain))
        by_copy = np.stack([domain, column, f.start, f.length, f.cols])[:, order].reshape(5, copies, -1)
        each_its_own = (by_copy[0] == by_copy[0, :, :1]).all() and len(set(by_copy[0, :, 0].tolist())) == copies
        return bool(each_its_own and (by_copy[1:] == by_copy[1:, :1]).all())

    @cached_property
    def numel(self) -> int:
        """Elements of all matrices."""
        return sum(m.matrix.numel for m in self.matrices)

    def fields(self) -> Iterable[tuple[str, object]]:
        """(name, value) of everything that must be equal on all ranks, in a fixed order."""
        yield "layout kind", self.kind
        yield "world size", self.world_size
        yield "number of matrices", len(self.matrices)
        yield "phases", self.phases
        yield "domains", self.domains
        yield "columns", self.columns
        for m in self.matrices:
            block = m.matrix.block
            yield f"{m.matrix.name}: shape", (block.rows, block.cols)
            yield f"{m.matrix.name}: place in the parameter", (block.start, block.stride, m.matrix.transposed)
            yield f"{m.matrix.name}: fragments", m.fragments
