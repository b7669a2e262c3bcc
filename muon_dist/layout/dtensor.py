"""FSDP2: parameters as DTensors, cut by rows over one axis of a device mesh and copied over the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.fragment import Layout, Matrix, MatrixLayout
from muon_dist.layout.fragments import slices_of


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter and its place on a device mesh, as plain numbers; buffer i of the layout is the i-th of them.

    Attributes:
        name: FQN, for messages.
        shape: of the whole parameter.
        mesh_shape: ranks along each mesh axis.
        ranks: those of the mesh in row-major order, numbered as in the process group of the layout.
        cuts: for each mesh axis the tensor axis that it cuts, which must be 0 (`Shard(0)`), or None (`Replicate`).
        matrices: how it is cut into matrices.

    Raises:
        LayoutError: the numbers do not fit together, or more than one mesh axis cuts, or one cuts another axis.
    """

    name: str
    shape: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    cuts: tuple[int | None, ...]
    matrices: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if math.prod(self.mesh_shape) != len(self.ranks) or len(self.cuts) != len(self.mesh_shape):
            raise LayoutError(
                f"{self.name}: {len(self.ranks)} ranks and {len(self.cuts)} placements on a mesh of {self.mesh_shape}"
            )
        if len(set(self.ranks)) != len(self.ranks):
            raise LayoutError(f"{self.name}: a rank stands in the mesh {self.ranks} twice")
        cutting = [axis for axis in self.cuts if axis is not None]
        if cutting not in ([], [0]):
            raise LayoutError(f"{self.name}: the mesh cuts its axes {cutting}; only axis 0, once, can be planned")

    def shards(self) -> tuple[tuple[int, ...], ...]:
        """For each shard, in the order of the rows, the ranks that hold a copy of it."""
        if 0 not in self.cuts:
            return (self.ranks,)
        axis = self.cuts.index(0)
        inner = math.prod(self.mesh_shape[axis + 1 :])
        holders: list[list[int]] = [[] for _ in range(self.mesh_shape[axis])]
        for position, rank in enumerate(self.ranks):
            holders[position // inner % self.mesh_shape[axis]].append(rank)
        return tuple(tuple(h) for h in holders)

    def rows(self, shard: int) -> tuple[int, int]:
        """[first, last) row of a shard, as `torch.chunk` cuts: the last may be shorter, or empty."""
        size = -(-self.shape[0] // len(self.shards()))
        return min(shard * size, self.shape[0]), min((shard + 1) * size, self.shape[0])

    def copies(self) -> tuple[int, ...]:
        """For each rank of the mesh, in its order, which copy of the parameter it belongs to."""
        if 0 not in self.cuts:
            return tuple(range(len(self.ranks)))
        axis = self.cuts.index(0)
        inner = math.prod(self.mesh_shape[axis + 1 :])
        length = self.mesh_shape[axis] * inner
        return tuple(i // length * inner + i % inner for i in range(len(self.ranks)))


def dtensor_layout(parameters: Sequence[ShardedParameter], world_size: int) -> Layout:
    """A layout in which buffer i is the local tensor of `parameters[i]`; copies (HSDP, Replicate) are fragments.

    The domains are the copies of the parameter with the most shards, the columns its shards.
    """
    matrices: list[MatrixLayout] = []
    for buffer, p in enumerate(parameters):
        holders = np.array(p.shards())
        size = -(-p.shape[0] // len(holders)) * math.prod(p.shape[1:])
        for m in p.matrices:
            matrices.append(MatrixLayout(m, slices_of(m, size, holders, buffer=buffer)))
    widest = max(parameters, key=lambda p: len(p.shards()), default=None)
    if widest is None or len(widest.shards()) == len(widest.ranks):
        return Layout("dtensor", world_size, tuple(matrices))
    domains, columns = [0] * world_size, [0] * world_size
    for rank, copy in zip(widest.ranks, widest.copies(), strict=True):
        domains[rank] = copy
    for shard, ranks in enumerate(widest.shards()):
        for rank in ranks:
            columns[rank] = shard
    return Layout("dtensor", world_size, tuple(matrices), domains=tuple(domains), columns=tuple(columns))
