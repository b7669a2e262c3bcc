from __future__ import annotations

import random

import pytest
import torch

from muon_dist.errors import LayoutError
from muon_dist.layout import Block, Fragment, Layout, Matrix, MatrixLayout, cut_parameter, fragments_of_run, view
from muon_dist.layout.fragments import Fragments
from muon_dist.layout.replicated import replicated_layout


def block_of(parameter: torch.Tensor, m: Matrix) -> torch.Tensor:
    return view(parameter, m.block)


@pytest.mark.parametrize(
    ("shape", "options", "blocks"),
    [
        ((6, 4), {}, [slice(0, 6)]),
        ((6, 4), {"heads": 3}, [slice(0, 2), slice(2, 4), slice(4, 6)]),
        ((6, 4), {"sizes": [1, 5]}, [slice(0, 1), slice(1, 6)]),
    ],
)
def test_cut_along_rows(shape, options, blocks):
    parameter = torch.arange(24.0).view(shape)
    matrices = cut_parameter("w", shape, **options)
    assert [block_of(parameter, m).tolist() for m in matrices] == [parameter[b].tolist() for b in blocks]


def test_cut_along_columns_when_stored_transposed():
    parameter = torch.arange(4 * 9.0).view(4, 9)  # GPT-2's c_attn: (in, 3 out)
    q, k, v = cut_parameter("c_attn", (4, 9), sizes=(3, 3, 3), transposed=True)
    assert torch.equal(block_of(parameter, k), parameter[:, 3:6])
    assert q.fan == (3, 4) and v.name == "c_attn[2]" and v.parameter == "c_attn"


def test_experts_are_a_batch_and_may_be_cut_further():
    parameter = torch.arange(3 * 4 * 5.0).view(3, 4, 5)
    experts = cut_parameter("e", (3, 4, 5))
    assert all(torch.equal(block_of(parameter, m), parameter[i]) for i, m in enumerate(experts))
    halves = cut_parameter("e", (3, 4, 5), heads=2)
    assert [m.name for m in halves] == [f"e[{i}]" for i in range(6)]
    assert torch.equal(block_of(parameter, halves[3]), parameter[1, 2:])


def test_convolutions_are_flattened():
    (m,) = cut_parameter("conv", (8, 3, 5, 5))
    assert (m.rows, m.cols) == (8, 75)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((7,), {}, "only matrices can be orthogonalized"),
        ((6, 4), {"heads": 4}, "4 heads do not divide its output axis of 6"),
        ((6, 4), {"sizes": [2, 3]}, "does not add up to its output axis of 6"),
    ],
)
def test_cuts_that_do_not_fit(shape, options, message):
    with pytest.raises(LayoutError, match=message):
        cut_parameter("w", shape, **options)


def test_every_run_of_a_parameter_is_found_again_in_its_matrices():
    """Random cuts of a parameter into runs on several ranks: the fragments rebuild every matrix."""
    rng = random.Random(0)
    for _ in range(200):
        shape = rng.choice([(6, 8), (3, 4, 6), (8, 6), (1, 12), (12, 1)])
        heads = rng.choice([None, 1, 2, 3])
        transposed = rng.random() < 0.5
        out = shape[-1] if transposed else shape[-2]
        if heads and out % heads:
            heads = None
        parameter = torch.arange(float(torch.Size(shape).numel())).view(shape)
        flat = parameter.view(-1)
        ranks = rng.randint(1, 5)
        cuts = sorted(rng.randint(0, flat.numel()) for _ in range(ranks - 1))
        runs = list(zip([0, *cuts], [*cuts, flat.numel()], strict=True))
        padding = rng.randint(0, 3)
        buffers = [torch.cat([torch.full((padding,), -1.0), flat[a:b]]) for a, b in runs]
        for m in cut_parameter("w", shape, heads=heads, transposed=transposed):
            fragments = [f for r, (a, b) in enumerate(runs) for f in fragments_of_run(m, r, a, b - a, 0, padding)]
            layout = MatrixLayout(m, tuple(fragments))  # checks the cover
            rebuilt = torch.full((m.numel,), -7.0)
            sources = layout.sources(owner=rng.randrange(ranks))
            for f in sources:
                view(rebuilt, f.block).copy_(view(buffers[f.rank], f.local))
            assert sum(f.length for f in sources) == m.numel
            assert torch.equal(rebuilt.view(m.rows, m.cols), block_of(parameter, m))


