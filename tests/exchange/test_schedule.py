from __future__ import annotations

import random

import pytest

from muon_dist.exchange.schedule import bytes_sent, make_buckets, outgoing, returning, splits
from muon_dist.layout import (
    Fragment,
    Layout,
    MatrixLayout,
    PlacedParameter,
    cut_parameter,
    fragments_of_run,
    per_parameter_layout,
)
from muon_dist.layout.replicated import replicated_layout
from muon_dist.ownership import OwnershipPlan, assign_owners


def random_plan(seed: int, world: int) -> OwnershipPlan:
    """Matrices of random shapes, each cut into random runs over the ranks, some of them empty."""
    rng = random.Random(seed)
    layouts = []
    for i in range(12):
        shape = (rng.randint(1, 9), rng.randint(1, 9))
        (m,) = cut_parameter(f"m{i}", shape)
        cuts = sorted(rng.randint(0, m.numel) for _ in range(world - 1))
        runs = zip([0, *cuts], [*cuts, m.numel], strict=True)
        fragments = [f for r, (a, b) in enumerate(runs) for f in fragments_of_run(m, r, a, b - a, 0, 0)]
        layouts.append(MatrixLayout(m, tuple(fragments)))
    return assign_owners(Layout("flat", world, tuple(layouts)))


@pytest.mark.parametrize("bound", [1, 40, 10**9])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_buckets_hold_every_matrix_once_within_the_bound(world, bound):
    plan = random_plan(world, world)
    everything = range(len(plan.layout.matrices))
    buckets = make_buckets(plan, list(everything), bound)
    assert sorted(i for b in buckets for i in b.matrices) == list(everything)
    largest = max(m.matrix.numel for m in plan.layout.matrices)
    for b in buckets:
        if len(b.matrices) > 1:
            for counts in (b.gather, b.scatter):
                for rank in range(world):
                    sends, receives = splits(counts, rank, world)
                    assert sum(sends) <= max(bound, largest) >= sum(receives)
            for rank in range(world):
                owned = [i for i in b.matrices if plan.owners[i] == rank]
                assert sum(plan.layout.matrices[i].matrix.numel for i in owned) <= max(bound, largest)
    assert bound == 1 or len(buckets) < len(everything)


@pytest.mark.parametrize("world", [2, 4])
def test_matrices_above_the_bound_share_a_bucket_when_their_owners_differ(world):
    """One bucket each would let one owner work and all others wait."""
    matrices = [cut_parameter(f"m{i}", (16, 16))[0] for i in range(2 * world)]
    placed = [PlacedParameter(m.name, m.numel, i * m.numel // world, (m,)) for i, m in enumerate(matrices)]
    plan = assign_owners(per_parameter_layout([placed], world))
    buckets = make_buckets(plan, range(len(matrices)), 1)
    assert [sorted(plan.owners[i] for i in b.matrices) for b in buckets] == [list(range(world))] * 2


def test_messages_agree_on_both_ends_and_with_the_byte_count():
    world = 4
    plan = random_plan(7, world)
    buckets = make_buckets(plan, list(range(12)), 60)
    total = 0
    for b in buckets:
        for sender in range(world):
            sends, _ = splits(b.gather, sender, world)
            returns, _ = splits(b.scatter, sender, world)
            for receiver in range(world):
                if sender == receiver:
                    assert sends[receiver] == 0
                    continue
                assert sends[receiver] == sum(f.length for _, f in outgoing(plan, b, sender, receiver))
                assert returns[receiver] == sum(f.length for _, f in returning(plan, b, sender, receiver))
                # exclusive fragments: what came in goes back
                assert returns[receiver] == splits(b.gather, receiver, world)[0][sender]
            total += 4 * sum(sends) + 2 * sum(returns)
    assert total == sum(bytes_sent(buckets, r, 4, 2) for r in range(world))


def test_replicated_gathers_nothing_and_broadcasts():
    matrices = [cut_parameter(f"m{i}", (4, 6))[0] for i in range(4)]
    plan = assign_owners(replicated_layout([[m] for m in matrices], 4))
    (bucket,) = make_buckets(plan, [0, 1, 2, 3], 10**9)
    assert bucket.gather == {}
    assert sum(bucket.scatter.values()) == 4 * 24 * 3
    assert [bytes_sent((bucket,), r, 4, 4) for r in range(4)] == [4 * 24 * 3] * 4


def test_a_broadcast_bucket_gives_every_owner_work():
    """A bound on what all owners send together left 16 ranks buckets of one owner each."""
    matrices = [cut_parameter(f"m{i}", (8, 8))[0] for i in range(64)]
    plan = assign_owners(replicated_layout([[m] for m in matrices], 16))
    buckets = make_buckets(plan, range(64), 64)
    assert [sorted(plan.owners[i] for i in b.matrices) for b in buckets] == [list(range(16))] * 4


def test_copies_of_shards_do_not_leave_owners_waiting():
    """HSDP, two copies of two shards: an owner sends 1.5 matrices, which alone exceeded a bound of one."""
    matrices = [cut_parameter(f"m{i}", (8, 8))[0] for i in range(8)]
    shards = [(0, 0), (1, 32), (2, 0), (3, 32)]  # rank, first element
    layouts = tuple(
        MatrixLayout(m, tuple(Fragment(rank, first, 32, buffer, -first) for rank, first in shards))
        for buffer, m in enumerate(matrices)
    )
    plan = OwnershipPlan(Layout("dtensor", 4, layouts), tuple(i % 4 for i in range(8)))
    buckets = make_buckets(plan, range(8), 64)
    assert [sorted(plan.owners[i] for i in b.matrices) for b in buckets] == [[0, 1, 2, 3]] * 2
