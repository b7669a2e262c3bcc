"""ZeRO-3: every parameter flattened, padded and split over all ranks; the slices of a sub-group laid end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.flat import PlacedParameter
from muon_dist.layout.fragment import Layout, MatrixLayout
from muon_dist.layout.fragments import slices_of


def slice_length(numel: int, world_size: int) -> int:
    """Elements of each rank's slice of a parameter of `numel` elements, padding included."""
    return -(-numel // world_size)


def per_parameter_layout(sub_groups: Sequence[Sequence[PlacedParameter]], world_size: int) -> Layout:
    """A layout in which buffer i holds a rank's slices of the parameters of `sub_groups[i]`.

    Of a parameter of n elements, rank r holds `[r * s, min((r + 1) * s, n))` at the parameter's offset, with
    `s = slice_length(n, world_size)`; the last ranks of a small one may hold nothing. Sub-groups are stepped one at a
    time.

    Raises:
        LayoutError: two slices of a sub-group overlap.
    """
    matrices: list[MatrixLayout] = []
    holders = np.arange(world_size)[:, None]
    for buffer, parameters in enumerate(sub_groups):
        end = 0
        for p in sorted(parameters, key=lambda p: p.offset):
            if p.offset < end:
                raise LayoutError(f"the slice of {p.name} at {p.offset} overlaps its neighbour, which ends at {end}")
            end = p.offset + slice_length(p.numel, world_size)
        for p in parameters:
            size = slice_length(p.numel, world_size)
            for m in p.matrices:
                matrices.append(MatrixLayout(m, slices_of(m, size, holders, buffer=buffer, shift=p.offset)))
    phases = tuple((i,) for i in range(len(sub_groups)))
    return Layout("per_parameter", world_size, tuple(matrices), phases, complete_gradients=True)
