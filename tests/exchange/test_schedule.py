from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from muon_dist.errors import LayoutError
from muon_dist.exchange.schedule import (
    Bucket,
    bytes_sent,
    gather_parts,
    largest_end,
    make_buckets,
    pipelined_elements,
    relayed_parts,
    scatter_parts,
)
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


def messages(plan: OwnershipPlan, bucket: Bucket, way: Callable[..., Any]) -> dict[tuple[int, int], list[Any]]:
    """Parts by (sender, receiver) as the senders see them, which are those that the receivers see."""
    sent: dict[tuple[int, int], list[Any]] = {}
    received: dict[tuple[int, int], list[Any]] = {}
    for rank in range(plan.layout.world_size):
        sends, receives = way(plan, bucket, rank)
        for parts, seen, other in ((sends, sent, way is scatter_parts), (receives, received, way is gather_parts)):
            peers = [f.rank if other else plan.owners[i] for i, f in parts]
            assert peers == sorted(peers) and rank not in peers
            for peer, part in zip(peers, parts, strict=True):
                seen.setdefault((rank, peer) if seen is sent else (peer, rank), []).append(part)
    assert sent == received
    return sent


def volumes(plan: OwnershipPlan, bucket: Bucket, way: Callable[..., Any]) -> dict[tuple[int, int], int]:
    """Elements by (sender, receiver)."""
    return {pair: sum(f.length for _, f in parts) for pair, parts in messages(plan, bucket, way).items()}


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
            for way in (gather_parts, scatter_parts):
                for rank in range(world):
                    sends, receives = (sum(f.length for _, f in parts) for parts in way(plan, b, rank))
                    assert sends <= max(bound, largest) >= receives
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
        gather, scatter = (volumes(plan, b, way) for way in (gather_parts, scatter_parts))
        assert b.gathers == bool(gather) and b.scatters == bool(scatter)
        # exclusive fragments: what came in goes back
        assert scatter == {(owner, source): n for (source, owner), n in gather.items()}
        total += 4 * sum(gather.values()) + 2 * sum(scatter.values())
    assert total == sum(bytes_sent(plan, buckets, r, 4, 2) for r in range(world))


def test_replicated_gathers_nothing_and_broadcasts():
    matrices = [cut_parameter(f"m{i}", (4, 6))[0] for i in range(4)]
    plan = assign_owners(replicated_layout([[m] for m in matrices], 4))
    (bucket,) = make_buckets(plan, [0, 1, 2, 3], 10**9)
    assert not bucket.gathers and not bucket.scatters
    assert bucket.relay == dict.fromkeys(range(4), 24)
    assert [bytes_sent(plan, (bucket,), r, 4, 4, copies=4) for r in range(4)] == [4 * 24 * 3] * 4


def test_a_broadcast_bucket_gives_every_owner_work():
    """A bound on what all owners send together left 16 ranks buckets of one owner each."""
    matrices = [cut_parameter(f"m{i}", (8, 8))[0] for i in range(64)]
    plan = assign_owners(replicated_layout([[m] for m in matrices], 16))
    buckets = make_buckets(plan, range(64), 64)
    assert [sorted(plan.owners[i] for i in b.matrices) for b in buckets] == [list(range(16))] * 4


def two_copies_of_two_shards(**more: Any) -> OwnershipPlan:
    """Eight matrices 8 x 8; rank 0 and 2 hold the first half of each, 1 and 3 the second."""
    matrices = [cut_parameter(f"m{i}", (8, 8))[0] for i in range(8)]
    shards = [(0, 0), (1, 32), (2, 0), (3, 32)]  # rank, first element
    layouts = tuple(
        MatrixLayout(m, tuple(Fragment.run(rank, first, 32, buffer, 0) for rank, first in shards))
        for buffer, m in enumerate(matrices)
    )
    return OwnershipPlan(Layout("dtensor", 4, layouts, **more), tuple(i % 4 for i in range(8)))


def test_copies_of_shards_do_not_leave_owners_waiting():
    """Without columns an owner sends 1.5 matrices, which alone exceeded a bound of one."""
    plan = two_copies_of_two_shards()
    buckets = make_buckets(plan, range(8), 64)
    assert [sorted(plan.owners[i] for i in b.matrices) for b in buckets] == [[0, 1, 2, 3]] * 2


def test_an_update_goes_to_the_owners_own_copy_and_along_the_columns():
    """An owner sent its update to every copy itself: with 64 copies of 70B one matrix took 30 GB there."""
    plan = two_copies_of_two_shards(domains=(0, 0, 1, 1), columns=(0, 1, 0, 1))
    (bucket,) = make_buckets(plan, range(8), 10**9)
    within = {(0, 1): 64, (1, 0): 64, (2, 3): 64, (3, 2): 64}
    assert volumes(plan, bucket, gather_parts) == volumes(plan, bucket, scatter_parts) == within
    assert bucket.relay == dict.fromkeys(range(4), 4 * 32)  # its half of the four matrices of its domain
    assert [i for i, _ in relayed_parts(plan, bucket, 0, [2])] == [2, 6, 3, 7]
    assert [bytes_sent(plan, (bucket,), r, 4, 2, copies=2) for r in range(4)] == [4 * 64 + 2 * 64 + 2 * 128] * 4
    assert largest_end(plan, 0) == 64
    assert largest_end(two_copies_of_two_shards(), 0) == 96


def test_buckets_that_overlap_are_smaller_where_something_moves():
    big = [cut_parameter(f"m{i}", (2048, 1024))[0] for i in range(16)]  # 2 Mi elements each, eight on each rank
    sliced = per_parameter_layout(
        [[PlacedParameter(m.name, m.numel, i * m.numel // 2, (m,)) for i, m in enumerate(big)]], 2
    )
    everything = range(16)
    assert pipelined_elements(assign_owners(sliced), everything, 10**9) == 2**21
    assert pipelined_elements(assign_owners(sliced), range(4), 10**9) == 2**20, "no message below 4 MB"
    assert pipelined_elements(assign_owners(sliced), everything, 1000) == 1000, "never above the bound on memory"
    alone = tuple(MatrixLayout(m, (Fragment.run(i % 2, 0, m.numel, i, 0),)) for i, m in enumerate(big))
    assert pipelined_elements(assign_owners(Layout("flat", 2, alone)), everything, 10**9) == 10**9


def test_fragments_that_differ_along_a_column_are_not_relayed():
    (m,) = cut_parameter("m", (8, 8))
    uneven = [(0, 0, 32), (1, 32, 32), (2, 0, 16), (3, 16, 48)]  # rank, first element, length
    layout = MatrixLayout(m, tuple(Fragment.run(rank, first, n, 0, 0) for rank, first, n in uneven))
    grid = {"domains": (0, 0, 1, 1), "columns": (0, 1, 0, 1)}
    assert not Layout("dtensor", 4, (layout,), **grid).relayed(0)
    whole = MatrixLayout(m, tuple(Fragment.run(rank, 0, 64, 0, 0) for rank in range(4)))
    assert Layout("dtensor", 4, (whole,), **grid).relayed(0)
    with pytest.raises(LayoutError, match="4 columns and 0 domains for 4 ranks"):
        Layout("dtensor", 4, (whole,), columns=(0, 1, 0, 1))
