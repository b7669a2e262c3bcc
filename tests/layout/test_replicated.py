from __future__ import annotations

import pytest
import torch

from muon_dist.layout import cut_parameter, replicated_layout
from tests.distributed import run_ranks
from tests.layout.sharded import round_trip

SHAPES = [(3, 5), (4, 4), (5, 3), (4, 4), (2, 9), (7, 1), (4, 4), (9, 9), (30, 4), (1, 1)]


def move(world: int, policy: str) -> int:
    names = [f"m{i}" for i in range(len(SHAPES))]
    layout = replicated_layout([cut_parameter(n, s) for n, s in zip(names, SHAPES, strict=True)], world)
    wholes = {
        n: torch.arange(m * k, dtype=torch.float32) + 100 * i
        for i, (n, (m, k)) in enumerate(zip(names, SHAPES, strict=True))
    }
    shards = [[wholes[n].view(s).clone() for _ in range(world)] for n, s in zip(names, SHAPES, strict=True)]
    return round_trip(layout, shards, wholes, policy)


@pytest.mark.each_choice
@pytest.mark.parametrize("policy", ["balanced", "round_robin"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_broadcast_updates_arrive_where_they_belong(world, policy):
    """Whole numbers, bit for bit; the largest matrix has a bucket alone, in which other ranks own nothing."""
    assert sum(run_ranks(move, world, world, policy)) == len(SHAPES)
