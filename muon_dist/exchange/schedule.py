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
        gathers, scatters: whether any rank sends momentum to an owner; whether any owner sends an update to a rank.
        relay: by rank, the number of update elements that the rank broadcasts to its replica group: the updates of
            its fragments by all owners in its copy of the model. Empty if the matrices are not relayed
            (`Layout.relayed`); a bucket has either only relayed matrices or none.
    """

    matrices: tuple[int, ...]
    gathers: bool
    scatters: bool
    relay: dict[int, int] = field(default_factory=dict)


# Largest memory that a step allocates for a bucket, in bytes per element of the bound of `make_buckets`.
_MESSAGES = 16
"""The momentum of the next bucket and the updates of the previous bucket, each sent and received, in fp32."""
_STACKS = 4
_WORKSPACE = {4: 16, 2: 10}
"""Memory of Newton-Schulz, by the size of its dtype: one more X and four squares of the shorter side, which take at
most 2/3 of X each (14.7 bytes in fp32, plus a margin). In 16 bits: half of this, plus the last X in 16 bits."""


def moves(plan: OwnershipPlan, matrices: Iterable[int]) -> bool:
    """Whether any of `matrices` needs messages: false if each is whole on its owner and on no other rank."""
    return any(bool((plan.layout.matrices[i].fragments.rank != plan.owners[i]).any()) for i in matrices)


def bytes_of_two_buckets(itemsize: int = 4, messages: bool = True, also: int = 0) -> int:
    """Largest number of bytes that a pipelined step allocates, per element of the bound of `make_buckets`.

    Args:
        itemsize: bytes per element of the widest dtype of Newton-Schulz. fp64 needs more than this function returns.
        messages: whether anything is sent (`moves`).
        also: number of tensors that sources send besides the momentum.
    """
    gathered = also * (_STACKS + (_MESSAGES // 2 if messages else 0))
    return _STACKS + _WORKSPACE[2 if itemsize == 2 else 4] + (_MESSAGES if messages else 0) + gathered


def bucket_elements(bucket_bytes: int, itemsize: int = 4, messages: bool = True, also: int = 0) -> int:
    """The bound of `make_buckets` with which a pipelined step allocates at most `2 * bucket_bytes`.

    `make_buckets` raises the bound to the size of the largest matrix. Other arguments: see `bytes_of_two_buckets`.
    """
    return max(1, 2 * bucket_bytes // bytes_of_two_buckets(itemsize, messages, also))


# The first gather and the last scatter overlap with nothing. With fewer buckets they take a large share of the time.
_PIPELINED = 8
SMALLEST = 2**20
"""Elements of the smallest bucket made for overlap on a CPU: a message below 4 MB is mostly latency."""
SMALLEST_ON_DEVICES = 2**24
"""The same on an accelerator. Its links carry 64 MB in less time than it takes to launch the kernels of a bucket."""


def smallest_bucket(device_type: str) -> int:
    """Elements of the smallest bucket made for overlap, on a device of this type."""
    return SMALLEST if device_type == "cpu" else SMALLEST_ON_DEVICES


def pipelined_elements(
    plan: OwnershipPlan, matrices: Sequence[int], bucket_elements: int, smallest: int = SMALLEST
) -> int:
    """The bound of `make_buckets` for overlapping buckets: `bucket_elements`, or less.

    It is less, down to `smallest`, if the busiest owner of `matrices` would otherwise have fewer than `_PIPELINED`
    buckets. If the matrices need no messages (`moves`), it is `bucket_elements`: there is nothing to overlap.
    """
    if not moves(plan, matrices):
        return bucket_elements
    owned = np.zeros(plan.layout.world_size, dtype=np.int64)
    for i in matrices:
        owned[plan.owners[i]] += plan.layout.matrices[i].matrix.numel
    return min(bucket_elements, max(int(owned.max()) // _PIPELINED, smallest))


def gather_parts(plan: OwnershipPlan, bucket: Bucket, rank: int) -> tuple[list[Part], list[Part]]:
    """(fragments that `rank` sends to owners, fragments that it receives as an owner), both in order of peers."""
    return _parts(plan, bucket, rank, plan.sources)


def scatter_parts(plan: OwnershipPlan, bucket: Bucket, rank: int) -> tuple[list[Part], list[Part]]:
    """(fragments that `rank` sends as an owner, fragments that it receives from owners), both in order of peers."""
    received, sent = _parts(plan, bucket, rank, plan.direct)
    return sent, received


def _parts(
    plan: OwnershipPlan, bucket: Bucket, rank: int, pieces: Sequence[Fragments]
) -> tuple[list[Part], list[Part]]:
    """(fragments on `rank` with another owner, fragments on other ranks that `rank` owns), both in order of peers."""
    owners = plan.owners
    here = ((i, f) for i in bucket.matrices if owners[i] != rank for f in pieces[i].on(rank))
    owned = ((i, f) for i in bucket.matrices if owners[i] == rank for f in pieces[i] if f.rank != rank)
    return sorted(here, key=lambda part: owners[part[0]]), sorted(owned, key=lambda part: part[1].rank)


def elements_by_rank(world_size: int, ranks: Iterable[int], parts: Iterable[Part]) -> list[int]:
    """Total elements of `parts` per rank, (world_size,); `ranks` has the rank of each part."""
    counts = [0] * world_size
    for r, (_, f) in zip(ranks, parts, strict=True):
        counts[r] += f.length
    return counts


def relayed_parts(plan: OwnershipPlan, bucket: Bucket, rank: int, column: Sequence[int]) -> list[Part]:
    """The updates that `rank` receives from the ranks of its replica group `column`, in their order."""
    if not column:
        return []
    domains = plan.layout.domains
    made: dict[int, list[int]] = {}
    for i in bucket.matrices:
        made.setdefault(domains[plan.owners[i]], []).append(i)
    return [(i, f) for r in column for i in made.get(domains[r], ()) for f in plan.layout.matrices[i].on(rank)]


def largest_end(plan: OwnershipPlan, i: int) -> int:
    """The larger of two numbers for matrix `i`: elements that its owner stacks, and elements that it sends."""
    given = plan.direct[i]
    return max(plan.layout.matrices[i].matrix.numel, int(given.length[given.rank != plan.owners[i]].sum()))


class _Ends:
    """Elements that each rank sends, receives and stacks for a growing bucket, (kinds, world_size)."""

    def __init__(self, plan: OwnershipPlan) -> None:
        self.plan = plan
        self.busy = np.zeros((6, plan.layout.world_size), dtype=np.int64)

    def of(self, i: int) -> np.ndarray:
        """Elements that matrix `i` adds, (kinds, world_size). Kinds: gather and scatter each way, stacked, relayed."""
        added = np.zeros_like(self.busy)
        owner, given = self.plan.owners[i], self.plan.direct[i]
        np.add.at(added[0], self.plan.sources[i].rank, self.plan.sources[i].length)
        np.add.at(added[3], given.rank, given.length)
        if self.plan.layout.relayed(i):
            added[5] = added[3]
        added[0, owner] = added[3, owner] = 0  # the owner sends nothing to itself
        added[1, owner] = added[0].sum()
        added[2, owner] = added[3].sum()
        added[4, owner] = self.plan.layout.matrices[i].matrix.numel
        return added

    def exceed(self, added: np.ndarray, bound: int) -> bool:
        return bool(((self.busy + added > bound) & (added > 0)).any())


def _by_progress(plan: OwnershipPlan, matrices: Sequence[int]) -> list[int]:
    """`matrices`, with each owner's sorted by shape, and the owners' lists interleaved by the share that is done."""
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
    """The matrices of each bucket of `make_buckets`, without the other attributes of `Bucket`."""
    if overlap:
        bucket_elements = pipelined_elements(plan, matrices, bucket_elements, smallest)
    # Raise the bound to the largest matrix: its owner must hold and send it anyway. Otherwise every matrix above the
    # bound would be a bucket by itself, in which only one owner works and all others wait.
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
    """Divide `matrices` into buckets. Per bucket, no rank sends, receives or stacks more than `bucket_elements`.
    If the largest matrix exceeds the bound, its size is the bound. Relayed updates count at their sender but not at
    their receivers, which take one sender after another. If they counted there too, a bucket would have only one or
    two matrices, and all other owners would wait. The owners' lists are interleaved by progress, so that each bucket
    gives work to every owner, and equal shapes of one owner stay together for one batched call.
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
    """Bytes that `rank` sends to other ranks for `buckets`; tests compare it with counted bytes.

    A relayed update counts once for each other rank of the replica group (`copies` ranks), although the backend may
    let another rank forward it.
    """
    gathered = sum(f.length for b in buckets for _, f in gather_parts(plan, b, rank)[0])
    scattered = sum(f.length for b in buckets for _, f in scatter_parts(plan, b, rank)[0])
    scattered += sum(b.relay.get(rank, 0) for b in buckets) * (copies - 1)
    return gathered * gather_bytes + scattered * scatter_bytes
