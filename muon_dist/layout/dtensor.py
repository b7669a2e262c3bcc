"""FSDP2: parameters as DTensors, cut by rows over one axis of a device mesh and copied over the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.errors import LayoutError
from muon_dist.layout.fragment import Fragment, Layout, Matrix, MatrixLayout, fragments_of_run


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


def dtensor_layout(parameters: Sequence[ShardedParameter], world_size: int) -> Layout:
    """A layout in which buffer i is the local tensor of `parameters[i]`; copies (HSDP, Replicate) are fragments."""
    matrices: list[MatrixLayout] = []
    for buffer, p in enumerate(parameters):
        width = math.prod(p.shape[1:])
        for m in p.matrices:
            fragments: list[Fragment] = []
            for shard, holders in enumerate(p.shards()):
                first, last = (row * width for row in p.rows(shard))
                for rank in holders:
                    fragments += fragments_of_run(m, rank, first, last - first, buffer, 0)
            matrices.append(MatrixLayout(m, tuple(fragments)))
    return Layout("dtensor", world_size, tuple(matrices))
