"""DDP and ZeRO-0: every rank holds every matrix whole."""

from __future__ import annotations

from collections.abc import Sequence

from muon_dist.layout.fragment import Fragment, Layout, Matrix, MatrixLayout


def replicated_layout(buffers: Sequence[Sequence[Matrix]], world_size: int) -> Layout:
    """A layout in which buffer i is one whole parameter, cut into `buffers[i]`, on each of `world_size` ranks."""
    return Layout(
        "replicated",
        world_size,
        tuple(
            MatrixLayout(m, tuple(Fragment(rank, 0, m.numel, i, 0) for rank in range(world_size)))
            for i, matrices in enumerate(buffers)
            for m in matrices
        ),
    )