def matrix(numel: int = 12) -> Matrix:
    return Matrix("w", Block(0, numel // 4, 4, 4))


@pytest.mark.parametrize(
    ("fragments", "message"),
    [
        ([Fragment.run(0, 0, 5, 0, 0), Fragment.run(1, 6, 6, 0, 6)], "no rank holds elements 5..6"),
        ([Fragment.run(0, 0, 11, 0, 0)], "no rank holds elements 11..12"),
        ([Fragment.run(0, 0, 13, 0, 0)], "claims elements 0..13 of a matrix of 12"),
        ([Fragment.run(0, 0, 8, 0, 0), Fragment.run(0, 4, 8, 0, 4)], "rank 0 holds element 4 twice"),
        ([Fragment.run(0, 0, 12, 0, 0), Fragment.run(1, 0, 0, 0, 0)], "claims elements 0..0"),
    ],
)
def test_a_layout_that_does_not_cover_is_refused(fragments, message):
    with pytest.raises(LayoutError, match=message):
        MatrixLayout(matrix(), tuple(fragments))


def test_layout_checks_ranks_names_and_buffers():
    whole = MatrixLayout(matrix(), (Fragment.run(2, 0, 12, 0, 0),))
    with pytest.raises(LayoutError, match="rank 2 of a world of 2"):
        Layout("flat", 2, (whole,))
    with pytest.raises(LayoutError, match="w is in the layout twice"):
        Layout("flat", 3, (whole, whole))
    two = MatrixLayout(matrix(), (Fragment.run(0, 0, 6, 0, 0), Fragment.run(1, 6, 6, 1, 6)))
    with pytest.raises(LayoutError, match="different buffers"):
        Layout("flat", 2, (two,))


def test_sources_prefer_the_owner_and_do_not_overlap():
    """HSDP: two copies of two shards. The owner's own half, and the other half from one rank only."""
    copies = MatrixLayout(
        matrix(),
        (
            Fragment.run(0, 0, 6, 0, 0),
            Fragment.run(1, 6, 6, 0, 6),
            Fragment.run(2, 0, 6, 0, 0),
            Fragment.run(3, 6, 6, 0, 6),
        ),
    )
    assert [(f.rank, f.block.start, f.length) for f in copies.sources(3)] == [(0, 0, 6), (3, 6, 6)]
    everywhere = replicated_layout([[matrix()]], 3).matrices[0]
    assert [(f.rank, f.length) for f in everywhere.sources(2)] == [(2, 12)]


def test_sources_stay_in_the_owners_domain():
    """HSDP with each copy on a node of its own: what owner 3 gathers comes from rank 2, not from the first copy."""
    copies = MatrixLayout(matrix(), tuple(Fragment.run(rank, 6 * (rank % 2), 6, 0, 0) for rank in range(6)))
    assert [f.rank for f in copies.sources(3, (0, 0, 1, 1, 2, 2))] == [2, 3]
    assert [f.rank for f in copies.sources(3)] == [0, 3]
    with pytest.raises(LayoutError, match="2 domains for 6 ranks"):
        Layout("dtensor", 6, (copies,), domains=(0, 1))


def test_fragments_are_a_sequence_that_compares_by_value():
    rows = [Fragment.run(r, 4 * r, 4, 0, 0) for r in range(6)]
    fragments = Fragments.of(rows)
    assert list(fragments) == rows and fragments[2] == rows[2] and list(fragments[1:3]) == rows[1:3]
    assert fragments == Fragments.of(rows) and hash(fragments) == hash(Fragments.of(rows))
    assert fragments != Fragments.of(rows[:5]) and list(fragments.on(3)) == [rows[3]]
    other = [*rows[:5], Fragment.run(5, 20, 4, 0, 20 - 21)]
    assert repr(Fragments.of(other)) != repr(fragments), "ranks compare plans by this"
