"""`Block`: a rectangle of elements in flat storage. All layouts and checkpoints are described with blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Block:
    """`rows x cols` elements of flat storage: element (i, j) is at index `start + i * stride + j`.

    A matrix is a block of its flattened parameter. A fragment is a block of the flattened matrix, stored as a block of
    a local tensor. A piece of a checkpoint is a block of a flattened logical tensor. A contiguous run is a block with
    one row.
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
        """A block; if its rows follow each other without a gap, it is a run (one row)."""
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
        """The same block, shifted by `distance` elements."""
        return Block(self.start + distance, self.rows, self.cols, self.stride)

    def place(self, part: Block) -> tuple[int, int]:
        """(row, column) of the first element of `part` in this block, which contains it."""
        return divmod(part.start - self.start, self.stride) if self.rows > 1 else (0, part.start - self.start)

    def part_of_run(self, first: int, stop: int) -> list[Block]:
        """This block's elements in `[first, stop)`: up to three blocks (end of a row, whole rows, start of a row)."""
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
        """The elements that both blocks contain, as blocks without overlap."""
        if other.rows == 1:
            return self.part_of_run(other.start, other.stop)
        if self.rows == 1:
            return other.part_of_run(self.start, self.stop)
        if self.stride != other.stride:  # one tensor sharded along two axes: go row by row
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
        """The storage blocks of `part`. `part` is a block of this block's elements, numbered in row-major order.

        One block, or several if `part` is a run that begins or ends inside a row of a block with gaps.
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
