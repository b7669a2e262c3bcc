from __future__ import annotations

import random

import pytest
import torch

from muon_dist.errors import LayoutError
from muon_dist.layout import PlacedParameter, cut_parameter, per_parameter_layout, view
from muon_dist.layout.per_parameter import slice_length
from tests.distributed import run_ranks
from tests.layout.sharded import round_trip


def example(world: int, seed: int) -> tuple[list[list[PlacedParameter]], list[list[torch.Tensor]], dict]:
    """Sub-groups of odd shapes, each parameter padded and split over all ranks; their shards."""
    rng = random.Random(seed)
    kinds = [((7, 5), {}), ((3, 4, 5), {}), ((6, 4), {"heads": 3}), ((4, 9), {"sizes": (3, 3, 3), "transposed": True}),
             ((1, 3), {}), ((11, 2), {"sizes": (4, 7)})]  # fmt: skip
    sub_groups, shards, wholes = [], [], {}
    for g in range(3):
        placed, columns, at = [], [[] for _ in range(world)], 0
        for k, (shape, cut) in enumerate(rng.sample(kinds, 4)):
            name = f"s{g}.p{k}"
            numel = torch.Size(shape).numel()
            size = slice_length(numel, world)
            placed.append(PlacedParameter(name, numel, at, cut_parameter(name, shape, **cut)))
            wholes[name] = torch.randint(1, 1000, (numel,), generator=torch.Generator().manual_seed(seed + k)).float()
            padded = torch.cat([wholes[name], torch.full((size * world - numel,), -7.0)])
            for rank, piece in enumerate(padded.split(size)):
                columns[rank].append(piece)
            at += size
        sub_groups.append(placed)
        shards.append([torch.cat(c) for c in columns])
    return sub_groups, shards, wholes


@pytest.mark.parametrize("world", [1, 2, 3, 8, 50])
def test_every_element_stands_where_the_fragments_say(world):
    sub_groups, shards, wholes = example(world, seed=world)
    layout = per_parameter_layout(sub_groups, world)
    assert layout.phases == ((0,), (1,), (2,)) and layout.complete_gradients
    for m in layout.matrices:
        wanted = view(wholes[m.matrix.parameter], m.matrix.block).contiguous()
        for f in m.fragments:
            assert torch.equal(view(shards[f.buffer][f.rank], f.local), view(wanted, f.block))


def test_a_vector_of_three_on_eight_ranks_lies_on_the_first_three():
    (m,) = per_parameter_layout([[PlacedParameter("v", 3, 0, cut_parameter("v", (1, 3)))]], 8).matrices
    assert [(f.rank, f.block.start, f.length) for f in m.fragments] == [(0, 0, 1), (1, 1, 1), (2, 2, 1)]


def test_overlapping_slices_are_refused():
    placed = [PlacedParameter(n, 20, o, cut_parameter(n, (4, 5))) for n, o in (("a", 0), ("b", 9))]
    with pytest.raises(LayoutError, match="the slice of b at 9 overlaps its neighbour, which ends at 10"):
        per_parameter_layout([placed], 2)


def _round_trip(world: int, seed: int, policy: str) -> int:
    sub_groups, shards, wholes = example(world, seed)
    return round_trip(per_parameter_layout(sub_groups, world), shards, wholes, policy)


@pytest.mark.parametrize("policy", ["balanced", "round_robin"])
@pytest.mark.parametrize("world", [2, 4])
def test_integers_move_bit_exactly(world, policy):
    sub_groups, _, _ = example(world, 5)
    owned = run_ranks(_round_trip, world, world, 5, policy)
    assert sum(owned) == sum(len(p.matrices) for g in sub_groups for p in g)
