"""What is sent where, as pure data: bounded buckets of matrices, and the element counts of every message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from muon_dist.layout.fragment import Fragment
from muon_dist.ownership import OwnershipPlan


@dataclass(frozen=True)
class Bucket:
    """Matrices that are gathered, orthogonalized and scattered together.

    Attributes:
        matrices: indices into the plan's layout, owner by owner and equal shapes side by side.
        gather: elements of momentum that rank s sends to owner o, by (s, o); a rank sends itself nothing.
        scatter: elements of update that owner o sends to rank d, by (o, d).
        broadcast: every rank holds every matrix of the bucket whole (DDP), so that each owner sends the same to all.
            True for all matrices of a bucket, or False for all.
    """

    matrices: tuple[int, ...]
    gather: dict[tuple[int, int], int]
    scatter: dict[tuple[int, int], int]
    broadcast: bool = False


# What a step allocates at most for a bucket, in bytes per element of the bound on what is sent, received and stacked:
# 8 for the momentum of the next bucket (sent and received, fp32), 4 for the stacks, 16 for what Newton-Schulz works
# with (one more X and four squares of the shorter side, each at most 2/3 of X: 14.7 bytes, and a margin), 8 for the
# updates of the bucket before (sent and received). Together 36, which are two buckets.
_BYTES_OF_TWO_BUCKETS = 36


def bucket_elements(bucket_bytes: int) -> int:
    """The bound of `make_buckets` with which a pipelined step allocates at most `2 * bucket_bytes`.

    A matrix that alone exceeds the bound has a bucket of its own, of its own size. In fp64 Newton-Schulz takes more.
    """
    return max(1, 2 * bucket_bytes // _BYTES_OF_TWO_BUCKETS)


# With fewer buckets than this the first gather and the last scatter, which nothing hides, are a large share of the
# whole; a message below 4 MB is mostly latency.
_PIPELINED = 8
_SMALLEST = 2**20


def pipelined_elements(plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int) -> int:
    """The bound of `make_buckets` when they are to overlap: smaller than `bucket_elements` where the busiest owner of
    `matrices` would otherwise have less than `_PIPELINED` buckets, but not below `_SMALLEST`.

    Of one rank `bucket_elements`: there is nothing to hide.
    """
    if plan.layout.world_size == 1:
        return bucket_elements
    owned = np.zeros(plan.layout.world_size, dtype=np.int64)
    for i in matrices:
        owned[plan.owners[i]] += plan.layout.matrices[i].matrix.numel
    return min(bucket_elements, max(int(owned.max()) // _PIPELINED, _SMALLEST))


def splits(counts: dict[tuple[int, int], int], rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """(elements that `rank` sends to each rank, elements that it receives from each)."""
    sends = [counts.get((rank, r), 0) for r in range(world_size)]
    receives = [counts.get((r, rank), 0) for r in range(world_size)]
    return sends, receives


def outgoing(plan: OwnershipPlan, bucket: Bucket, rank: int, peer: int) -> Iterator[tuple[int, Fragment]]:
    """The pieces of the gather message from `rank` to `peer`, in order, as (matrix, fragment on `rank`)."""
    for i in bucket.matrices:
        if plan.owners[i] == peer:
            for f in plan.sources[i].on(rank):
                yield i, f


def returning(plan: OwnershipPlan, bucket: Bucket, owner: int, peer: int) -> Iterator[tuple[int, Fragment]]:
    """The pieces of the scatter message from `owner` to `peer`, in order, as (matrix, fragment on `peer`)."""
    for i in bucket.matrices:
        if plan.owners[i] == owner:
            for f in plan.layout.matrices[i].on(peer):
                yield i, f


def whole_everywhere(plan: OwnershipPlan, i: int) -> bool:
    """Every one of several ranks holds matrix `i` in one piece."""
    m, world = plan.layout.matrices[i], plan.layout.world_size
    return world > 1 and len(m.fragments) == world and bool((m.fragments.length == m.matrix.numel).all())


def largest_end(plan: OwnershipPlan, i: int) -> int:
    """Elements of matrix `i` that its owner stacks, or sends to all copies of its shards (HSDP), if that is more."""
    m = plan.layout.matrices[i]
    numel = m.matrix.numel
    return numel if whole_everywhere(plan, i) else max(numel, int(m.fragments.length.sum()) - m.held(plan.owners[i]))


class _Ends:
    """What each rank sends, receives and stacks in a bucket while it grows: (kind, rank) -> elements."""

    def __init__(self, plan: OwnershipPlan) -> None:
        self.plan = plan
        self.busy = np.zeros((5, plan.layout.world_size), dtype=np.int64)

    def of(self, i: int) -> np.ndarray:
        """What matrix `i` adds: sent and received in the gather, sent and received in the scatter, stacked."""
        added = np.zeros_like(self.busy)
        owner, matrix = self.plan.owners[i], self.plan.layout.matrices[i]
        np.add.at(added[0], self.plan.sources[i].rank, self.plan.sources[i].length)
        np.add.at(added[3], matrix.fragments.rank, matrix.fragments.length)
        added[0, owner] = added[3, owner] = 0  # what stays is not sent
        added[1, owner] = added[0].sum()
        added[2, owner] = added[3].sum()
        if whole_everywhere(self.plan, i):  # broadcast once, and received from two owners at a time
            added[2, owner], added[3] = matrix.matrix.numel, 0
        added[4, owner] = matrix.matrix.numel
        return added

    def exceed(self, added: np.ndarray, bound: int) -> bool:
        return bool(((self.busy + added > bound) & (added > 0)).any())


def _by_progress(plan: OwnershipPlan, matrices: Sequence[int]) -> list[int]:
    """`matrices` with the owners' lists, each sorted by shape, interleaved by the share of it that is done."""
    queues: dict[int, list[tuple[tuple[int, int], int]]] = {}
    for i in matrices:
        m = plan.layout.matrices[i].matrix
        queues.setdefault(plan.owners[i], []).append(((m.rows, m.cols), i))
    progress: list[tuple[float, int, tuple[int, int], int]] = []
    for owner in sorted(queues):
        total = sum(rows * cols for (rows, cols), _ in queues[owner])
        done = 0
        for shape, i in sorted(queues[owner]):
            progress.append((done / total, owner, shape, i))
            done += shape[0] * shape[1]
    return [i for *_, i in sorted(progress)]


