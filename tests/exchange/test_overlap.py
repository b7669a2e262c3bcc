from __future__ import annotations

import pytest

from muon_dist.exchange.overlap import STAGES, pipeline


@pytest.mark.parametrize("buckets", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("overlap", [True, False])
def test_every_bucket_passes_every_stage_once_in_order(buckets, overlap):
    taken = list(pipeline(buckets, overlap))
    assert len(taken) == len(STAGES) * buckets
    for bucket in range(buckets):
        assert tuple(stage for stage, b in taken if b == bucket) == STAGES
    for stage in STAGES:
        assert [b for s, b in taken if s == stage] == list(range(buckets))


def test_what_is_under_way_while_a_bucket_is_orthogonalized():
    """The gather of the next and the scatter of the last, and never more than two messages."""
    waits_for = {"gather": "stack", "scatter": "update"}
    under_way: set[tuple[str, int]] = set()
    seen = {}
    for stage, bucket in pipeline(5, True):
        under_way -= {(start, b) for start, b in under_way if waits_for[start] == stage and b == bucket}
        if stage == "orthogonalize":
            seen[bucket] = set(under_way)
        if stage in waits_for:
            under_way.add((stage, bucket))
        assert len(under_way) <= 2
    assert seen[2] == {("gather", 3), ("scatter", 1)}
    assert seen[0] == {("gather", 1)} and seen[4] == {("scatter", 3)}
    assert not under_way
