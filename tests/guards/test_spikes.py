"""A loss spike: all ranks judge it the same, also after a resume."""

from __future__ import annotations

import json
import math
import random

import pytest

from muon_dist.errors import ConfigError
from muon_dist.guards.spikes import SpikeDetector


def losses(count: int, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [4.0 - 0.002 * i + 0.05 * noise.gauss(0, 1) for i in range(count)]


def test_a_spike_is_found_and_stays_out_of_the_window() -> None:
    detector = SpikeDetector(window=32)
    assert not any(detector.is_spike(v) for v in losses(40))
    limit = detector.limit()
    assert limit is not None and 4.0 < limit < 4.5
    assert detector.is_spike(limit + 1e-9) and detector.limit() == limit
    assert not detector.is_spike(limit - 1e-9) and not detector.is_spike(0.0)


def test_the_limit_is_mean_and_six_standard_deviations() -> None:
    detector = SpikeDetector(window=4)
    for v in (1.0, 2.0, 3.0, 4.0):
        detector.is_spike(v)
    assert detector.limit() == pytest.approx(2.5 + 6 * math.sqrt(5 / 3))


def test_nothing_is_judged_before_half_a_window() -> None:
    detector = SpikeDetector(window=20)
    assert not any(detector.is_spike(v) for v in [1.0] * 9 + [100.0])


def test_a_new_level_is_accepted_after_five() -> None:
    detector = SpikeDetector(window=16)
    for v in losses(16):
        detector.is_spike(v)
    assert [detector.is_spike(9.0 + 0.01 * i) for i in range(7)] == [True] * 4 + [False] * 3


def test_a_resumed_detector_decides_alike() -> None:
    values = losses(300, seed=3)
    for at in (97, 150, 151, 260):
        values[at] = 30.0
    whole = SpikeDetector(window=64)
    expected = [whole.is_spike(v) for v in values]
    assert sum(expected) == 4
    for cut in range(0, 300, 23):
        first, second = SpikeDetector(window=64), SpikeDetector(window=64)
        found = [first.is_spike(v) for v in values[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + [second.is_spike(v) for v in values[cut:]] == expected


def test_a_loss_that_is_not_finite_is_somebody_elses() -> None:
    detector = SpikeDetector(window=4)
    for v in (1.0, 1.1, 1.2, 1.3):
        detector.is_spike(v)
    assert not detector.is_spike(math.nan) and not detector.is_spike(math.inf)
    assert detector.state_dict()["losses"] == [1.0, 1.1, 1.2, 1.3]


@pytest.mark.parametrize("arguments", [{"window": 3}, {"sigmas": 0.0}, {"sigmas": math.nan}])
def test_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="spike guard"):
        SpikeDetector(**arguments)
