"""What a rank holds of the state of training, as places in whole, logical tensors.

An adapter lists the pieces of its framework; the same list is read for a save and written to by a load. A checkpoint
is the union of the pieces of all ranks, so one that was saved under any layout and world size loads under any other.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from muon_dist.errors import CheckpointError

WEIGHT = "weight"
"""Kind of a parameter's value: the fp32 master where a framework keeps one."""
BUFFER = "buffer"
"""Kind of a module's persistent buffer."""
MOMENTUM = "momentum"
"""Kind of Muon's momentum. Other state keeps torch's own names: exp_avg, exp_avg_sq, step."""


# what torch puts into the names of a module that it wraps
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def clean_name(name: str) -> str:
    """A parameter's name as the bare model has it, whatever wraps the model (DDP, torch.compile, DeepSpeed, FSDP2)."""
    for inner in _WRAPPERS:
        name = name.replace(inner, "")
    return name.removeprefix("module.")


@dataclass(frozen=True, slots=True)
class Extent:
    """A block of a flattened logical tensor: element (i, j) stands at `offset + i * stride + j`.

    A contiguous run has one row. Every part of a parameter that a framework holds is of this form: slices of ZeRO
    and rows of FSDP2 are runs, a third of GPT-2's fused `c_attn` is a block of columns.
    """

    offset: int
    rows: int
    cols: int
    stride: int

    @classmethod
    def run(cls, offset: int, length: int) -> Extent:
        """The contiguous run `[offset, offset + length)`."""
        return cls(offset, 1, length, length)

    @classmethod
    def block(cls, offset: int, rows: int, cols: int, stride: int) -> Extent:
        """A block; a run where its rows follow each other without a gap."""
        if rows == 1 or cols == stride:
            return cls.run(offset, rows * cols)
        return cls(offset, rows, cols, stride)

    @property
    def numel(self) -> int:
        return self.rows * self.cols

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.offset + (self.rows - 1) * self.stride + self.cols

    def part_of_run(self, first: int, stop: int) -> list[Extent]:
        """What of this block lies in the run `[first, stop)`: at most a part of a row, whole rows, a part of a row."""
        first, stop = max(first, self.offset), min(stop, self.stop)
        if first >= stop:
            return []
        if self.rows == 1:
            return [Extent.run(first, stop - first)]
        top, left = divmod(first - self.offset, self.stride)
        bottom, right = divmod(stop - self.offset, self.stride)
        left, right = min(left, self.cols), min(right, self.cols)

        def row(number: int, start: int, end: int) -> list[Extent]:
            return [Extent.run(self.offset + number * self.stride + start, end - start)] if end > start else []

        if top == bottom:
            return row(top, left, right)
        whole = top + (left > 0)
        found = row(top, left, self.cols) if left > 0 else []
        if bottom > whole:
            found.append(Extent.block(self.offset + whole * self.stride, bottom - whole, self.cols, self.stride))
        return found + (row(bottom, 0, right) if bottom < self.rows else [])

    def common(self, other: Extent) -> list[Extent]:
        """The elements of both, as blocks that do not overlap."""
        if other.rows == 1:
            return self.part_of_run(other.offset, other.stop)
        if self.rows == 1:
            return other.part_of_run(self.offset, self.stop)
        if self.stride != other.stride:  # the same tensor cut along different axes: row by row
            rows = (Extent.run(other.offset + i * other.stride, other.cols) for i in range(other.rows))
            return [part for row in rows for part in self.common(row)]
        (top, left), (up, west) = divmod(self.offset, self.stride), divmod(other.offset, self.stride)
        if left + self.cols > self.stride or west + other.cols > self.stride:
            raise ValueError("a block runs over the end of its rows")
        first, last = max(top, up), min(top + self.rows, up + other.rows)
        start, end = max(left, west), min(left + self.cols, west + other.cols)
        if first >= last or start >= end:
            return []
        return [Extent.block(first * self.stride + start, last - first, end - start, self.stride)]

    def place(self, part: Extent) -> tuple[int, int]:
        """(row, column) in this block of the first element of `part`, which lies inside it."""
        return divmod(part.offset - self.offset, self.stride) if self.rows > 1 else (0, part.offset - self.offset)


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements of one logical tensor that this rank holds.

    Attributes:
        name: FQN of the parameter or buffer.
        kind: WEIGHT, BUFFER, MOMENTUM, or the optimizer's own name ("exp_avg", "exp_avg_sq", "step").
        shape: of the whole logical tensor; () for a number.
        extent: which elements of it, flattened.
        tensor: a live view of them: 1-D for a run, (rows, cols) for a block, its last axis contiguous.
        holders: ranks of the checkpoint's process group that list this very piece, in the same order among the pieces
            with the same holders; each of them writes an equal share. Empty: this rank alone holds it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    extent: Extent
    tensor: torch.Tensor = field(repr=False)
    holders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wanted = (self.extent.cols,) if self.extent.rows == 1 else (self.extent.rows, self.extent.cols)
        if tuple(self.tensor.shape) != wanted:
            raise ValueError(f"{self.name} ({self.kind}): a view of {tuple(self.tensor.shape)} for {self.extent}")
        if self.extent.offset < 0 or self.extent.stop > math.prod(self.shape):
            raise ValueError(f"{self.name} ({self.kind}): {self.extent} lies outside of a tensor of {self.shape}")

    @property
    def offset(self) -> int:
        """Of the first element in the flattened logical tensor."""
        return self.extent.offset

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def part(self, part: Extent) -> torch.Tensor:
        """The live view of a part of this piece: (rows, cols) for a block, 1-D for a run."""
        row, column = self.extent.place(part)
        if self.extent.rows == 1:
            if part.rows == 1:
                return self.tensor[column : column + part.cols]
            at = self.tensor.storage_offset() + column
            return self.tensor.as_strided((part.rows, part.cols), (part.stride, 1), at)
        block = self.tensor[row : row + part.rows, column : column + part.cols]
        return block[0] if part.rows == 1 else block


