"""DDP and ZeRO-0: every rank holds every whole matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from muon_dist.layout.fragments import Fragments
from muon_dist.layout.layout import Layout, MatrixLayout
from muon_dist.layout.matrix import Matrix
from muon_dist.layout.parameter import StoredParameter


def whole_on_all(
    name: str, shape: tuple[int, ...], buffer: int, world_size: int, matrices: tuple[Matrix, ...] = ()
) -> StoredParameter:
    """A parameter that every one of `world_size` ranks holds whole, in its buffer number `buffer`."""
    return StoredParameter(
        name, shape, Fragments.runs(np.arange(world_size), 0, math.prod(shape), buffer, 0), matrices
    )


def copies_on_all(world_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`domains` and `columns` of a `Layout` in which every rank has a copy of the model."""
    return ((), ()) if world_size == 1 else (tuple(range(world_size)), (0,) * world_size)


def replicated_layout(buffers: Sequence[Sequence[Matrix]], world_size: int) -> Layout:
    """The layout in which every rank holds every parameter whole. Buffer i has the matrices `buffers[i]`."""
    ranks = np.arange(world_size)

    def fragments(m: Matrix, buffer: int) -> Fragments:
        block = m.block
        if block.rows == 1 or block.cols == block.stride:
            return Fragments.runs(ranks, 0, m.numel, buffer, block.start)
        return Fragments(ranks, 0, block.rows, block.cols, block.cols, buffer, block.start, block.stride)

    matrices = (MatrixLayout(m, fragments(m, buffer)) for buffer, cut in enumerate(buffers) for m in cut)
    domains, columns = copies_on_all(world_size)
    return Layout("replicated", world_size, tuple(matrices), domains=domains, columns=columns)
