from __future__ import annotations

import pytest
import torch

from muon_dist.errors import LayoutError
from muon_dist.layout import Layout, ShardedParameter, cut_parameter, dtensor_layout, view
from muon_dist.ownership import assign_owners
from tests.distributed import run_ranks
from tests.layout.sharded import round_trip

KINDS = [((7, 5), {}), ((3, 4, 5), {}), ((6, 4), {"heads": 3}), ((4, 9), {"sizes": (3, 3, 3), "transposed": True}),
         ((1, 3), {}), ((11, 2), {"sizes": (4, 7)})]  # fmt: skip


def example(mesh_shape: tuple[int, ...], cuts: tuple[int | None, ...]) -> tuple[list[ShardedParameter], list, dict]:
    """Odd shapes on a mesh whose ranks run backwards, and their shards as torch.chunk cuts them."""
    world = torch.Size(mesh_shape).numel()
    ranks = tuple(reversed(range(world)))
    mesh = torch.tensor(ranks).view(mesh_shape)
    parameters, shards, wholes = [], [], {}
    for k, (shape, cut) in enumerate(KINDS):
        name = f"p{k}"
        parameters.append(ShardedParameter(name, shape, mesh_shape, ranks, cuts, cut_parameter(name, shape, **cut)))
        whole = torch.randint(1, 1000, shape, generator=torch.Generator().manual_seed(k)).float()
        wholes[name] = whole.reshape(-1)
        held: list[torch.Tensor] = [whole] * world
        if 0 in cuts:
            axis = cuts.index(0)
            chunks = list(whole.chunk(mesh_shape[axis]))
            chunks += [whole[:0]] * (mesh_shape[axis] - len(chunks))
            for place in torch.cartesian_prod(*(torch.arange(n) for n in mesh_shape)).view(world, -1).tolist():
                held[int(mesh[tuple(place)])] = chunks[place[axis]].clone()
        shards.append(held)
    return parameters, shards, wholes


MESHES = [((1,), (0,)), ((2,), (0,)), ((3,), (0,)), ((4,), (0,)), ((9,), (0,)), ((3,), (None,)), ((2, 2), (None, 0)),
          ((2, 3), (0, None)), ((2, 3), (None, None)), ((2, 2, 3), (None, 0, None))]  # fmt: skip


def layout_of(parameters: list[ShardedParameter]) -> Layout:
    return dtensor_layout(parameters, len(parameters[0].ranks))


@pytest.mark.parametrize(("mesh_shape", "cuts"), MESHES)
def test_every_element_stands_where_the_fragments_say(mesh_shape, cuts):
    parameters, shards, wholes = example(mesh_shape, cuts)
    layout = layout_of(parameters)
    held = [0] * layout.world_size
    for m in layout.matrices:
        wanted = view(wholes[m.matrix.parameter], m.matrix.block).contiguous()
        for f in m.fragments:
            held[f.rank] += f.length
            shard = shards[f.buffer][f.rank].contiguous()
            assert torch.equal(view(shard, f.local), view(wanted, f.block))
    assert held == [sum(s[r].numel() for s in shards) for r in range(layout.world_size)]


@pytest.mark.parametrize(("mesh_shape", "cuts"), MESHES)
@pytest.mark.parametrize("policy", ["balanced", "round_robin", "local"])
def test_sources_cover_each_matrix_once_the_owners_own_first(mesh_shape, cuts, policy):
    parameters, _, _ = example(mesh_shape, cuts)
    layout = layout_of(parameters)
    plan = assign_owners(layout, policy=policy)
    for m, owner, sources in zip(layout.matrices, plan.owners, plan.sources, strict=True):
        assert sum(f.length for f in sources) == m.matrix.numel
        assert sum(f.length for f in sources if f.rank == owner) == m.held(owner)


def test_eighteen_rows_on_eight_ranks_leave_two_empty():
    """torch.chunk cuts 18 rows into six threes: dion's all-to-all hung on the two ranks without rows."""
    p = ShardedParameter("w", (18, 4), (8,), tuple(range(8)), (0,), cut_parameter("w", (18, 4)))
    (m,) = dtensor_layout([p], 8).matrices
    assert [(f.rank, f.block.start, f.length) for f in m.fragments] == [(r, 12 * r, 12) for r in range(6)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": (2, None)}, r"w of shape \(4, 4\) has no axis 2 to cut"),
        ({"cuts": ((0, 2), (0, 2))}, r"w: one axis is cut as .*torch does not say which elements a rank holds"),
        ({"cuts": (0, (0, 2))}, r"w: one axis is cut as .*torch does not say which elements a rank holds"),
        ({"cuts": (0,)}, r"w: 4 ranks and 1 placements on a mesh of \(2, 2\)"),
        ({"ranks": (0, 1, 2)}, r"w: 3 ranks and 2 placements"),
        ({"ranks": (0, 1, 2, 2)}, r"w: a rank is in the mesh \(0, 1, 2, 2\) twice"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, message):
    given = {"name": "w", "shape": (4, 4), "mesh_shape": (2, 2), "ranks": (0, 1, 2, 3), "cuts": (None, 0),
             "matrices": cut_parameter("w", (4, 4))}  # fmt: skip
    with pytest.raises(LayoutError, match=message):
        ShardedParameter(**(given | change))


def _round_trip(mesh_shape: tuple[int, ...]) -> int:
    parameters, shards, wholes = example(mesh_shape, (0,))
    return round_trip(layout_of(parameters), shards, wholes, "round_robin")


@pytest.mark.parametrize("mesh_shape", [(2,), (4,)])
def test_integers_move_bit_exactly(mesh_shape):
    parameters, _, _ = example(mesh_shape, (0,))
    assert sum(run_ranks(_round_trip, mesh_shape[0], mesh_shape)) == sum(len(p.matrices) for p in parameters)
