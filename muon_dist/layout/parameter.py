"""The fragments of a parameter on all ranks: the input of layouts, checkpoints and comparisons of copies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from muon_dist.layout.fragments import Fragments
from muon_dist.layout.layout import MatrixLayout
from muon_dist.layout.matrix import Matrix


@dataclass(frozen=True)
class StoredParameter:
    """A parameter and its fragments on all ranks.

    Attributes:
        name: FQN.
        shape: shape of the whole parameter.
        fragments: fragments of the flattened parameter, on all ranks.
        matrices: its matrices; empty under AdamW.
    """

    name: str
    shape: tuple[int, ...]
    fragments: Fragments
    matrices: tuple[Matrix, ...] = ()


def matrix_layouts(parameters: Iterable[StoredParameter]) -> tuple[MatrixLayout, ...]:
    """The layout of every matrix of `parameters`, in order."""
    return tuple(MatrixLayout(m, p.fragments.within(m.block)) for p in parameters for m in p.matrices)
