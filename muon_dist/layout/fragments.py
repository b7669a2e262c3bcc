"""All fragments of one matrix, as arrays: thousands of ranks hold a part of each of thousands of matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from muon_dist.layout.matrix import Fragment, Matrix

_SHOWN = 4
_COPIED = 64  # a constant is one number in memory beyond so many; before, copies are quicker than a broadcast


class Fragments(Sequence[Fragment]):
    """A sequence of `Fragment`, kept as five arrays of equal length with its fields; they may share memory.

    Made of the array `rank`, and for each other field an array of that length or one number.

    Attributes:
        rank, offset, length, buffer, origin: int64 arrays; read only.
    """

    __slots__ = ("buffer", "length", "offset", "origin", "rank")

    def __init__(self, rank: Any, offset: Any, length: Any, buffer: Any, origin: Any) -> None:
        length_of = len(rank)

        def column(values: Any) -> np.ndarray:
            array = np.asarray(values, dtype=np.int64)
            if array.ndim == 1:
                return array
            return np.full(length_of, array) if length_of <= _COPIED else np.broadcast_to(array, (length_of,))

        self.rank, self.offset, self.length, self.buffer, self.origin = map(
            column, (rank, offset, length, buffer, origin)
        )

    @classmethod
    def of(cls, fragments: Iterable[Fragment]) -> Fragments:
        """The same fragments as arrays."""
        if isinstance(fragments, Fragments):
            return fragments
        rows = [(f.rank, f.offset, f.length, f.buffer, f.origin) for f in fragments]
        return cls(*np.array(rows, dtype=np.int64).reshape(-1, 5).T)

    @property
    def stop(self) -> np.ndarray:
        return self.offset + self.length

    def chosen(self, index: Any) -> Fragments:
        """Those that a mask or an array of positions names."""
        return Fragments(*(column[index] for column in self._columns()))

    def on(self, rank: int) -> Fragments:
        """Those that `rank` holds."""
        return self.chosen(self.rank == rank)

    def tiles(self, numel: int) -> bool:
        """Whether they cover a matrix of `numel` elements on distinct ranks, one after another or each all of it.

        A cover of another kind is not recognized.
        """
        if len(self) == 1:
            return bool(self.offset[0] == 0 and self.length[0] == numel > 0)
        if not len(self):
            return False
        distinct = (self.rank[1:] > self.rank[:-1]).all() or (self.rank[1:] < self.rank[:-1]).all()
        if self.length.strides == (0,) and self.length[0] == numel:
            return bool(distinct and not self.offset.any())
        ends_meet = self.offset[0] == 0 and self.stop[-1] == numel and (self.offset[1:] == self.stop[:-1]).all()
        return bool(distinct and ends_meet and (self.length > 0).all())

    def _columns(self) -> tuple[np.ndarray, ...]:
        return self.rank, self.offset, self.length, self.buffer, self.origin

    def __len__(self) -> int:
        return len(self.rank)

    @overload
    def __getitem__(self, index: int) -> Fragment: ...
    @overload
    def __getitem__(self, index: slice) -> Fragments: ...
    def __getitem__(self, index: int | slice) -> Fragment | Fragments:
        if isinstance(index, slice):
            return self.chosen(index)
        return Fragment(*(int(column[index]) for column in self._columns()))

    def __iter__(self) -> Iterator[Fragment]:
        return map(Fragment, *(column.tolist() for column in self._columns()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fragments):
            return NotImplemented
        return len(self) == len(other) and all(
            np.array_equal(a, b) for a, b in zip(self._columns(), other._columns(), strict=True)
        )

    def __hash__(self) -> int:
        return hash(tuple(column.tobytes() for column in self._columns()))

    def __repr__(self) -> str:
        """The first few, and a digest of all: what ranks compare."""
        shown = ", ".join(str((f.rank, f.offset, f.length, f.buffer, f.origin)) for f in self[:_SHOWN])
        if len(self) <= _SHOWN:
            return f"({shown})"
        state = hashlib.sha256()
        for column in self._columns():
            state.update(column.tobytes())
        return f"({shown}, ... {len(self)} in all, sha256 {state.hexdigest()[:16]})"


def slices_of(
    matrix: Matrix, size: int, holders: np.ndarray, *, buffer: int, begin: int = 0, shift: int = 0
) -> Fragments:
    """The fragments of `matrix` where flat storage is cut every `size` elements and each slice lies on some ranks.

    Args:
        matrix: a block of a parameter.
        size: of a slice, in elements.
        holders: (slices, copies), the ranks that hold slice i.
        buffer: index of the local tensor.
        begin: where the parameter begins in the flat storage.
        shift: slice i holds element 0 of the parameter at `shift - i * size` of its buffer.
    """
    first_element = begin + matrix.start
    last_element = first_element + (matrix.rows - 1) * matrix.stride + matrix.cols - 1
    first, last = first_element // size, last_element // size
    copies = holders.shape[1]
    if first == last:
        return Fragments(holders[first], 0, matrix.numel, buffer, shift - first * size)
    # Boundaries of the slices, as counts of the matrix's elements before them.
    at = np.arange(first, last + 2) * size - begin - matrix.start
    row, column = np.divmod(at, matrix.stride)
    before = (row * matrix.cols + column.clip(0, matrix.cols)).clip(0, matrix.numel)
    length = np.diff(before)
    index = np.flatnonzero(length)
    return Fragments(
        holders[first + index].reshape(-1),
        np.repeat(before[index], copies),
        np.repeat(length[index], copies),
        buffer,
        np.repeat(shift - (first + index) * size, copies),
    )
