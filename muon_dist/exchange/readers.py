"""Views of the fragments in local tensors, with few operations per step, and the numbers of the fragments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch

from muon_dist.layout import Block, Fragment, Fragments, view

Part = tuple[int, Fragment]
"""The number of a matrix in the layout, and a fragment of it."""

Shape = tuple[int, ...]


def _is_all(block: Block, shape: Shape) -> bool:
    """Whether a block covers a tensor of `shape` in the same shape, so that the tensor itself is the view."""
    return block.numel == math.prod(shape) and (block.rows == 1 or shape == (block.rows, block.cols))


class Reader:
    """Returns views of the fragments in a local tensor, with as few operations as possible.

    A tensor that is one fragment is returned itself. Runs need one split. Blocks with gaps need one view each.

    Args:
        shape: shape of the local tensor.
        blocks: the fragments in the flattened tensor, in the order of the result.
        by_blocks: always make one view per block.

    Attributes:
        whole: whether the tensor is one fragment.
        shapes: shapes of the views.
    """

    def __init__(self, shape: Shape, blocks: Sequence[Block], *, by_blocks: bool = False) -> None:
        numel = math.prod(shape)
        self.shape = tuple(shape)
        self.blocks = tuple(blocks)
        self.shapes: list[Shape] = [(b.rows, b.cols) for b in blocks]
        self.whole = not by_blocks and len(blocks) == 1 and _is_all(blocks[0], self.shape)
        self._sizes: list[int] = []
        self._chosen: list[int] = []
        if self.whole:
            self.shapes = [self.shape]
        elif not by_blocks and self._in_order():
            self.shapes = [(b.numel,) for b in blocks]
            self._plan_split(numel)

    def _in_order(self) -> bool:
        runs = all(b.rows == 1 for b in self.blocks)
        return runs and all(a.stop <= b.start for a, b in zip(self.blocks, self.blocks[1:], strict=False))

    def _plan_split(self, numel: int) -> None:
        at = 0
        for b in self.blocks:
            if b.start > at:
                self._sizes.append(b.start - at)
            self._chosen.append(len(self._sizes))
            self._sizes.append(b.cols)
            at = b.stop
        if at < numel:
            self._sizes.append(numel - at)

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The fragments of `tensor` in the shapes `shapes`: live views if it is contiguous, else views of a copy."""
        if self.whole:
            return [tensor]
        if not self.blocks:
            return []
        if self._sizes:
            parts = tensor.reshape(-1).split_with_sizes(self._sizes)
            return [parts[i] for i in self._chosen]
        tensor = tensor.contiguous()
        return [view(tensor, b) for b in self.blocks]

    @cached_property
    def packed(self) -> Reader:
        """A reader of the same fragments laid end to end in a flat tensor, with views of the same shapes."""
        blocks, at = [], 0
        for b in self.blocks:
            blocks.append(Block(at, b.rows, b.cols, b.cols) if b.rows > 1 else Block.run(at, b.cols))
            at += b.numel
        by_blocks = not self.whole and not self._sizes
        return Reader((at,), blocks, by_blocks=by_blocks)


class Listing:
    """Fragments of this rank, listed buffer after buffer. Each has a number: its position in the list.

    Args:
        parts: (matrix, fragment) of each buffer, in any order.
        shapes: shape of the local tensor of each buffer.

    Attributes:
        parts: (matrix, fragment) of each buffer, in the order of the list.
        readers: the reader of each buffer.
        matrices: the matrix of each fragment.
        blocks: the block of each fragment in its matrix.
        shapes: the shape of each fragment's view.
    """

    def __init__(self, parts: Mapping[int, Sequence[Part]], shapes: Mapping[int, Shape]) -> None:
        self.parts = {b: sorted(of_buffer, key=lambda part: part[1].local.start) for b, of_buffer in parts.items()}
        self.readers = {b: Reader(shapes[b], [f.local for _, f in ordered]) for b, ordered in self.parts.items()}
        self.matrices = [i for ordered in self.parts.values() for i, _ in ordered]
        self.blocks = [f.block for ordered in self.parts.values() for _, f in ordered]
        self.shapes = [shape for reader in self.readers.values() for shape in reader.shapes]
        every = (part for ordered in self.parts.values() for part in ordered)
        self._number = {(i, f.block.start): n for n, (i, f) in enumerate(every)}

    def numbers(self, parts: Iterable[Part]) -> list[int]:
        """The numbers of some of the fragments."""
        return [self._number[i, f.block.start] for i, f in parts]


def parts_on(rank: int, matrices: Iterable[int], fragments: Sequence[Fragments]) -> list[Part]:
    """The fragments on `rank` of some matrices; `fragments` are those of all matrices."""
    return [(i, f) for i in matrices for f in fragments[i].on(rank)]
