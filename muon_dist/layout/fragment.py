"""Where the pieces of every matrix live, as frozen data that checks itself.

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
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.matrix import Fragment, Matrix, Span, cut_parameter

__all__ = ["Fragment", "Layout", "Matrix", "MatrixLayout", "Span", "cut_parameter", "fragments_of_run"]


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
            self._check()

    def _check(self) -> None:
        f = self.fragments
        name, numel = self.matrix.name, self.matrix.numel
        outside = np.flatnonzero((f.length <= 0) | (f.offset < 0) | (f.stop > numel))
        if len(outside):
            bad = f[int(outside[0])]
            raise LayoutError(
                f"{name}: rank {bad.rank} claims elements {bad.offset}..{bad.stop} of a matrix of {numel}"
            )
        by_rank = np.lexsort((f.offset, f.rank)) if len(f) > 1 else np.arange(len(f))
        ranks, offsets, stops = f.rank[by_rank], f.offset[by_rank], f.stop[by_rank]
        twice = np.flatnonzero((ranks[1:] == ranks[:-1]) & (offsets[1:] < stops[:-1])) + 1
        if len(twice):
            raise LayoutError(f"{name}: rank {ranks[twice[0]]} holds element {offsets[twice[0]]} twice")
        by_offset = np.argsort(f.offset, kind="stable") if len(f) > 1 else np.arange(len(f))
        begins = np.append(f.offset[by_offset], numel)
        covered = np.maximum.accumulate(np.append(0, f.stop[by_offset]))
        gap = np.flatnonzero(begins > covered)
        if len(gap):
            raise LayoutError(f"{name}: no rank holds elements {covered[gap[0]]}..{begins[gap[0]]}")

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
        """A cover of the matrix without overlap, the owner's own fragments first; momentum lives on these.

        Of copies, one on a rank of the owner's own domain is taken before others, then the one that reaches furthest,
        then the lowest rank. A source may be a part of a fragment where copies overlap. Deterministic: every rank
        computes the same.
        """
        own = self.on(owner)
        if int(own.length.sum()) == self.matrix.numel:
            return own.chosen(np.argsort(own.offset))
        domain = np.asarray(domains)
        own_copy = (
            self.fragments.chosen(domain[self.fragments.rank] == domain[owner]) if len(domain) else self.fragments
        )
        if int(own_copy.length.sum()) == self.matrix.numel:  # no copies, or none in the owner's domain
            return own_copy.chosen(np.argsort(own_copy.offset))
        near = set(own_copy.rank.tolist()) if len(domain) else set()
        others = [f for f in self.fragments if f.rank != owner]
        ordered = sorted(own, key=lambda f: f.offset)
        cover = list(ordered)
        at = 0
        for f in (*ordered, None):
            stop = f.offset if f is not None else self.matrix.numel
            while at < stop:
                holding = (o for o in others if o.offset <= at < o.stop)
                best = max(holding, key=lambda o: (o.rank in near, o.stop, -o.rank))
                reach = min(best.stop, stop)
                cover.append(Fragment(best.rank, at, reach - at, best.buffer, best.origin))
                at = reach
            if f is not None:
                at = f.stop
        return Fragments.of(sorted(cover, key=lambda f: f.offset))


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
            Of copies, those of the owner's own domain are its sources. Empty: all are alike.
        columns: for each rank a number that ranks share which can broadcast among each other and hold the same part of
            every copy: all under DDP, those of one shard under HSDP. See `relayed`. Empty: there are no copies.
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
            raise LayoutError(f"{twice} stands in the layout twice")
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
        order = np.lexsort((f.offset, column, domain))
        by_copy = np.stack([domain, column, f.offset, f.length])[:, order].reshape(4, copies, -1)
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
            x = m.matrix
            yield f"{x.name}: shape", (x.rows, x.cols)
            yield f"{x.name}: place in the parameter", (x.start, x.stride, x.transposed)
            yield f"{x.name}: fragments", m.fragments


def fragments_of_run(matrix: Matrix, rank: int, start: int, length: int, buffer: int, position: int) -> list[Fragment]:
    """The fragment (one or none) of `matrix` within the run `[start, start + length)` of the flattened parameter that
    `rank` holds at `position` of `buffer`.

    For a layout of one's own, whose slices are not equal as those of `fragments.slices_of` are.

    Row-major order makes the intersection of a run of the parameter with a block a run of the block.
    """

    def elements_before(at: int) -> int:
        row, column = divmod(at - matrix.start, matrix.stride)
        return min(max(row * matrix.cols + min(max(column, 0), matrix.cols), 0), matrix.numel)

    first, last = elements_before(start), elements_before(start + length)
    return [Fragment(rank, first, last - first, buffer, position - start)] if last > first else []
