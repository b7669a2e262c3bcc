"""A step stays one that a reader can follow. Before the redesign: 59 functions, 14 files, 61 returns."""

from __future__ import annotations

import pytest

from tests.distributed import run_ranks
from tests.trip import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_can_be_followed(layout):
    trip = run_ranks(LAYOUTS[layout], 2)[0]
    assert trip.functions <= 30, trip.calls
    assert trip.files <= 9, trip.calls
    assert trip.returns <= 30, trip.calls
