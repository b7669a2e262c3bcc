"""ZeRO-3: every parameter is flattened, padded and split over all ranks; slices of a sub-group are end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.flat import PlacedParameter
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.layout import Layout
from muon_dist.layout.parameter import StoredParameter, matrix_layouts


def slice_length(numel: int, world_size: int) -> int:
    """Elements of each rank's slice of a parameter of `numel` elements, padding included."""
    return -(-numel // world_size)


def sub_group(parameters: Sequence[PlacedParameter], buffer: int, world_size: int) -> list[StoredParameter]:
    """The parameters of a sub-group with their fragments; their slices are in each rank's buffer number `buffer`.

    Of a parameter with n elements, rank r holds `[r * s, min((r + 1) * s, n))` at the parameter's offset, with
    `s = slice_length(n, world_size)`. If n is small, the last ranks may hold nothing.

    Raises:
        LayoutError: two slices overlap.
    """
    end = 0
    for p in sorted(parameters, key=lambda p: p.offset):
        if p.offset < end:
            raise LayoutError(f"the slice of {p.name} at {p.offset} overlaps its neighbour, which ends at {end}")
        end = p.offset + slice_length(p.numel, world_size)
    found = []
    for p in parameters:
        size = slice_length(p.numel, world_size)
        rank = np.arange(-(-p.numel // size) if size else 0)
        length = np.minimum(size, p.numel - rank * size)
        fragments = Fragments.runs(rank, rank * size, length, buffer, p.offset)
        found.append(StoredParameter(p.name, p.shape, fragments, p.matrices))
    return found


def per_parameter_layout(sub_groups: Sequence[Sequence[PlacedParameter]], world_size: int) -> Layout:
    """The layout of ZeRO-3: buffer i has a rank's slices of the parameters in `sub_groups[i]`; see `sub_group`.

    Each sub-group is stepped in a separate call.
    """
    stored = [p for buffer, members in enumerate(sub_groups) for p in sub_group(members, buffer, world_size)]
    phases = tuple((i,) for i in range(len(sub_groups)))
    return Layout("per_parameter", world_size, matrix_layouts(stored), phases, complete_gradients=True)