def whole(
    name: str, kind: str, shape: tuple[int, ...], tensor: torch.Tensor, holders: Sequence[int] = ()
) -> list[Piece]:
    """The piece of a tensor that lies whole on this rank; none when it has no elements."""
    return run(name, kind, shape, 0, tensor, holders)


def run(
    name: str, kind: str, shape: tuple[int, ...], offset: int, tensor: torch.Tensor, holders: Sequence[int] = ()
) -> list[Piece]:
    """The piece of a contiguous run, held in a contiguous `tensor`; none when it has no elements."""
    flat = tensor.detach().view(-1)
    if flat.numel() == 0:
        return []
    return [Piece(name, kind, shape, Extent.run(offset, flat.numel()), flat, tuple(holders))]


@dataclass
class Holding:
    """Everything that a rank holds of a run's tensors.

    Attributes:
        layout: a word for the manifest and messages ("replicated", "flat", "per_parameter", "dtensor").
        pieces: see `Piece`.
        finish: called on every rank after a load, to bring up to date what is computed from the pieces, such as the
            16-bit copies of fp32 masters. May be a collective.
    """

    layout: str
    pieces: list[Piece]
    finish: Callable[[], None] = field(default=lambda: None)


def to_write(pieces: Iterable[Piece], rank: int) -> list[Piece]:
    """The pieces that `rank` writes: its own, and of each that others hold as well an equal share.

    The pieces with the same holders are laid end to end and cut into as many equal parts as there are holders; only
    runs are cut.
    """
    chosen: list[Piece] = []
    shared: dict[tuple[int, ...], list[Piece]] = defaultdict(list)
    for piece in pieces:
        if len(piece.holders) < 2:
            chosen.append(piece)
        elif rank not in piece.holders:
            raise CheckpointError(f"{piece.name} ({piece.kind}): rank {rank} is not one of its holders")
        else:
            shared[piece.holders].append(piece)
    for holders, members in sorted(shared.items()):
        part = -(-sum(p.extent.numel for p in members) // len(holders))
        first = holders.index(rank) * part
        at = 0
        for piece in members:
            n = piece.extent.numel
            start, stop = max(first - at, 0), min(first + part - at, n)
            if piece.extent.rows > 1:  # not cut: whole to the one in whose part it begins
                start, stop = (0, n) if first <= at < first + part else (0, 0)
            if start < stop:
                chosen.append(piece if stop - start == n else _cut(piece, start, stop))
            at += n
    return chosen


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    extent = Extent.run(piece.offset + start, stop - start)
    return Piece(piece.name, piece.kind, piece.shape, extent, piece.tensor[start:stop])
