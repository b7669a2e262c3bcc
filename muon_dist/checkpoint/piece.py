"""Pieces: the parts of the training state that a rank holds, as blocks of logical tensors.

An adapter lists the pieces of its framework. A save reads these pieces, and a load writes them. A checkpoint is the
union of the pieces of all ranks, so it can be loaded under any other layout and world size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from muon_dist.errors import CheckpointError
from muon_dist.layout.block import Block, view

WEIGHT = "weight"
"""Kind of a parameter's value: its fp32 master if the framework has one."""
BUFFER = "buffer"
"""Kind of a module's persistent buffer."""
MOMENTUM = "momentum"
"""Kind of Muon's momentum. Other state has torch's names: exp_avg, exp_avg_sq, step."""
OPTIONAL = frozenset({"zero_gradient_steps", "rounding_steps"})
"""Kinds that a checkpoint may lack; the loaded state is then zero."""


# Parts that torch adds to the names in a wrapped module.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def clean_name(name: str) -> str:
    """A parameter's name in the bare model, without the parts added by wrappers (DDP, torch.compile, FSDP2, ...)."""
    for inner in _WRAPPERS:
        name = name.replace(inner, "")
    return name.removeprefix("module.")


@dataclass(frozen=True, eq=False)
class Piece:
    """Elements of one logical tensor that this rank holds.

    Attributes:
        name: FQN of the parameter or buffer.
        kind: WEIGHT, BUFFER, MOMENTUM, or the optimizer's name for its state ("exp_avg", "exp_avg_sq", "step").
        shape: shape of the whole logical tensor; () for a number.
        block: the elements, in the flattened logical tensor.
        tensor: a live view of the elements: 1-D for a run, (rows, cols) for a block, with contiguous last axis.
        holders: ranks of the checkpoint's process group with this same piece; each writes an equal share. These ranks
            must list all pieces with equal holders in the same order. Empty: only this rank holds it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    block: Block
    tensor: torch.Tensor = field(repr=False)
    holders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wanted = (self.block.cols,) if self.block.rows == 1 else (self.block.rows, self.block.cols)
        if tuple(self.tensor.shape) != wanted:
            raise ValueError(f"{self.name} ({self.kind}): a view of {tuple(self.tensor.shape)} for {self.block}")
        if self.block.start < 0 or self.block.stop > math.prod(self.shape):
            raise ValueError(f"{self.name} ({self.kind}): {self.block} is outside of a tensor of {self.shape}")

    @property
    def offset(self) -> int:
        """Index of the first element in the flattened logical tensor."""
        return self.block.start

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def part(self, part: Block) -> torch.Tensor:
        """The live view of a part of this piece: (rows, cols) for a block, 1-D for a run."""
        row, column = self.block.place(part)
        if self.block.rows == 1:
            if part.rows == 1:
                return self.tensor[column : column + part.cols]
            at = self.tensor.storage_offset() + column
            return self.tensor.as_strided((part.rows, part.cols), (part.stride, 1), at)
        block = self.tensor[row : row + part.rows, column : column + part.cols]
        return block[0] if part.rows == 1 else block


def shaped(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """The live view of a block of a contiguous tensor, in the form of a `Piece`: 1-D for a run, else (rows, cols)."""
    part = view(tensor.detach(), block)
    return part[0] if block.rows == 1 else part


def whole(
    name: str, kind: str, shape: tuple[int, ...], tensor: torch.Tensor, holders: Sequence[int] = ()
) -> list[Piece]:
    """The piece of a tensor that this rank holds whole; [] if it has no elements."""
    return run(name, kind, shape, 0, tensor, holders)


def run(
    name: str, kind: str, shape: tuple[int, ...], offset: int, tensor: torch.Tensor, holders: Sequence[int] = ()
) -> list[Piece]:
    """The piece of a contiguous run, held in a contiguous `tensor`; [] if it has no elements."""
    flat = tensor.detach().view(-1)
    if flat.numel() == 0:
        return []
    return [Piece(name, kind, shape, Block.run(offset, flat.numel()), flat, tuple(holders))]


@dataclass
class Holding:
    """All tensors of a run that a rank holds.

    Attributes:
        layout: name for the manifest and messages ("replicated", "flat", "per_parameter", "dtensor").
        pieces: see `Piece`.
        finish: called on every rank after a load, to update tensors that are computed from the pieces, such as 16-bit
            copies of fp32 masters. May be a collective.
    """

    layout: str
    pieces: list[Piece]
    finish: Callable[[], None] = field(default=lambda: None)


def to_write(pieces: Iterable[Piece], rank: int) -> list[Piece]:
    """The pieces that `rank` writes: those that only it holds, and an equal share of those with several holders.

    Pieces with equal holders are put end to end and divided into equal parts, one per holder. Only runs are divided.
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
        part = -(-sum(p.block.numel for p in members) // len(holders))
        first = holders.index(rank) * part
        at = 0
        for piece in members:
            n = piece.block.numel
            start, stop = max(first - at, 0), min(first + part - at, n)
            if piece.block.rows > 1:  # not divided: goes to the holder in whose part it begins
                start, stop = (0, n) if first <= at < first + part else (0, 0)
            if start < stop:
                chosen.append(piece if stop - start == n else _cut(piece, start, stop))
            at += n
    return chosen


def _cut(piece: Piece, start: int, stop: int) -> Piece:
    block = Block.run(piece.offset + start, stop - start)
    return Piece(piece.name, piece.kind, piece.shape, block, piece.tensor[start:stop])
