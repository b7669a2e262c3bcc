"""An order of parameters for ZeRO-1/2, so that its equal slices begin between matrices where possible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muon_dist.layout import Matrix, MatrixLayout
from muon_dist.layout.flat import FlatGroup, PlacedParameter, flat_layout
from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.plan import OwnershipPlan, assign_owners

# DeepSpeed pads a flat group to a multiple of this times the number of ranks (nccl_start_alignment_factor in
# runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py, 0.19.8).
DEEPSPEED_ALIGNMENT = 2
_CANDIDATES = 4096  # candidate positions compared for one boundary
_BEAM = 16  # partial orders kept at a boundary
_BEAM_STEPS = 2048  # limit on boundaries times partial orders, so fewer partial orders for many partitions
_WIDEST = 6  # counts of one kind that are tried at a boundary
_EVEN = 0.1  # weight of the seconds by which kinds are used unevenly, because later boundaries pay for this
_MOVED_BYTES = 2 * 4  # an element that is not on its owner is sent twice (gather and scatter), in fp32


@dataclass(frozen=True)
class _Kind:
    """Interchangeable parameters: they are split in the same way into matrices of the same shapes.

    members: indices in the given order. size: elements of one. work: seconds to orthogonalize one. ends: positions
    inside one where a boundary cuts no matrix, 0 and `size` included.
    """

    members: tuple[int, ...]
    size: int
    work: float
    ends: np.ndarray

    def moved(self, inside: np.ndarray) -> np.ndarray:
        """Elements on the smaller side of the matrix that a boundary `inside` the parameter cuts; inf outside."""
        right = np.searchsorted(self.ends, inside).clip(1, len(self.ends) - 1)
        cut = np.minimum(self.ends[right] - inside, inside - self.ends[right - 1]).astype(float)
        return np.where((inside < 0) | (inside > self.size), math.inf, cut)


def slice_elements(numels: Sequence[int], partitions: int, alignment: int = DEEPSPEED_ALIGNMENT) -> int:
    """Elements per rank's slice of a flat group, padding included. numels: elements of each parameter."""
    return -(-sum(numels) // (alignment * partitions)) * alignment


def partition_order(
    parameters: Sequence[Sequence[Matrix]],
    partitions: int,
    *,
    alignment: int = DEEPSPEED_ALIGNMENT,
    cost: CostModel | None = None,
) -> list[int]:
    """Indices of `parameters` in the best order, for a flat group that is cut into `partitions` equal slices.

    A matrix that a boundary cuts must be sent; a matrix that is whole on a rank need not be. Every slice gets about
    the same number of parameters of each kind, to balance the arithmetic. Within this limit each boundary cuts off as
    few elements as possible. Parameters of one kind keep their order, so neighbouring layers stay together. The given
    order is kept unless the busiest rank (arithmetic and bytes) finishes earlier with the new order, or equally early
    with fewer bytes. Deterministic.

    Args:
        parameters: per parameter, its matrices, which cover it.
        partitions: ranks of the data-parallel group.
        alignment: the group is padded to a multiple of `alignment * partitions` elements.
        cost: seconds of arithmetic and of messages.
    """
    given = list(range(len(parameters)))
    if partitions < 2 or len(parameters) < 2:
        return given
    model = cost or CostModel()
    numels = [sum(m.numel for m in matrices) for matrices in parameters]
    size = slice_elements(numels, partitions, alignment)
    aligned = _arrange(_kinds(parameters, model), partitions, size, model)
    before, after = (_ends(parameters, order, partitions, size, model) for order in (given, aligned))
    return aligned if after < before else given


def _kinds(parameters: Sequence[Sequence[Matrix]], model: CostModel) -> list[_Kind]:
    """The kinds of `parameters`; first the kind with the most elements in total."""
    members: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, matrices in enumerate(parameters):
        key = tuple(
            (min(m.rows, m.cols), max(m.rows, m.cols), m.block.start, m.block.stride == m.cols) for m in matrices
        )
        members.setdefault(key, []).append(i)
    kinds = []
    for indices in members.values():
        matrices = parameters[indices[0]]
        size = sum(m.numel for m in matrices)
        whole_rows = all(m.block.stride == m.cols for m in matrices)  # any boundary cuts all blocks of columns
        ends = np.array(sorted({0, size, *(m.block.start for m in matrices if whole_rows)}), dtype=np.int64)
        work = sum(model.orthogonalize(m.rows, m.cols, 5) for m in matrices)
        kinds.append(_Kind(tuple(indices), size, work, ends))
    return sorted(kinds, key=lambda k: (-k.size * len(k.members), k.members))


def _offsets(kinds: int) -> np.ndarray:
    """(candidates, kinds): changes of the proportional count of each kind, smallest change first."""
    varied = min(kinds, int(math.log2(_CANDIDATES)))
    width = max(w for w in range(2, _WIDEST + 1) if w == 2 or w**varied <= _CANDIDATES)
    steps = np.arange(width) - (width - 1) // 2
    grid = np.stack(np.meshgrid(*[steps] * varied, indexing="ij"), axis=-1).reshape(-1, varied)
    grid = grid[np.argsort(np.abs(grid - 0.5).sum(axis=1), kind="stable")]
    return np.concatenate([grid, np.zeros((len(grid), kinds - varied), dtype=grid.dtype)], axis=1)


@dataclass(frozen=True)
class _State:
    """Number of parameters of each kind before a boundary.

    price: cost so far, in seconds. edge: the kind of the parameter that the boundary cuts. sticks_out: this parameter
    is the last of the slice; else it is the first of the next slice. before: the state at the previous boundary.
    """

    taken: np.ndarray
    price: float
    edge: int | None = None
    sticks_out: bool = False
    before: _State | None = None


def _arrange(kinds: list[_Kind], partitions: int, size: int, model: CostModel) -> list[int]:
    """The best order found by beam search: at each boundary, choose how many parameters of each kind are before it."""
    walk = _Walk(kinds, partitions, size, model)
    width = max(1, min(_BEAM, _BEAM_STEPS // partitions))
    beam = [_State(np.zeros(len(kinds), dtype=np.int64), 0.0)]
    for boundary in range(1, partitions):
        found: dict[bytes, _State] = {}
        for state in beam:
            for following in walk.followers(state, boundary, width):
                known = found.setdefault(following.taken.tobytes(), following)
                if following.price < known.price:
                    found[following.taken.tobytes()] = following
        beam = sorted(found.values(), key=lambda s: s.price)[:width]
    last = _State(np.array([len(k.members) for k in kinds]), 0.0, before=beam[0])
    chosen = [last]
    while chosen[-1].before is not None:
        chosen.append(chosen[-1].before)
    order: list[int] = []
    first: int | None = None
    for before, after in itertools.pairwise(reversed(chosen)):
        order += _members(kinds, before.taken, after.taken, first, after.edge if after.sticks_out else None)
        first = None if after.sticks_out else after.edge
    return order


class _Walk:
    """The choices at each boundary, and their costs."""

    def __init__(self, kinds: list[_Kind], partitions: int, size: int, model: CostModel) -> None:
        self.kinds = kinds
        self.size = size
        self.counts = np.array([len(k.members) for k in kinds])
        self.sizes = np.array([k.size for k in kinds])
        self.works = np.array([k.work for k in kinds])
        self.mean = float(self.counts @ self.works) / partitions
        self.total = int(self.counts @ self.sizes)
        self.seconds_moved = _MOVED_BYTES / model.bytes_per_second
        self.offsets = _offsets(len(kinds))

    def followers(self, state: _State, boundary: int, number: int) -> list[_State]:
        """The `number` cheapest states at the `boundary`-th boundary that follow `state` at the previous boundary."""
        at = min(boundary * self.size, self.total)
        proportional = self.counts * at // self.total
        candidates = np.clip(proportional + self.offsets, state.taken, self.counts)
        reserved = np.zeros_like(self.counts)
        if state.edge is not None and not state.sticks_out:
            reserved[state.edge] = 1  # this parameter begins the slice
        least_taken = state.taken + reserved
        candidates = np.vstack([candidates[(candidates >= least_taken).all(axis=1)], least_taken])
        beyond = candidates @ self.sizes - boundary * self.size
        # The parameter cut by the boundary is the last of the slice before it, or the first of the slice after it.
        cut = np.stack(
            [
                np.where(
                    beyond > 0,
                    np.where(candidates[:, i] > state.taken[i] + reserved[i], k.moved(k.size - beyond), math.inf),
                    np.where(candidates[:, i] < self.counts[i], k.moved(-beyond), math.inf),
                )
                for i, k in enumerate(self.kinds)
            ]
        )
        edges = cut.argmin(axis=0)
        least = np.where(beyond == 0, 0.0, np.minimum(cut.min(axis=0), float(self.total)))
        load = (candidates - state.taken) @ self.works
        uneven = np.abs(candidates - self.counts * (at / self.total)) @ self.works
        price = state.price + least * self.seconds_moved + np.maximum(load - self.mean, 0) + _EVEN * uneven
        best: dict[bytes, _State] = {}
        for b in np.argsort(price, kind="stable"):
            if len(best) == number:
                break
            edge = None if beyond[b] == 0 else int(edges[b])
            taken = candidates[b]
            best.setdefault(taken.tobytes(), _State(taken, float(price[b]), edge, bool(beyond[b] > 0), state))
        return list(best.values())


def _members(
    kinds: list[_Kind], start: np.ndarray, stop: np.ndarray, first: int | None, last: int | None
) -> list[int]:
    """Parameters `start` to `stop` of each kind in the given order; one of kind `first` goes first, of `last` last."""
    chosen = [list(k.members[int(a) : int(b)]) for k, a, b in zip(kinds, start, stop, strict=True)]
    head = [chosen[first].pop(0)] if first is not None and chosen[first] else []
    tail = [chosen[last].pop()] if last is not None and chosen[last] else []
    return head + sorted(i for members in chosen for i in members) + tail


def _ends(
    parameters: Sequence[Sequence[Matrix]], order: Sequence[int], partitions: int, size: int, model: CostModel
) -> tuple[float, int]:
    """(seconds until the last rank finishes, elements sent to owners) for the order `order`."""
    placed = []
    at = 0
    for i in order:
        numel = sum(m.numel for m in parameters[i])
        placed.append(PlacedParameter(f"parameter {i}", numel, at, tuple(parameters[i])))
        at += numel
    plan = assign_owners(flat_layout([FlatGroup(tuple(placed), size)], partitions), cost=model)
    return _last(plan, model), sum(
        m.matrix.numel - m.held(owner) for m, owner in zip(plan.layout.matrices, plan.owners, strict=True)
    )


def _last(plan: OwnershipPlan, model: CostModel) -> float:
    def seconds(m: MatrixLayout, owner: int) -> float:
        missing = m.matrix.numel - m.held(owner)
        return model.orthogonalize(m.matrix.rows, m.matrix.cols, 5) + 2 * model.move(missing, 4)

    loads = [0.0] * plan.layout.world_size
    for m, owner in zip(plan.layout.matrices, plan.owners, strict=True):
        loads[owner] += seconds(m, owner)
    return max(loads)
