"""DDP and ZeRO-0: every rank holds every matrix whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from muon_dist.layout.fragment import Layout, Matrix, MatrixLayout
from muon_dist.layout.fragments import Fragments


def replicated_layout(buffers: Sequence[Sequence[Matrix]], world_size: int) -> Layout:
    """A layout in which buffer i is one whole parameter, cut into `buffers[i]`, on each of `world_size` ranks."""
    ranks = np.arange(world_size)
    matrices = (
        MatrixLayout(m, Fragments(ranks, 0, m.numel, buffer, 0)) for buffer, cut in enumerate(buffers) for m in cut
    )
    alone = world_size == 1
    return Layout(
        "replicated",
        world_size,
        tuple(matrices),
        domains=() if alone else tuple(range(world_size)),
        columns=() if alone else (0,) * world_size,
    )
