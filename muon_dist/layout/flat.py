"""ZeRO-1 and ZeRO-2: the parameters of a group laid end to end and cut into equal slices, one per rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.layout import Layout
from muon_dist.layout.matrix import Matrix
from muon_dist.layout.parameter import StoredParameter, matrix_layouts


@dataclass(frozen=True)
class PlacedParameter:
    """A parameter within a flattened group.

    Attributes:
        name: FQN.
        numel: elements of the whole parameter.
        offset: index of its first element. In a `FlatGroup`: in the whole flattened group. In `per_parameter_layout`:
            of this parameter's slice in each rank's buffer.
        matrices: its matrices; empty under AdamW.
        shape: shape of the whole parameter; empty if not needed.
    """

    name: str
    numel: int
    offset: int
    matrices: tuple[Matrix, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class FlatGroup:
    """Parameters end to end, possibly with padding; rank r holds elements `[r * partition, (r + 1) * partition)`."""

    parameters: tuple[PlacedParameter, ...]
    partition: int

    def stored(self, buffer: int, world_size: int) -> list[StoredParameter]:
        """Its parameters with their fragments; buffer number `buffer` of each rank is the rank's slice.

        Raises:
            LayoutError: a parameter reaches past the last partition, or two overlap.
        """
        end = 0
        for p in sorted(self.parameters, key=lambda p: p.offset):
            if p.offset < end or p.offset + p.numel > self.partition * world_size:
                raise LayoutError(
                    f"{p.name} at {p.offset}..{p.offset + p.numel} overlaps its neighbour, which ends at {end}, or "
                    f"passes the end of {world_size} partitions of {self.partition}"
                )
            end = p.offset + p.numel
        return [StoredParameter(p.name, p.shape, self._slices(p, buffer), p.matrices) for p in self.parameters]

    def _slices(self, p: PlacedParameter, buffer: int) -> Fragments:
        if p.numel == 0:
            return Fragments.of(())
        rank = np.arange(p.offset // self.partition, (p.offset + p.numel - 1) // self.partition + 1)
        begin = rank * self.partition
        first = np.maximum(begin, p.offset)
        length = np.minimum(begin + self.partition, p.offset + p.numel) - first
        return Fragments.runs(rank, first - p.offset, length, buffer, first - begin)


def flat_layout(groups: Sequence[FlatGroup], world_size: int, *, together: bool = False) -> Layout:
    """The layout of ZeRO-1/2: buffer i is a rank's slice of `groups[i]`. A matrix may cross slice boundaries.

    Args:
        groups: only Muon's groups.
        world_size: number of ranks.
        together: True: one call steps all groups, so work is balanced over all of them. False: one call per group.

    Raises:
        LayoutError: a parameter reaches past the last partition, or two overlap.
    """
    stored = [p for buffer, group in enumerate(groups) for p in group.stored(buffer, world_size)]
    phases = (tuple(range(len(groups))),) if together else tuple((i,) for i in range(len(groups)))
    return Layout("flat", world_size, matrix_layouts(stored), phases, complete_gradients=True)
