"""The matrices that a parameter is cut into, and the runs of them that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
