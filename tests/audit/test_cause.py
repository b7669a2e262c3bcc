"""Differences and named causes."""

from __future__ import annotations

import math

import pytest
import torch

from muon_dist.audit.cause import Cause, Difference, Direction, Factor, explain, size_of


def test_difference_of_a_multiple_and_of_another_direction() -> None:
    want = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    small = Difference.between(want / 40.8, want)
    assert small.factor == pytest.approx(1 / 40.8, rel=1e-6) and small.angle < 1e-6
    assert size_of(small) == "40.8 times too small"
    assert size_of(Difference.between(-want, want)) == "update points the wrong way"
    assert size_of(Difference.between(want * 0, want)) == "no update"
    assert Difference.between(want * math.nan, want).error == math.inf
    # the same update against three times what was wanted
    direct = Difference.between(want + 0.1, 3 * want)
    indirect = Difference.between(want + 0.1, want).against(3.0)
    assert indirect.error == pytest.approx(direct.error) and indirect.factor == pytest.approx(direct.factor)


def test_a_cause_is_named_by_its_factor_or_by_its_direction() -> None:
    want = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    clip = Factor(Cause("clipped_update", "clipped after orthogonalization"), 1 / 40.8)
    other = Direction(Cause("by_rows", "by rows"), lambda: want / want.norm(dim=1, keepdim=True))
    found = explain(want / 40.8, want, factors=[clip], directions=[other], tolerance=1e-3)
    assert found.sentence == "40.8 times too small: clipped after orthogonalization"
    found = explain(other.update() / 40.8, want, factors=[clip], directions=[other], tolerance=1e-3)
    assert [c.name for c in found.causes] == ["by_rows", "clipped_update"]
    assert explain(want * (1 + 1e-4), want, tolerance=1e-3).right
    assert not explain(want + 1, want, directions=[other], tolerance=1e-3).causes
