"""Tensors on a device mesh: FSDP2, HSDP, tensor, expert and context parallelism as sharded tensor axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from muon_dist.errors import LayoutError
from muon_dist.layout.block import Block
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.layout import Layout
from muon_dist.layout.matrix import Matrix
from muon_dist.layout.parameter import StoredParameter, matrix_layouts

Cut = tuple[int, int]
"""(tensor axis that a mesh axis shards, split factor). The axis is first divided into as many equal parts as the split
factor, then each part is sharded: 1 for `Shard(axis)`, the split factor of a `_StridedShard`."""

Interval = tuple[int, int, int]
"""(first index, number of indices, position of the first index in the local tensor) along one tensor axis."""


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter and its sharding on a device mesh, as plain numbers.

    Attributes:
        name: FQN, for messages.
        shape: shape of the whole parameter.
        mesh_shape: number of ranks along each mesh axis.
        ranks: the ranks of the mesh in row-major order, numbered as in the layout's process group.
        cuts: per mesh axis, a `Cut`, an int for `Shard(axis)`, or None for `Replicate`.
        matrices: the matrices of the parameter.

    Raises:
        LayoutError: the numbers are inconsistent, or one axis has two strided cuts, so that the elements of a rank are
            undefined.
    """

    name: str
    shape: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    ranks: tuple[int, ...]
    cuts: tuple[Cut | int | None, ...]
    matrices: tuple[Matrix, ...] = ()

    def __post_init__(self) -> None:
        if math.prod(self.mesh_shape) != len(self.ranks) or len(self.cuts) != len(self.mesh_shape):
            raise LayoutError(
                f"{self.name}: {len(self.ranks)} ranks and {len(self.cuts)} placements on a mesh of {self.mesh_shape}"
            )
        if len(set(self.ranks)) != len(self.ranks):
            raise LayoutError(f"{self.name}: a rank is in the mesh {self.ranks} twice")
        cuts = tuple((cut, 1) if isinstance(cut, int) else cut for cut in self.cuts)
        object.__setattr__(self, "cuts", cuts)
        for axis in {cut[0] for cut in cuts if cut is not None}:
            if not 0 <= axis < len(self.shape):
                raise LayoutError(f"{self.name} of shape {self.shape} has no axis {axis} to cut")
            _in_order(self.name, [(c[1], n) for c, n in zip(cuts, self.mesh_shape, strict=True) if c and c[0] == axis])

    def shards(self) -> tuple[tuple[int, ...], ...]:
        """Per shard, in mesh order, the ranks that hold a copy of it."""
        return tuple(tuple(row) for row in self._holders().tolist())

    @property
    def number_of_shards(self) -> int:
        return math.prod(n for n, cut in zip(self.mesh_shape, self.cuts, strict=True) if cut is not None)

    def _holders(self) -> np.ndarray:
        """Ranks that hold each shard, (shards, copies)."""
        grid = np.asarray(self.ranks).reshape(self.mesh_shape)
        cutting = [i for i, cut in enumerate(self.cuts) if cut is not None]
        copying = [i for i, cut in enumerate(self.cuts) if cut is None]
        return grid.transpose(*cutting, *copying).reshape(self.number_of_shards, -1)

    def copies(self) -> tuple[int, ...]:
        """Per rank of the mesh, in mesh order, the index of the parameter's copy to which it belongs."""
        sizes = [n if cut is None else 1 for n, cut in zip(self.mesh_shape, self.cuts, strict=True)]
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        return tuple(np.broadcast_to(numbers, self.mesh_shape).reshape(-1).tolist())

    def fragments(self, buffer: int) -> Fragments:
        """The fragments of the flattened parameter on every rank, in order of shards, in buffer number `buffer`."""
        shard, start, rows, cols, stride, local, step = _blocks(self.shape, self.mesh_shape, self.cuts)
        holders = self._holders()
        copies = holders.shape[1]
        start, rows, cols, stride, local, step = (
            np.repeat(c, copies) for c in (start, rows, cols, stride, local, step)
        )
        return Fragments(holders[shard].reshape(-1), start, rows, cols, stride, buffer, local, step)

    def stored(self, buffer: int) -> StoredParameter:
        """The parameter with its fragments."""
        return StoredParameter(self.name, self.shape, self.fragments(buffer), self.matrices)


def dtensor_layout(parameters: Sequence[ShardedParameter], world_size: int) -> Layout:
    """The layout of DTensors: buffer i is the local tensor of `parameters[i]`. HSDP's copies are fragments.

    Copies of the model and replica groups follow the parameter with the most shards: its copies are the domains, and
    the holders of one of its shards are a column.
    """
    matrices = matrix_layouts(p.stored(buffer) for buffer, p in enumerate(parameters))
    widest = max(parameters, key=lambda p: p.number_of_shards, default=None)
    if widest is None or widest.number_of_shards == len(widest.ranks):
        return Layout("dtensor", world_size, matrices)
    domains, columns = [0] * world_size, [0] * world_size
    for rank, copy in zip(widest.ranks, widest.copies(), strict=True):
        domains[rank] = copy
    for shard, ranks in enumerate(widest.shards()):
        for rank in ranks:
            columns[rank] = shard
    return Layout("dtensor", world_size, matrices, domains=tuple(domains), columns=tuple(columns))


# From cuts to blocks --------------------------------------------------------------------------------------------


