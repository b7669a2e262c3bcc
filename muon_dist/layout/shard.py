"""The part of a parameter in one local tensor, before a framework shards this tensor again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muon_dist.errors import LayoutError
from muon_dist.layout.block import Block
from muon_dist.layout.cuts import Interval, blocks_of
from muon_dist.layout.fragments import Fragment, Fragments


@dataclass(frozen=True)
class Shard:
    """Blocks of a parameter in a contiguous local tensor.

    Attributes:
        shape: shape of the whole parameter.
        blocks: pairs of a block in the flattened parameter and its block in the flattened local tensor, with equal
            rows and columns.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[Block, Block], ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """The shard whose local tensor is the whole parameter."""
        run = Block.run(0, math.prod(shape))
        return cls(tuple(shape), ((run, run),))

    @classmethod
    def cut(cls, shape: Sequence[int], axis: int, widths: Sequence[Sequence[int]], part: int) -> Shard:
        """Part number `part` of a parameter that is sharded along `axis`.

        Args:
            widths: for each sub-parameter along the axis (query, key and value of a fused weight), the length of every
                part. The local tensor has its part of each sub-parameter, one after another.

        Raises:
            LayoutError: the widths do not add up to the axis.
        """
        held: list[Interval] = []
        first = position = 0
        for of_sub in widths:
            if of_sub[part]:
                held.append((first + sum(of_sub[:part]), of_sub[part], position))
            first, position = first + sum(of_sub), position + of_sub[part]
        if first != shape[axis]:
            raise LayoutError(f"the widths {widths} do not add up to axis {axis} of the shape {tuple(shape)}")
        intervals = [held if i == axis else [(0, n, 0)] for i, n in enumerate(shape)]
        return cls(tuple(shape), tuple(blocks_of(tuple(shape), intervals)))

    @property
    def numel(self) -> int:
        """Elements of the local tensor."""
        return sum(whole.numel for whole, _ in self.blocks)

    def run(self, start: int, length: int) -> Iterator[tuple[Block, Block]]:
        """The `blocks` inside the run `[start, start + length)` of the flattened local tensor.

        Local positions count from `start`. A block may become up to three: a part of a row, whole rows, a part of a
        row.
        """
        for whole, local in self.blocks:
            for part in local.part_of_run(start, start + length):
                row, column = local.place(part)
                position = part.start - start
                if part.rows > 1:  # rows of several blocks are interleaved
                    first = whole.start + row * whole.stride + column
                    yield (
                        Block(first, part.rows, part.cols, whole.stride),
                        Block(position, part.rows, part.cols, part.stride),
                    )
                    continue
                for block in whole.inside(Block.run(row * local.cols + column, part.cols)):
                    yield block, Block(position, block.rows, block.cols, block.cols)
                    position += block.numel

    def fragments(self, rank: int, runs: Fragments) -> Fragments:
        """The fragments of the parameter on `rank`. runs: runs of the flattened local tensor that the rank holds."""
        return Fragments.of(
            Fragment(rank, block, f.buffer, place.moved(f.local.start))
            for f in runs
            for block, place in self.run(f.block.start, f.length)
        )
