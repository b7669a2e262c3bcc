"""Where the pieces of every matrix live, as frozen data that checks itself.

A parameter is cut into matrices (one per weight, head or expert); a rank holds fragments of matrices inside local
tensors called buffers. Everything that differs between DDP, ZeRO and FSDP2 is in this data; no code asks which
framework produced it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from muon_dist.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Matrix:
    """The logical 2-D object that is orthogonalized: a block of a parameter flattened row by row.

    Element (i, j) stands at `start + i * stride + j` of the flattened parameter. `stride == cols` when the block
    spans whole rows, as weights, experts and heads cut along the rows do.

    Attributes:
        name: FQN of the parameter, with `[i]` behind it when the parameter is cut into several matrices.
        rows, cols: the shape as stored.
        start, stride: the place in the flattened parameter, in elements.
        transposed: stored as (in, out), like GPT-2's Conv1D; matters to the scale of the update only.
    """

    name: str
    rows: int
    cols: int
    start: int
    stride: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def parameter(self) -> str:
        """FQN of the parameter that this matrix is cut from."""
        return self.name.partition("[")[0]

    @property
    def fan(self) -> tuple[int, int]:
        """(output features, input features)."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


@dataclass(frozen=True, slots=True)
class Span:
    """A `rows x cols` block at `position` of a buffer, `stride` apart, that holds `rows * cols` consecutive elements
    of the flattened matrix from `offset` on."""

    offset: int
    position: int
    rows: int
    cols: int
    stride: int


@dataclass(frozen=True, slots=True)
class Fragment:
    """A run of the flattened matrix that one rank holds.

    Attributes:
        rank: who holds it.
        offset, length: the run, in elements of the flattened matrix.
        buffer: index of the rank's local tensor that contains it; the numbering is the same on all ranks.
        origin: position in that buffer of element 0 of the flattened *parameter*; negative where the rank holds only
            a later part of the parameter.
    """

    rank: int
    offset: int
    length: int
    buffer: int
    origin: int

    @property
    def stop(self) -> int:
        return self.offset + self.length

    def spans(self, matrix: Matrix) -> list[Span]:
        """The places in the buffer that hold this fragment, in the order of the flattened matrix."""
        first = self.origin + matrix.start
        if matrix.stride == matrix.cols:
            return [Span(self.offset, first + self.offset, 1, self.length, self.length)]
        spans = []
        at = self.offset
        while at < self.stop:
            row, column = divmod(at, matrix.cols)
            whole_rows = (self.stop - at) // matrix.cols if column == 0 else 0
            rows = max(whole_rows, 1)
            cols = matrix.cols if whole_rows else min(matrix.cols - column, self.stop - at)
            spans.append(Span(at, first + row * matrix.stride + column, rows, cols, matrix.stride))
            at += rows * cols
        return spans