def cut_buckets(plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int) -> list[tuple[int, ...]]:
    """The matrices of each bucket of `make_buckets`, without its messages."""
    # The owner of the largest matrix must hold it anyway, and send it to every copy. Without this every matrix above
    # the bound has a bucket of its own, in which all owners but one wait: Newton-Schulz runs one matrix after another
    # on the whole world.
    bound = max(bucket_elements, max((largest_end(plan, i) for i in matrices), default=0))

    def key(i: int) -> tuple[int, int, int, int]:
        m = plan.layout.matrices[i].matrix
        return plan.owners[i], m.rows, m.cols, i

    buckets: list[list[int]] = []
    ends = _Ends(plan)
    for broadcast in (True, False):
        begins = True
        for i in _by_progress(plan, [i for i in matrices if whole_everywhere(plan, i) == broadcast]):
            added = ends.of(i)
            if begins or ends.exceed(added, bound):
                buckets.append([])
                ends.busy[:] = 0
            buckets[-1].append(i)
            ends.busy += added
            begins = False
    return [tuple(sorted(members, key=key)) for members in buckets]


def make_buckets(plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int) -> tuple[Bucket, ...]:
    """Cut `matrices` into buckets such that no rank sends, receives or stacks more than `bucket_elements` at a time.

    The largest matrix takes the place of a smaller bound. A broadcast counts once at its sender and not at its
    receivers, which take one owner's after another: else the bound on what they all send would leave a bucket one or
    two matrices, and all owners but these would wait. The owners' lists are interleaved by progress, so that each
    bucket gives every owner work, and equal shapes of one owner stay together for one batched call.
    """
    return tuple(_bucket(plan, members) for members in cut_buckets(plan, matrices, bucket_elements))


def _bucket(plan: OwnershipPlan, members: tuple[int, ...]) -> Bucket:
    gather: dict[tuple[int, int], int] = {}
    scatter: dict[tuple[int, int], int] = {}
    for i in members:
        owner = plan.owners[i]
        for f in plan.sources[i]:
            if f.rank != owner:
                gather[f.rank, owner] = gather.get((f.rank, owner), 0) + f.length
        for f in plan.layout.matrices[i].fragments:
            if f.rank != owner:
                scatter[owner, f.rank] = scatter.get((owner, f.rank), 0) + f.length
    return Bucket(members, gather, scatter, whole_everywhere(plan, members[0]))


def bytes_sent(buckets: Sequence[Bucket], rank: int, gather_bytes: int, scatter_bytes: int) -> int:
    """Bytes that `rank` sends to other ranks for `buckets`; the byte counter of the tests must find the same."""
    gathered = sum(n for b in buckets for (s, _), n in b.gather.items() if s == rank)
    scattered = sum(n for b in buckets for (o, _), n in b.scatter.items() if o == rank)
    return gathered * gather_bytes + scattered * scatter_bytes
