"""The one geometry of this package: a block of flat storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Block:
    """`rows x cols` elements of flat storage: element (i, j) stands at `start + i * stride + j`.

    A matrix is a block of its flattened parameter; what a rank holds of a matrix is a block of the flattened matrix
    and a block of a local tensor; a piece of a checkpoint is a block of a flattened logical tensor. A contiguous run
    has one row.
    """

    start: int
    rows: int
    cols: int
    stride: int

    @classmethod
    def run(cls, start: int, length: int) -> Block:
        """The contiguous run `[start, start + length)`."""
        return cls(start, 1, length, length)

    @classmethod
    def of(cls, start: int, rows: int, cols: int, stride: int) -> Block:
        """A block; a run where its rows follow each other without a gap."""
        if rows == 1 or cols == stride:
            return cls.run(start, rows * cols)
        return cls(start, rows, cols, stride)

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + (self.rows - 1) * self.stride + self.cols

    def moved(self, distance: int) -> Block:
        """The same block, `distance` elements further on."""
        return Block(self.start + distance, self.rows, self.cols, self.stride)

    def place(self, part: Block) -> tuple[int, int]:
        """(row, column) in this block of the first element of `part`, which lies inside it."""
        return divmod(part.start - self.start, self.stride) if self.rows > 1 else (0, part.start - self.start)

    def part_of_run(self, first: int, stop: int) -> list[Block]:
        """The elements of this block in `[first, stop)`: at most a part of a row, whole rows, and a part of a row."""
        first, stop = max(first, self.start), min(stop, self.stop)
        if first >= stop:
            return []
        if self.rows == 1:
            return [Block.run(first, stop - first)]
        top, left = divmod(first - self.start, self.stride)
        bottom, right = divmod(stop - self.start, self.stride)
        left, right = min(left, self.cols), min(right, self.cols)

        def row(number: int, begin: int, end: int) -> list[Block]:
            return [Block.run(self.start + number * self.stride + begin, end - begin)] if end > begin else []

        if top == bottom:
            return row(top, left, right)
        whole = top + (left > 0)
        found = row(top, left, self.cols) if left > 0 else []
        if bottom > whole:
            found.append(Block.of(self.start + whole * self.stride, bottom - whole, self.cols, self.stride))
        return found + (row(bottom, 0, right) if bottom < self.rows else [])

    def common(self, other: Block) -> list[Block]:
        """The elements of both, as blocks that do not overlap."""
        if other.rows == 1:
            return self.part_of_run(other.start, other.stop)
        if self.rows == 1:
            return other.part_of_run(self.start, self.stop)
        if self.stride != other.stride:  # the same tensor cut along different axes: row by row
            rows = (Block.run(other.start + i * other.stride, other.cols) for i in range(other.rows))
            return [part for row in rows for part in self.common(row)]
        (top, left), (up, west) = divmod(self.start, self.stride), divmod(other.start, self.stride)
        if left + self.cols > self.stride or west + other.cols > self.stride:
            raise ValueError("a block runs over the end of its rows")
        first, last = max(top, up), min(top + self.rows, up + other.rows)
        begin, end = max(left, west), min(left + self.cols, west + other.cols)
        if first >= last or begin >= end:
            return []
        return [Block.of(first * self.stride + begin, last - first, end - begin, self.stride)]

    def inside(self, part: Block) -> list[Block]:
        """The place in the storage of `part`, a block of this block's elements in row-major order.

        One block, unless `part` is a run that begins or ends inside a row of a block with gaps.
        """
        if self.rows == 1 or self.cols == self.stride:
            return [part.moved(self.start)]
        if part.rows > 1:
            row, column = divmod(part.start, self.cols)
            return [Block(self.start + row * self.stride + column, part.rows, part.cols, self.stride)]
        found = []
        at = part.start
        while at < part.stop:
            row, column = divmod(at, self.cols)
            rows = (part.stop - at) // self.cols if column == 0 else 0
            cols = self.cols if rows else min(self.cols - column, part.stop - at)
            found.append(Block.of(self.start + row * self.stride + column, max(rows, 1), cols, self.stride))
            at += max(rows, 1) * cols
        return found


def view(flat: torch.Tensor, block: Block) -> torch.Tensor:
    """The (rows, cols) view of `block` in `flat`, a contiguous tensor of any shape."""
    return flat.as_strided((block.rows, block.cols), (block.stride, 1), flat.storage_offset() + block.start)