@dataclass(frozen=True, slots=True)
class MatrixLayout:
    """One matrix and every fragment of it, on all ranks; copies are allowed, gaps are not.

    Raises LayoutError when the fragments leave a gap, run past the end, or overlap on one rank.
    """

    matrix: Matrix
    fragments: tuple[Fragment, ...]

    def __post_init__(self) -> None:
        covered = 0
        last: dict[int, int] = {}
        for f in sorted(self.fragments, key=lambda f: (f.offset, f.rank)):
            if f.length <= 0 or f.offset < 0 or f.stop > self.matrix.numel:
                raise LayoutError(
                    f"{self.matrix.name}: rank {f.rank} claims elements {f.offset}..{f.stop} of a matrix of "
                    f"{self.matrix.numel}"
                )
            if f.offset < last.get(f.rank, 0):
                raise LayoutError(f"{self.matrix.name}: rank {f.rank} holds element {f.offset} twice")
            last[f.rank] = f.stop
            if f.offset > covered:
                raise LayoutError(f"{self.matrix.name}: no rank holds elements {covered}..{f.offset}")
            covered = max(covered, f.stop)
        if covered != self.matrix.numel:
            raise LayoutError(f"{self.matrix.name}: no rank holds elements {covered}..{self.matrix.numel}")

    @property
    def buffer(self) -> int:
        """The buffer that holds this matrix; the same on every rank that holds a part."""
        return self.fragments[0].buffer

    def on(self, rank: int) -> tuple[Fragment, ...]:
        """The fragments on `rank`."""
        return tuple(f for f in self.fragments if f.rank == rank)

    def held(self, rank: int) -> int:
        """Elements of the matrix that `rank` holds."""
        return sum(f.length for f in self.fragments if f.rank == rank)

    def sources(self, owner: int) -> tuple[Fragment, ...]:
        """A cover of the matrix without overlap, the owner's own fragments first; momentum lives on these.

        A source may be a part of a fragment where copies overlap. Deterministic: every rank computes the same.
        """
        own = sorted(self.on(owner), key=lambda f: f.offset)
        others = sorted((f for f in self.fragments if f.rank != owner), key=lambda f: (f.offset, -f.length, f.rank))
        cover = list(own)
        at = 0
        for f in (*own, None):
            stop = f.offset if f is not None else self.matrix.numel
            while at < stop:
                # Of the fragments that hold element `at`, the one that reaches furthest; lowest rank on a tie.
                best = max((o for o in others if o.offset <= at < o.stop), key=lambda o: (o.stop, -o.rank))
                reach = min(best.stop, stop)
                cover.append(Fragment(best.rank, at, reach - at, best.buffer, best.origin))
                at = reach
            if f is not None:
                at = f.stop
        return tuple(sorted(cover, key=lambda f: f.offset))


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
    """

    kind: str
    world_size: int
    matrices: tuple[MatrixLayout, ...]
    phases: tuple[tuple[int, ...], ...] = ()
    complete_gradients: bool = False
    _phase_of: dict[int, int] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        names = [m.matrix.name for m in self.matrices]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise LayoutError(f"{twice} stands in the layout twice")
        for m in self.matrices:
            wrong = next((f for f in m.fragments if not 0 <= f.rank < self.world_size), None)
            if wrong is not None:
                raise LayoutError(f"{m.matrix.name}: rank {wrong.rank} of a world of {self.world_size}")
            if any(f.buffer != m.buffer for f in m.fragments):
                raise LayoutError(f"{m.matrix.name}: its fragments lie in different buffers")
        self._phase_of.update({buffer: i for i, phase in enumerate(self.phases) for buffer in phase})

    def phase(self, matrix: MatrixLayout) -> int:
        """Index of the phase in which `matrix` is stepped."""
        return self._phase_of.get(matrix.buffer, 0)

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
        for m in self.matrices:
            x = m.matrix
            yield f"{x.name}: shape", (x.rows, x.cols)
            yield f"{x.name}: place in the parameter", (x.start, x.stride, x.transposed)
            yield f"{x.name}: fragments", tuple((f.rank, f.offset, f.length, f.buffer, f.origin) for f in m.fragments)


def cut_parameter(
    name: str,
    shape: Sequence[int],
    *,
    heads: int | None = None,
    sizes: Sequence[int] | None = None,
    transposed: bool = False,
) -> tuple[Matrix, ...]:
    """The matrices of one parameter.

    Args:
        name: FQN.
        shape: (M, N); (E, M, N) is a batch of E matrices; more axes are flattened to (M, -1), as for convolutions.
        heads: cut the output axis into this many equal blocks.
        sizes: or into blocks of these sizes, as for fused QKV.
        transposed: stored (in, out), so that the output axis is the columns.

    Raises:
        LayoutError: fewer than two axes, or a cut that does not fit the output axis.
    """
    if len(shape) < 2:
        raise LayoutError(f"{name} has shape {tuple(shape)}: only matrices can be orthogonalized; send it to adamw")
    batch, m, n = 1, int(shape[0]), 1
    if len(shape) == 3:
        batch, m, n = (int(s) for s in shape)
    else:
        for s in shape[1:]:
            n *= int(s)
    out = n if transposed else m
    if heads is not None:
        if heads < 1 or out % heads:
            raise LayoutError(f"{name}: {heads} heads do not divide its output axis of {out}")
        sizes = [out // heads] * heads
    blocks = [int(s) for s in sizes] if sizes is not None else [out]
    if sum(blocks) != out or min(blocks) < 1:
        raise LayoutError(f"{name}: the split {blocks} does not add up to its output axis of {out}")
    matrices: list[Matrix] = []
    single = batch == 1 and len(blocks) == 1
    for b in range(batch):
        at = 0
        for block in blocks:
            rows, cols = (m, block) if transposed else (block, n)
            start = b * m * n + (at if transposed else at * n)
            label = name if single else f"{name}[{len(matrices)}]"
            matrices.append(Matrix(label, rows, cols, start, n, transposed))
            at += block
    return tuple(matrices)


def fragments_of_run(matrix: Matrix, rank: int, start: int, length: int, buffer: int, position: int) -> list[Fragment]:
    """The fragment (one or none) of `matrix` within the run `[start, start + length)` of the flattened parameter that
    `rank` holds at `position` of `buffer`.

    Row-major order makes the intersection of a run of the parameter with a block a run of the block.
    """

    def elements_before(at: int) -> int:
        row, column = divmod(at - matrix.start, matrix.stride)
        return min(max(row * matrix.cols + min(max(column, 0), matrix.cols), 0), matrix.numel)

    first, last = elements_before(start), elements_before(start + length)
    return [Fragment(rank, first, last - first, buffer, position - start)] if last > first else []
