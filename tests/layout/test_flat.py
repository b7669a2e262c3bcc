from __future__ import annotations

import random

import pytest
import torch

from muon_dist.errors import LayoutError
from muon_dist.layout import FlatGroup, PlacedParameter, cut_parameter, flat_layout, view
from tests.distributed import run_ranks
from tests.layout.sharded import round_trip


def example(world: int, seed: int) -> tuple[list[FlatGroup], list[list[torch.Tensor]], dict[str, torch.Tensor]]:
    """Groups of odd shapes, experts, heads and transposed cuts, with gaps between parameters; their shards."""
    rng = random.Random(seed)
    kinds = [((7, 5), {}), ((3, 4, 5), {}), ((6, 4), {"heads": 3}), ((4, 9), {"sizes": (3, 3, 3), "transposed": True}),
             ((1, 3), {}), ((11, 2), {"sizes": (4, 7)})]  # fmt: skip
    groups, shards, wholes = [], [], {}
    for g in range(2):
        placed, pieces, at = [], [], 0
        for k, (shape, cut) in enumerate(rng.sample(kinds, len(kinds))):
            name = f"g{g}.p{k}"
            numel = torch.Size(shape).numel()
            gap = rng.choice([0, 0, 3])
            placed.append(PlacedParameter(name, numel, at + gap, cut_parameter(name, shape, **cut)))
            wholes[name] = torch.randint(1, 1000, (numel,), generator=torch.Generator().manual_seed(seed + k)).float()
            pieces += [torch.full((gap,), -7.0), wholes[name]]
            at += gap + numel
        partition = -(-(at + 2) // world)
        flat = torch.cat([*pieces, torch.full((partition * world - at,), -7.0)])
        groups.append(FlatGroup(tuple(placed), partition))
        shards.append([piece.clone() for piece in flat.split(partition)])
    return groups, shards, wholes


@pytest.mark.parametrize("world", [1, 2, 3, 5, 64])
def test_every_element_stands_where_the_fragments_say(world):
    groups, shards, wholes = example(world, seed=world)
    layout = flat_layout(groups, world)
    assert layout.phases == ((0,), (1,)) and layout.complete_gradients
    for m in layout.matrices:
        wanted = view(wholes[m.matrix.parameter], m.matrix.block).contiguous()
        for f in m.fragments:
            assert torch.equal(view(shards[f.buffer][f.rank], f.local), view(wanted, f.block))


def test_a_matrix_lies_whole_on_one_rank_or_straddles():
    matrices = [cut_parameter(name, (4, 5)) for name in "abc"]
    group = FlatGroup(tuple(PlacedParameter(m[0].name, 20, 20 * i, m) for i, m in enumerate(matrices)), 30)
    a, b, c = flat_layout([group], 2).matrices
    assert [f.rank for f in a.fragments] == [0] and [f.rank for f in c.fragments] == [1]
    assert [(f.rank, f.block.start, f.length) for f in b.fragments] == [(0, 0, 10), (1, 10, 10)]


def test_groups_stepped_together_are_one_phase():
    groups, _, _ = example(2, seed=0)
    assert flat_layout(groups, 2, together=True).phases == ((0, 1),)


@pytest.mark.parametrize(("offsets", "partition"), [((0, 19), 40), ((0, 20), 19)])
def test_overlap_and_overrun_are_refused(offsets, partition):
    parameters = tuple(PlacedParameter(n, 20, o, cut_parameter(n, (4, 5))) for n, o in zip("ab", offsets, strict=True))
    with pytest.raises(LayoutError, match="overlaps its neighbour"):
        flat_layout([FlatGroup(parameters, partition)], 2)


def _round_trip(world: int, seed: int, policy: str, together: bool) -> int:
    groups, shards, wholes = example(world, seed)
    return round_trip(flat_layout(groups, world, together=together), shards, wholes, policy)


@pytest.mark.parametrize("policy", ["balanced", "local", "round_robin"])
@pytest.mark.parametrize("world", [2, 4])
def test_integers_move_bit_exactly(world, policy):
    groups, _, _ = example(world, 3)
    owned = run_ranks(_round_trip, world, world, 3, policy, policy == "balanced")
    assert sum(owned) == sum(len(p.matrices) for g in groups for p in g.parameters)
