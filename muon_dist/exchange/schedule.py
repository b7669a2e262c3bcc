"""What is sent where, as pure data: bounded buckets of matrices, and the element counts of every message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muon_dist.layout.fragment import Fragment
from muon_dist.ownership import OwnershipPlan

Move = tuple[int, int, int]
"""(sender, receiver, elements)"""


@dataclass(frozen=True)
class Bucket:
    """Matrices that are gathered, orthogonalized and scattered together.

    Attributes:
        matrices: indices into the plan's layout, owner by owner and equal shapes side by side.
        gather: elements of momentum that rank s sends to owner o, by (s, o); a rank sends itself nothing.
        scatter: elements of update that owner o sends to rank d, by (o, d).
    """

    matrices: tuple[int, ...]
    gather: dict[tuple[int, int], int]
    scatter: dict[tuple[int, int], int]


def splits(counts: dict[tuple[int, int], int], rank: int, world_size: int) -> tuple[list[int], list[int]]:
    """(elements that `rank` sends to each rank, elements that it receives from each)."""
    sends = [counts.get((rank, r), 0) for r in range(world_size)]
    receives = [counts.get((r, rank), 0) for r in range(world_size)]
    return sends, receives


def outgoing(plan: OwnershipPlan, bucket: Bucket, rank: int, peer: int) -> Iterator[tuple[int, Fragment]]:
    """The pieces of the gather message from `rank` to `peer`, in order, as (matrix, fragment on `rank`)."""
    for i in bucket.matrices:
        if plan.owners[i] == peer:
            for f in plan.sources[i]:
                if f.rank == rank:
                    yield i, f


def returning(plan: OwnershipPlan, bucket: Bucket, owner: int, peer: int) -> Iterator[tuple[int, Fragment]]:
    """The pieces of the scatter message from `owner` to `peer`, in order, as (matrix, fragment on `peer`)."""
    for i in bucket.matrices:
        if plan.owners[i] == owner:
            for f in plan.layout.matrices[i].on(peer):
                yield i, f


class _Messages:
    """Messages of one direction of a bucket while it grows."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], int] = {}
        self.busy: dict[tuple[str, int], int] = {}

    def would_exceed(self, moves: Sequence[Move], bound: int) -> bool:
        added: dict[tuple[str, int], int] = {}
        for sender, receiver, n in moves:
            for end in (("send", sender), ("receive", receiver)):
                added[end] = added.get(end, 0) + n
        return any(self.busy.get(end, 0) + n > bound for end, n in added.items())

    def add(self, moves: Sequence[Move]) -> None:
        for sender, receiver, n in moves:
            self.counts[sender, receiver] = self.counts.get((sender, receiver), 0) + n
            for end in (("send", sender), ("receive", receiver)):
                self.busy[end] = self.busy.get(end, 0) + n


def _moves(plan: OwnershipPlan, i: int) -> tuple[list[Move], list[Move]]:
    """What matrix `i` adds to the gather and to the scatter."""
    owner = plan.owners[i]
    gather = [(f.rank, owner, f.length) for f in plan.sources[i] if f.rank != owner]
    scatter = [(owner, f.rank, f.length) for f in plan.layout.matrices[i].fragments if f.rank != owner]
    return gather, scatter


def _by_progress(plan: OwnershipPlan, matrices: Sequence[int]) -> list[int]:
    """`matrices` with the owners' lists, each sorted by shape, interleaved by the share of it that is done."""
    shapes = [(m.matrix.rows, m.matrix.cols) for m in plan.layout.matrices]
    progress: list[tuple[float, int, tuple[int, int], int]] = []
    for owner in sorted({plan.owners[i] for i in matrices}):
        queue = sorted((i for i in matrices if plan.owners[i] == owner), key=lambda i: (shapes[i], i))
        total = sum(plan.layout.matrices[i].matrix.numel for i in queue)
        done = 0
        for i in queue:
            progress.append((done / total, owner, shapes[i], i))
            done += plan.layout.matrices[i].matrix.numel
    return [i for *_, i in sorted(progress)]


def make_buckets(plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int) -> tuple[Bucket, ...]:
    """Cut `matrices` into buckets such that no rank sends, receives or stacks more than `bucket_elements` at a time.

    A matrix larger than the bound has a bucket of its own. The owners' lists are interleaved by progress, so that
    each bucket gives every owner work, and equal shapes of one owner stay together for one batched call.
    """

    def close(members: list[int], gather: _Messages, scatter: _Messages) -> Bucket:
        def key(i: int) -> tuple[int, int, int, int]:
            m = plan.layout.matrices[i].matrix
            return plan.owners[i], m.rows, m.cols, i

        return Bucket(tuple(sorted(members, key=key)), gather.counts, scatter.counts)

    buckets: list[Bucket] = []
    members: list[int] = []
    gather, scatter, stacks = _Messages(), _Messages(), _Messages()
    for i in _by_progress(plan, matrices):
        inward, outward = _moves(plan, i)
        stacked = [(plan.owners[i], plan.owners[i], plan.layout.matrices[i].matrix.numel)]
        kinds = (gather, inward), (scatter, outward), (stacks, stacked)
        if members and any(messages.would_exceed(moves, bucket_elements) for messages, moves in kinds):
            buckets.append(close(members, gather, scatter))
            members, gather, scatter, stacks = [], _Messages(), _Messages(), _Messages()
        members.append(i)
        gather.add(inward)
        scatter.add(outward)
        stacks.add(stacked)
    if members:
        buckets.append(close(members, gather, scatter))
    return tuple(buckets)


def bytes_sent(buckets: Sequence[Bucket], rank: int, gather_bytes: int, scatter_bytes: int) -> int:
    """Bytes that `rank` sends to other ranks for `buckets`; the byte counter of the tests must find the same."""
    gathered = sum(n for b in buckets for (s, _), n in b.gather.items() if s == rank)
    scattered = sum(n for b in buckets for (o, _), n in b.scatter.items() if o == rank)
    return gathered * gather_bytes + scattered * scatter_bytes
