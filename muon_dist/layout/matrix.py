"""The matrices into which a parameter is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.errors import LayoutError
from muon_dist.layout.block import Block


@dataclass(frozen=True, slots=True)
class Matrix:
    """The logical 2-D object that is orthogonalized: one per weight, head or expert.

    Attributes:
        name: FQN of the parameter, followed by `[i]` if the parameter has several matrices.
        block: its elements in the flattened parameter; `stride == cols` if it contains whole rows, as weights, experts
            and heads along the rows do.
        transposed: stored as (in, out), like GPT-2's Conv1D; affects the scale of the update and rules that use
            output features.
    """

    name: str
    block: Block
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.block.rows

    @property
    def cols(self) -> int:
        return self.block.cols

    @property
    def numel(self) -> int:
        return self.block.numel

    @property
    def parameter(self) -> str:
        """FQN of the parameter that contains this matrix."""
        return self.name.partition("[")[0]

    @property
    def fan(self) -> tuple[int, int]:
        """(output features, input features)."""
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)


def cut_parameter(
    name: str,
    shape: Sequence[int],
    *,
    heads: int | None = None,
    sizes: Sequence[int] | None = None,
    transposed: bool = False,
    axis: str = "outputs",
) -> tuple[Matrix, ...]:
    """The matrices of one parameter.

    Args:
        name: FQN.
        shape: (M, N); (E, M, N) is a batch of E matrices; more axes are flattened to (M, -1), as for convolutions.
        heads: split the axis into this many equal blocks.
        sizes: or split it into blocks of these sizes, as for fused QKV.
        transposed: stored as (in, out), so the columns are the outputs.
        axis: the axis to split, "outputs" or "inputs".

    Raises:
        LayoutError: fewer than two axes, an unknown axis, or a split that does not fit the axis.
    """
    if len(shape) < 2:
        raise LayoutError(f"{name} has shape {tuple(shape)}: only matrices can be orthogonalized; use adamw for it")
    batch, m, n = 1, int(shape[0]), 1
    if len(shape) == 3:
        batch, m, n = (int(s) for s in shape)
    else:
        for s in shape[1:]:
            n *= int(s)
    if axis not in ("outputs", "inputs"):
        raise LayoutError(f"{name}: axis is {axis!r}: use outputs or inputs")
    columns = transposed == (axis == "outputs")
    length, word = n if columns else m, axis.removesuffix("s")
    if heads is not None:
        if heads < 1 or length % heads:
            raise LayoutError(f"{name}: {heads} heads do not divide its {word} axis of {length}")
        sizes = [length // heads] * heads
    blocks = [int(s) for s in sizes] if sizes is not None else [length]
    if sum(blocks) != length or min(blocks) < 1:
        raise LayoutError(f"{name}: the split {blocks} does not add up to its {word} axis of {length}")
    matrices: list[Matrix] = []
    single = batch == 1 and len(blocks) == 1
    for b in range(batch):
        at = 0
        for block in blocks:
            rows, cols = (m, block) if columns else (block, n)
            start = b * m * n + (at if columns else at * n)
            label = name if single else f"{name}[{len(matrices)}]"
            matrices.append(Matrix(label, Block(start, rows, cols, n), transposed))
            at += block
    return tuple(matrices)
