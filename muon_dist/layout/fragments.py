"""Fragments: the parts of a matrix on each rank, as single objects, and as arrays for thousands of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from muon_dist.layout.block import Block
from muon_dist.layout.matrix import Matrix

_SHOWN = 4
_COPIED = 64  # a longer constant column is one broadcast number, to save memory; a short one is faster as an array


@dataclass(frozen=True, slots=True)
class Fragment:
    """A block of a tensor (a matrix, or a parameter before it is split into matrices) that one rank holds.

    Attributes:
        rank: the rank that holds it.
        block: its position in the flattened tensor.
        buffer: index of the rank's local tensor that contains it; the numbering is equal on all ranks.
        local: its position in the flattened local tensor; same rows and columns as `block`.
    """

    rank: int
    block: Block
    buffer: int
    local: Block

    @classmethod
    def run(cls, rank: int, start: int, length: int, buffer: int, position: int) -> Fragment:
        """The run `[start, start + length)` of the tensor, at `position` of the buffer."""
        return cls(rank, Block.run(start, length), buffer, Block.run(position, length))

    @property
    def length(self) -> int:
        """Elements."""
        return self.block.numel


class Fragments(Sequence[Fragment]):
    """A sequence of `Fragment`, stored as arrays of equal length that may share memory.

    Attributes (read-only int64 arrays, one entry per fragment):
        rank, buffer: as in `Fragment`.
        start, rows, cols, stride: the blocks in the tensor.
        local, step: first element and row stride of the blocks in their local tensors.
        length: number of elements.
    """

    __slots__ = ("buffer", "cols", "length", "local", "rank", "rows", "start", "step", "stride")

    def __init__(
        self, rank: Any, start: Any, rows: Any, cols: Any, stride: Any, buffer: Any, local: Any, step: Any
    ) -> None:
        """rank: an array. The others: an array of the same length, or one number for all fragments."""
        length_of = len(rank)

        def column(values: Any) -> np.ndarray:
            array = np.asarray(values, dtype=np.int64)
            if array.ndim == 1:
                return array
            return np.full(length_of, array) if length_of <= _COPIED else np.broadcast_to(array, (length_of,))

        self.rank, self.start, self.rows, self.cols, self.stride, self.buffer, self.local, self.step = map(
            column, (rank, start, rows, cols, stride, buffer, local, step)
        )
        self.length = self.cols if isinstance(rows, int) and rows == 1 else self.rows * self.cols

    @classmethod
    def runs(cls, rank: Any, start: Any, length: Any, buffer: Any, local: Any) -> Fragments:
        """Contiguous runs of the tensor that are contiguous in their local tensors too."""
        return cls(rank, start, 1, length, length, buffer, local, length)

    @classmethod
    def of(cls, fragments: Iterable[Fragment]) -> Fragments:
        """The same fragments as arrays."""
        if isinstance(fragments, Fragments):
            return fragments
        rows = [
            (
                f.rank,
                f.block.start,
                f.block.rows,
                f.block.cols,
                f.block.stride,
                f.buffer,
                f.local.start,
                f.local.stride,
            )
            for f in fragments
        ]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 8).T)

    @property
    def contiguous(self) -> np.ndarray:
        """Mask of the fragments that are runs of the tensor."""
        return (self.rows == 1) | (self.cols == self.stride)

    @property
    def all_runs(self) -> bool:
        """Whether every fragment is one row: a run of the tensor and of its local tensor."""
        return bool((self.rows == 1).all())

    @property
    def stop(self) -> np.ndarray:
        """One past the last element of each block in the tensor."""
        return self.start + (self.rows - 1) * self.stride + self.cols

    def chosen(self, index: Any) -> Fragments:
        """The fragments selected by a mask or an array of positions."""
        return Fragments(*(column[index] for column in self._columns()))

    def in_buffer(self, number: int) -> Fragments:
        """The same fragments with buffer number `number`."""
        rank, start, rows, cols, stride, _, local, step = self._columns()
        return Fragments(rank, start, rows, cols, stride, number, local, step)

    def on(self, rank: int) -> Fragments:
        """The fragments that `rank` holds."""
        return self.chosen(self.rank == rank)

    def tiles(self, numel: int) -> bool:
        """Whether the fragments obviously cover `numel` elements: consecutive runs on distinct ranks, or full copies.

        Returns False for any other cover.
        """
        if len(self) == 1:
            return bool(self.start[0] == 0 and self.length[0] == numel > 0)
        if not len(self) or not self.contiguous.all():
            return False
        distinct = (self.rank[1:] > self.rank[:-1]).all() or (self.rank[1:] < self.rank[:-1]).all()
        if self.length.strides == (0,) and self.length[0] == numel:
            return bool(distinct and not self.start.any())
        ends = self.start + self.length
        ends_meet = self.start[0] == 0 and ends[-1] == numel and (self.start[1:] == ends[:-1]).all()
        return bool(distinct and ends_meet and (self.length > 0).all())

    def within(self, part: Block) -> Fragments:
        """The fragments of `part`, a block of the same tensor; their blocks are positions in the flattened `part`.

        A run of the tensor is a run of a contiguous part. In a part with gaps between its rows it becomes up to three
        blocks: the end of a row, whole rows, the beginning of a row.
        """
        near = self.chosen((self.start < part.stop) & (self.stop > part.start))
        if part.rows == 1 or part.cols == part.stride:
            if near.all_runs:
                first = np.maximum(near.start, part.start)
                length = np.minimum(near.start + near.cols, part.stop) - first
                shift = first - near.start
                return Fragments.runs(near.rank, first - part.start, length, near.buffer, near.local + shift)
            if (near.stride == part.cols).all() and part.start % part.cols == 0:
                return near._rows_within(part)
        return Fragments.of(f for given in near for f in _within(given, part))

    def _rows_within(self, part: Block) -> Fragments:
        """`within` for blocks with the same row stride as `part`, which is contiguous."""
        top, left = np.divmod(self.start, part.cols)
        first_row = part.start // part.cols
        first = np.maximum(top, first_row)
        rows = np.minimum(top + self.rows, first_row + part.rows) - first
        inside = rows > 0
        start, local = (first - first_row) * part.cols + left, self.local + (first - top) * self.step
        columns = (self.rank, start, rows, self.cols, self.stride, self.buffer, local, self.step)
        return Fragments(*(column[inside] for column in columns)).merged()

    def merged(self) -> Fragments:
        """The same fragments; blocks that are contiguous in the tensor and in the local tensor become runs."""
        single = (self.rows == 1) | ((self.cols == self.stride) & (self.cols == self.step))
        length = self.rows * self.cols
        return Fragments(
            self.rank,
            self.start,
            np.where(single, 1, self.rows),
            np.where(single, length, self.cols),
            np.where(single, length, self.stride),
            self.buffer,
            self.local,
            np.where(single, length, self.step),
        )

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.rank, self.start, self.rows, self.cols, self.stride, self.buffer, self.local, self.step

    def __len__(self) -> int:
        return len(self.rank)

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> Fragments: ...
    def __getitem__(self, index: int | slice) -> Fragment | Fragments:
        if isinstance(index, slice):
            return self.chosen(index)
        return _fragment(*(int(column[index]) for column in self._columns()))

    def __iter__(self) -> Iterator[Fragment]:
        return map(_fragment, *(column.tolist() for column in self._columns()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fragments):
            return NotImplemented
        return len(self) == len(other) and all(
            np.array_equal(a, b) for a, b in zip(self._columns(), other._columns(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(tuple(column.tobytes() for column in self._columns()))

    def __repr__(self) -> str:
        """The first few fragments, and a digest of all, so that ranks can compare them."""
        columns = [column[:_SHOWN].tolist() for column in self._columns()]
        shown = ", ".join(str(row) for row in zip(*columns, strict=True))
        if len(self) <= _SHOWN:
            return f"({shown})"
        state = hashlib.sha256()
        for column in self._columns():
            state.update(column.tobytes())
        return f"({shown}, ... {len(self)} in total, sha256 {state.hexdigest()[:16]})"


def _fragment(
    rank: int, start: int, rows: int, cols: int, stride: int, buffer: int, local: int, step: int
) -> Fragment:
    return Fragment(rank, Block(start, rows, cols, stride), buffer, Block(local, rows, cols, step))


def _within(given: Fragment, part: Block) -> Iterator[Fragment]:
    """The elements of `part` inside the fragment `given`, in the order of `part`."""
    block, local = given.block, given.local
    contiguous = part.rows == 1 or part.cols == part.stride
    for shared in block.common(part):
        row, column = part.place(shared)
        start = shared.start - part.start if contiguous else row * part.cols + column
        row, column = block.place(shared)
        step = shared.stride if block.rows == 1 else local.stride
        stride = shared.stride if contiguous or shared.rows == 1 else part.cols
        rows, cols = shared.rows, shared.cols
        if rows > 1 and cols == stride == step:
            rows, cols, stride, step = 1, rows * cols, rows * cols, rows * cols
        elif rows == 1:
            stride = step = cols
        position = local.start + row * local.stride + column
        yield Fragment(given.rank, Block(start, rows, cols, stride), given.buffer, Block(position, rows, cols, step))


def fragments_of_run(matrix: Matrix, rank: int, start: int, length: int, buffer: int, position: int) -> list[Fragment]:
    """The fragments of `matrix` inside a run of the flattened parameter; for user-defined layouts.

    `rank` holds the run `[start, start + length)` at `position` of `buffer`.
    """
    if length <= 0:
        return []
    return list(Fragments.of([Fragment.run(rank, start, length, buffer, position)]).within(matrix.block))
