"""Which rank holds which fragments of every matrix, as frozen data that checks itself.

A parameter is cut into matrices (one per weight, head or expert); a rank holds fragments of matrices inside local
tensors called buffers. Everything that differs between DDP, ZeRO and FSDP2 is in this data; no code asks which
framework produced it.
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
    """One matrix and every fragment of it, on all ranks; copies are allowed, gaps are not.

    `fragments` may be given as any sequence of `Fragment` and is kept as `Fragments`.

    Raises LayoutError when the fragments leave a gap, run past the end, or overlap on one rank.
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
        """The buffer that holds this matrix; the same on every rank that holds a part."""
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
        """A cover of the matrix without overlap, in the order of the matrix; momentum lives on these.

        If several ranks hold a copy, prefer the owner itself, then a rank of the owner's own copy of the model, then
        the fragment that reaches furthest, then the lowest rank. A source may be a part of a fragment where copies
        overlap. Deterministic: every rank computes the same.
        """
        own = self.on(owner)
        if int(own.length.sum()) == self.matrix.numel:
            return own.chosen(np.argsort(own.start, kind="stable"))
        domain = np.asarray(domains)
        own_copy = (
            self.fragments.chosen(domain[self.fragments.rank] == domain[owner]) if len(domain) else self.fragments
        )
        if int(own_copy.length.sum()) == self.matrix.numel:  # no copies, or none in the owner's domain
            return own_copy.chosen(np.argsort(own_copy.start, kind="stable"))
        near = set(own_copy.rank.tolist()) if len(domain) else set()
        if self.fragments.all_runs:
            return self._runs(own, near, owner)
        best: dict[int, Fragment] = {}  # copies of blocks are equal: one holder of each
        for f in sorted(self.fragments, key=lambda f: (f.rank != owner, f.rank not in near, f.rank)):
            best.setdefault(f.block.start, f)
        if sum(f.length for f in best.values()) != self.matrix.numel:
            raise LayoutError(f"{self.matrix.name}: its copies are cut into different blocks")
        return Fragments.of(sorted(best.values(), key=lambda f: f.block.start))

    def _runs(self, own: Fragments, near: set[int], owner: int) -> Fragments:
        """`sources` of runs, whose copies may be cut at different places."""
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
        kind: a word for messages ("replicated", "flat", "per_parameter", "dtensor").
        world_size: ranks of the process group.
        matrices: in the order of the parameters, the same on all ranks.
        phases: buffers that are stepped together; balance is sought within each. By default all are.
        complete_gradients: the framework hands every rank a gradient for every buffer that is stepped, so the ranks
            need not agree first on which are missing.
        domains: for each rank a number that ranks near each other share (HSDP: the copy of the model, usually a node).
            Of copies, those of the owner's own domain are its sources. Empty: all are equal.
        columns: replica-group id per rank: ranks with equal ids hold the same shard in different copies of the model
            (all ranks under DDP, those of one shard under HSDP) and can broadcast among each other. See `relayed`.
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
                raise LayoutError(f"{m.matrix.name}: its fragments lie in different buffers")
        self._phase_of.update({buffer: i for i, phase in enumerate(self.phases) for buffer in phase})

    def phase(self, matrix: MatrixLayout) -> int:
        """Index of the phase in which `matrix` is stepped."""
        return self._phase_of.get(matrix.buffer, 0)

    def relayed(self, i: int) -> bool:
        """Whether the update of matrix `i` goes from its owner to the owner's own domain alone, and from each rank of
        that along its column: every domain holds a copy, and along each column the same part of it."""
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
