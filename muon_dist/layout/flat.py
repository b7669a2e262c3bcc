"""ZeRO-1 and ZeRO-2: the parameters of a group laid end to end and cut into equal slices, one a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.fragment import Layout, Matrix, MatrixLayout
from muon_dist.layout.fragments import slices_of


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter within a flattened group.

    Attributes:
        name: FQN, for messages.
        numel: elements of the whole parameter.
        offset: of its first element, in elements. In `flat_layout` within the whole flattened group; in
            `per_parameter_layout` of this parameter's slice within each rank's buffer.
        matrices: how it is cut.
    """

    name: str
    numel: int
    offset: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class FlatGroup:
    """Parameters laid end to end, padding allowed; rank r holds elements `[r * partition, (r + 1) * partition)`."""

    parameters: tuple[PlacedParameter, ...]
    partition: int


def flat_layout(groups: Sequence[FlatGroup], world_size: int, *, together: bool = False) -> Layout:
    """A layout in which buffer i is the slice of `groups[i]` that a rank holds; matrices may straddle ranks.

    Args:
        groups: those of Muon only.
        together: all groups are stepped in one call, so the work is balanced over all of them; else one at a time.

    Raises:
        LayoutError: a parameter reaches past the last partition, or two overlap.
    """
    matrices: list[MatrixLayout] = []
    holders = np.arange(world_size)[:, None]
    for buffer, group in enumerate(groups):
        end = 0
        for p in sorted(group.parameters, key=lambda p: p.offset):
            if p.offset < end or p.offset + p.numel > group.partition * world_size:
                raise LayoutError(
                    f"{p.name} at {p.offset}..{p.offset + p.numel} overlaps its neighbour, which ends at {end}, or "
                    f"passes the end of {world_size} partitions of {group.partition}"
                )
            end = p.offset + p.numel
        for p in group.parameters:
            for m in p.matrices:
                pieces = slices_of(m, group.partition, holders, buffer=buffer, begin=p.offset, shift=p.offset)
                matrices.append(MatrixLayout(m, pieces))
    phases = (tuple(range(len(groups))),) if together else tuple((i,) for i in range(len(groups)))
    return Layout("flat", world_size, tuple(matrices), phases, complete_gradients=True)