def _in_order(name: str, cuts: list[tuple[int, int]]) -> list[int]:
    """The order in which the cuts of one axis, (split factor, parts), are applied: positions in `cuts`.

    A strided cut before plain cuts is applied last, to their parts: `fully_shard` shards the parts of tensor
    parallelism, and `DTensor.full_tensor` reverses this order. Raises LayoutError for any other combination.
    """
    strided = [i for i, (factor, _) in enumerate(cuts) if factor > 1]
    if not strided or len(cuts) == 1:
        return list(range(len(cuts)))
    others = math.prod(parts for _, parts in cuts[1:])
    if strided != [0] or cuts[0][0] != others:
        raise LayoutError(
            f"{name}: one axis is cut as (split factor, parts) {cuts}: torch does not say which elements a rank holds "
            "unless one strided shard comes before the plain shards that make up its split factor"
        )
    return [*range(1, len(cuts)), 0]


def _chunk(index: np.ndarray, parts: int, number: int) -> np.ndarray:
    """Part `number` of `torch.chunk`; the last parts are empty if there are more parts than elements."""
    size = -(-len(index) // parts)
    return index[number * size : (number + 1) * size]


def _held(length: int, cuts: Sequence[tuple[int, int]], at: Sequence[int]) -> list[Interval]:
    """The intervals of an axis that the rank at coordinates `at` holds; `cuts`: (split factor, parts)."""
    index = np.arange(length)
    for i in _in_order("", list(cuts)):
        factor, parts = cuts[i] if len(cuts) == 1 else (1, cuts[i][1])
        index = np.concatenate([_chunk(_chunk(index, factor, k), parts, at[i]) for k in range(factor)])
    ends = np.flatnonzero(np.diff(index) != 1) + 1
    return [
        (int(part[0]), len(part), int(position))
        for part, position in zip(np.split(index, ends), [0, *ends], strict=True)
        if len(part)
    ]


@lru_cache(maxsize=256)
def _blocks(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], cuts: tuple[Cut | None, ...]
) -> tuple[np.ndarray, ...]:
    """(shard, start, rows, cols, stride, local start, local stride) of every block of every shard."""
    cutting = [(i, cut) for i, cut in enumerate(cuts) if cut is not None]
    along = {axis: [i for i, cut in cutting if cut[0] == axis] for axis in {cut[0] for _, cut in cutting}}
    sizes = [mesh_shape[i] for i, _ in cutting]
    position = {i: k for k, (i, _) in enumerate(cutting)}
    held = {
        (axis, at): _held(shape[axis], [(cuts[i][1], mesh_shape[i]) for i in mesh_axes], at)  # type: ignore[index]
        for axis, mesh_axes in along.items()
        for at in np.ndindex(*(mesh_shape[i] for i in mesh_axes))
    }
    found: list[tuple[int, ...]] = []
    for shard, coordinates in enumerate(np.ndindex(*sizes)):
        intervals = [
            held[axis, tuple(coordinates[position[i]] for i in along[axis])] if axis in along else [(0, n, 0)]
            for axis, n in enumerate(shape)
        ]
        found += ((shard, *block) for block in _product(shape, intervals) if block[1] * block[2])
    return tuple(np.array(found, dtype=np.int64).reshape(-1, 7).T)


def blocks_of(shape: tuple[int, ...], intervals: list[list[Interval]]) -> list[tuple[Block, Block]]:
    """The blocks of a flattened tensor of `shape` inside the `intervals` of all axes, each with its block in the
    flattened local tensor."""
    found = _product(shape, intervals)
    return [
        (Block(a, rows, cols, b), Block(at, rows, cols, step)) for a, rows, cols, b, at, step in found if rows * cols
    ]


def _product(shape: tuple[int, ...], intervals: list[list[Interval]]) -> list[tuple[int, ...]]:
    """(start, rows, cols, stride, local start, local stride) of the blocks inside the intervals of all axes."""
    last = max((axis for axis, held in enumerate(intervals) if held != [(0, shape[axis], 0)]), default=0)
    inner = math.prod(shape[last + 1 :])
    local_shape = [sum(n for _, n, _ in held) for held in intervals]
    # Intervals of the flattened axes before `last`: (first, number, position in the flattened local axes).
    outer: list[Interval] = [(0, 1, 0)]
    for axis in range(last):
        outer = _refined(outer, intervals[axis], shape[axis], local_shape[axis])
    stride, step = shape[last] * inner, local_shape[last] * inner
    blocks: list[tuple[int, ...]] = []
    for first, number, where in outer:
        for begin, n, at in intervals[last]:
            cols, width, pitch, rows = n * inner, stride, step, number
            if rows == 1 or cols == width == pitch:
                rows, cols, width, pitch = 1, rows * cols, rows * cols, rows * cols
            blocks.append((first * stride + begin * inner, rows, cols, width, where * step + at * inner, pitch))
    return blocks


def _refined(outer: list[Interval], held: list[Interval], length: int, local: int) -> list[Interval]:
    """The intervals `outer`, extended by one axis. held: the rank's intervals of the new axis."""
    if held == [(0, length, 0)]:
        return [(first * length, number * length, where * local) for first, number, where in outer]
    return [
        ((first + i) * length + begin, n, (where + i) * local + at)
        for first, number, where in outer
        for i in range(number)
        for begin, n, at in held
    ]
