"""The messages of a step as pure data: bounded buckets of matrices, and the elements of every message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from muon_dist.exchange.readers import Part
from muon_dist.layout import Fragments
from muon_dist.ownership import OwnershipPlan


@dataclass(frozen=True)
class Bucket:
    """Matrices that are gathered, orthogonalized and scattered together.

    Attributes:
        matrices: indices into the plan's layout, owner by owner and equal shapes side by side.
        gathers, scatters: whether any rank sends momentum to an owner, and any owner an update to another rank.
        relay: elements of update that a rank broadcasts along its column, by rank, when it has them: what all owners
            of its domain make for it (`Layout.relayed`; for all matrices of a bucket, or for none).
    """

    matrices: tuple[int, ...]
    gathers: bool
    scatters: bool
    relay: dict[int, int] = field(default_factory=dict)


# What a step allocates at most for a bucket, in bytes per element of the bound on what is sent, received and stacked.
_MESSAGES = 16
"""The momentum of the next bucket and the updates of the bucket before, each sent and received, in fp32."""
_STACKS = 4
_WORKSPACE = {4: 16, 2: 10}
"""Of Newton-Schulz, by the size of its dtype: one more X and four squares of the shorter side, each at most 2/3 of X
(14.7 bytes in fp32, and a margin). In 16 bits half of that, and the last X, which is not written to the stack."""


def moves(plan: OwnershipPlan, matrices: Iterable[int]) -> bool:
    """Whether any of `matrices` does not lie whole on its owner only."""
    return any(bool((plan.layout.matrices[i].fragments.rank != plan.owners[i]).any()) for i in matrices)


def bytes_of_two_buckets(itemsize: int = 4, messages: bool = True, also: int = 0) -> int:
    """Largest number of bytes that a pipelined step allocates, per element of the bound of `make_buckets`.

    Args:
        itemsize: of the widest dtype of Newton-Schulz; in fp64 it takes more than is said here.
        messages: whether anything is sent (`moves`).
        also: tensors that sources send besides the momentum.
    """
    gathered = also * (_STACKS + (_MESSAGES // 2 if messages else 0))
    return _STACKS + _WORKSPACE[2 if itemsize == 2 else 4] + (_MESSAGES if messages else 0) + gathered


def bucket_elements(bucket_bytes: int, itemsize: int = 4, messages: bool = True, also: int = 0) -> int:
    """The bound of `make_buckets` with which a pipelined step allocates at most `2 * bucket_bytes`.

    A matrix that alone exceeds the bound has a bucket of its own, of its own size. Arguments of
    `bytes_of_two_buckets`.
    """
    return max(1, 2 * bucket_bytes // bytes_of_two_buckets(itemsize, messages, also))


# With fewer buckets than this the first gather and the last scatter, which nothing hides, are a large share of the
# whole.
_PIPELINED = 8
SMALLEST = 2**20
"""Elements of the smallest bucket that is cut off for overlap on a CPU: a message below 4 MB is mostly latency."""
SMALLEST_ON_DEVICES = 2**24
"""The same on an accelerator. Its links carry 64 MB in less time than it takes to launch the kernels of a bucket."""


def smallest_bucket(device_type: str) -> int:
    """Elements of the smallest bucket that is cut off for overlap, on a device of this type."""
    return SMALLEST if device_type == "cpu" else SMALLEST_ON_DEVICES


def pipelined_elements(
    plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int, smallest: int = SMALLEST
) -> int:
    """The bound of `make_buckets` when they are to overlap: smaller than `bucket_elements` where the busiest owner of
    `matrices` would otherwise have less than `_PIPELINED` buckets, but not below `smallest`.

    Where every matrix lies whole on its owner only it is `bucket_elements`: there is nothing to hide.
    """
    if not moves(plan, matrices):
        return bucket_elements
    owned = np.zeros(plan.layout.world_size, dtype=np.int64)
    for i in matrices:
        owned[plan.owners[i]] += plan.layout.matrices[i].matrix.numel
    return min(bucket_elements, max(int(owned.max()) // _PIPELINED, smallest))


def gather_parts(plan: OwnershipPlan, bucket: Bucket, rank: int) -> tuple[list[Part], list[Part]]:
    """(what `rank` sends to the owners, what it receives as an owner), peer after peer; nothing to itself."""
    return _parts(plan, bucket, rank, plan.sources)


def scatter_parts(plan: OwnershipPlan, bucket: Bucket, rank: int) -> tuple[list[Part], list[Part]]:
    """(what `rank` sends as an owner, what it receives from the owners), peer after peer."""
    received, sent = _parts(plan, bucket, rank, plan.direct)
    return sent, received


def _parts(
    plan: OwnershipPlan, bucket: Bucket, rank: int, pieces: Sequence[Fragments]
) -> tuple[list[Part], list[Part]]:
    """(those of `rank` whose owner is another, those of others which `rank` owns), each in the order of the peers."""
    owners = plan.owners
    here = ((i, f) for i in bucket.matrices if owners[i] != rank for f in pieces[i].on(rank))
    owned = ((i, f) for i in bucket.matrices if owners[i] == rank for f in pieces[i] if f.rank != rank)
    return sorted(here, key=lambda part: owners[part[0]]), sorted(owned, key=lambda part: part[1].rank)


def elements_by_rank(world_size: int, ranks: Iterable[int], parts: Iterable[Part]) -> list[int]:
    """Elements of `parts` for each of their `ranks`."""
    counts = [0] * world_size
    for r, (_, f) in zip(ranks, parts, strict=True):
        counts[r] += f.length
    return counts


def relayed_parts(plan: OwnershipPlan, bucket: Bucket, rank: int, column: Sequence[int]) -> list[Part]:
    """The updates that `rank` receives from the ranks of its `column`, in their order: one part per domain."""
    if not column:
        return []
    domains = plan.layout.domains
    made: dict[int, list[int]] = {}
    for i in bucket.matrices:
        made.setdefault(domains[plan.owners[i]], []).append(i)
    return [(i, f) for r in column for i in made.get(domains[r], ()) for f in plan.layout.matrices[i].on(rank)]


def largest_end(plan: OwnershipPlan, i: int) -> int:
    """Elements of matrix `i` that its owner stacks, or sends to copies that are not relayed, if that is more."""
    given = plan.direct[i]
    return max(plan.layout.matrices[i].matrix.numel, int(given.length[given.rank != plan.owners[i]].sum()))


class _Ends:
    """Elements that each rank sends, receives and stacks while a bucket grows: (kind, rank) -> elements."""

    def __init__(self, plan: OwnershipPlan) -> None:
        self.plan = plan
        self.busy = np.zeros((6, plan.layout.world_size), dtype=np.int64)

    def of(self, i: int) -> np.ndarray:
        """Elements that matrix `i` adds: sent and received in the gather, in the scatter, stacked, relayed."""
        added = np.zeros_like(self.busy)
        owner, given = self.plan.owners[i], self.plan.direct[i]
        np.add.at(added[0], self.plan.sources[i].rank, self.plan.sources[i].length)
        np.add.at(added[3], given.rank, given.length)
        if self.plan.layout.relayed(i):
            added[5] = added[3]
        added[0, owner] = added[3, owner] = 0  # what stays is not sent
        added[1, owner] = added[0].sum()
        added[2, owner] = added[3].sum()
        added[4, owner] = self.plan.layout.matrices[i].matrix.numel
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


def cut_buckets(
    plan: OwnershipPlan,
    matrices: Sequence[int],
    bucket_elements: int,
    overlap: bool = False,
    smallest: int = SMALLEST,
) -> list[tuple[int, ...]]:
    """The matrices of each bucket of `make_buckets`, without its messages."""
    if overlap:
        bucket_elements = pipelined_elements(plan, matrices, bucket_elements, smallest)
    # The owner of the largest matrix must hold it anyway, and send it to every copy. Without this every matrix above
    # the bound has a bucket of its own, in which all owners but one wait: Newton-Schulz runs one matrix after another
    # on the whole world.
    bound = max(bucket_elements, max((largest_end(plan, i) for i in matrices), default=0))

    def key(i: int) -> tuple[int, int, int, int]:
        m = plan.layout.matrices[i].matrix
        return plan.owners[i], m.rows, m.cols, i

    buckets: list[list[int]] = []
    ends = _Ends(plan)
    for relayed in (True, False):
        begins = True
        for i in _by_progress(plan, [i for i in matrices if plan.layout.relayed(i) == relayed]):
            added = ends.of(i)
            if begins or ends.exceed(added, bound):
                buckets.append([])
                ends.busy[:] = 0
            buckets[-1].append(i)
            ends.busy += added
            begins = False
    return [tuple(sorted(members, key=key)) for members in buckets]


def make_buckets(
    plan: OwnershipPlan,
    matrices: Sequence[int],
    bucket_elements: int,
    overlap: bool = False,
    smallest: int = SMALLEST,
) -> tuple[Bucket, ...]:
    """Cut `matrices` into buckets such that no rank sends, receives or stacks more than `bucket_elements` at a time.

    The largest matrix takes the place of a smaller bound. What is relayed counts once at its sender and not at its
    receivers, which take one sender's after another: else the bound on what they all send would leave a bucket one or
    two matrices, and all owners but these would wait. The owners' lists are interleaved by progress, so that each
    bucket gives every owner work, and equal shapes of one owner stay together for one batched call.
    """
    return tuple(_bucket(plan, members) for members in cut_buckets(plan, matrices, bucket_elements, overlap, smallest))


def _bucket(plan: OwnershipPlan, members: tuple[int, ...]) -> Bucket:
    gathers = scatters = False
    relay = np.zeros(plan.layout.world_size, dtype=np.int64)
    for i in members:
        owner, given = plan.owners[i], plan.direct[i]
        gathers |= bool((plan.sources[i].rank != owner).any())
        scatters |= bool((given.rank != owner).any())
        if plan.layout.relayed(i):
            np.add.at(relay, given.rank, given.length)
    return Bucket(members, gathers, scatters, {int(r): int(relay[r]) for r in np.flatnonzero(relay)})


def bytes_sent(
    plan: OwnershipPlan,
    buckets: Sequence[Bucket],
    rank: int,
    gather_bytes: int,
    scatter_bytes: int,
    copies: int = 1,
) -> int:
    """Bytes that `rank` sends to other ranks for `buckets`; the byte counter of the tests must find the same.

    What is relayed counts for each of the other `copies` (ranks of a column), although who forwards it is the
    backend's choice.
    """
    gathered = sum(f.length for b in buckets for _, f in gather_parts(plan, b, rank)[0])
    scattered = sum(f.length for b in buckets for _, f in scatter_parts(plan, b, rank)[0])
    scattered += sum(b.relay.get(rank, 0) for b in buckets) * (copies - 1)
    return gathered * gather_bytes + scattered * scatter_bytes
