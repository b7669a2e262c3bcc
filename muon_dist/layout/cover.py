"""Check that fragments cover a matrix: no gap, no element outside, no element twice on one rank."""

from __future__ import annotations

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.matrix import Matrix


def check_cover(f: Fragments, matrix: Matrix) -> None:
    """Raise LayoutError, naming matrix, rank and elements, unless the fragments `f` cover `matrix`."""
    outside = np.flatnonzero((f.length <= 0) | (f.start < 0) | (f.stop > matrix.numel))
    if len(outside):
        i = int(outside[0])
        raise LayoutError(
            f"{matrix.name}: rank {f.rank[i]} claims elements {f.start[i]}..{f.stop[i]} of a matrix of {matrix.numel}"
        )
    if f.contiguous.all():
        _check_runs(f, matrix)
    else:
        _check_blocks(f, matrix)


def _check_runs(f: Fragments, matrix: Matrix) -> None:
    name, stop = matrix.name, f.start + f.length
    by_rank = np.lexsort((f.start, f.rank))
    ranks, starts, stops = f.rank[by_rank], f.start[by_rank], stop[by_rank]
    twice = np.flatnonzero((ranks[1:] == ranks[:-1]) & (starts[1:] < stops[:-1])) + 1
    if len(twice):
        raise LayoutError(f"{name}: rank {ranks[twice[0]]} holds element {starts[twice[0]]} twice")
    by_start = np.argsort(f.start, kind="stable")
    begins = np.append(f.start[by_start], matrix.numel)
    covered = np.maximum.accumulate(np.append(0, stop[by_start]))
    gap = np.flatnonzero(begins > covered)
    if len(gap):
        raise LayoutError(f"{name}: no rank holds elements {covered[gap[0]]}..{begins[gap[0]]}")


def _check_blocks(f: Fragments, matrix: Matrix) -> None:
    """Check blocks on the grid of all their row and column borders: count the fragments per cell and per rank."""
    if not ((f.stride == matrix.cols) | (f.rows == 1)).all():
        raise LayoutError(f"{matrix.name}: the row stride of a fragment is not the matrix's {matrix.cols} columns")
    found: set[tuple[int, ...]] = set()
    for row in zip(f.rank.tolist(), f.start.tolist(), f.rows.tolist(), f.cols.tolist(), strict=True):
        found.update(_boxes(*row, width=matrix.cols))
    boxes = np.array(sorted(found))
    rank, top, bottom, left, right = boxes.T
    rows, cols = np.unique([*top, *bottom, 0, matrix.rows]), np.unique([*left, *right, 0, matrix.cols])
    covered = np.zeros((len(rows) - 1, len(cols) - 1), dtype=bool)
    for own in np.unique(rank):
        held = np.zeros(covered.shape, dtype=np.int64)
        for i in np.flatnonzero(rank == own):
            held[np.searchsorted(rows, top[i]) : np.searchsorted(rows, bottom[i]),
                 np.searchsorted(cols, left[i]) : np.searchsorted(cols, right[i])] += 1  # fmt: skip
        if (held > 1).any():
            r, c = (int(x[0]) for x in np.nonzero(held > 1))
            raise LayoutError(f"{matrix.name}: rank {own} holds element {rows[r] * matrix.cols + cols[c]} twice")
        covered |= held > 0
    if not covered.all():
        r, c = (int(x[0]) for x in np.nonzero(~covered))
        raise LayoutError(f"{matrix.name}: no rank holds element {rows[r] * matrix.cols + cols[c]}")


def _boxes(rank: int, start: int, rows: int, cols: int, width: int) -> list[tuple[int, int, int, int, int]]:
    """(rank, top, bottom, left, right) of a fragment's rectangles: one for a block, up to three for a run."""
    top, left = divmod(start, width)
    if rows > 1 or left + cols <= width:
        return [(rank, top, top + rows, left, left + cols)]
    bottom, right = divmod(start + cols, width)
    found = [(rank, top, top + 1, left, width)] if left else []
    first = top + (left > 0)
    if bottom > first:
        found.append((rank, first, bottom, 0, width))
    return found + ([(rank, bottom, bottom + 1, 0, right)] if right else [])
