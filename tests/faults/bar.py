"""The bar: eighteen points, what each runs, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.faults import points_rest, points_runs, points_saves
from tests.faults.points_rest import look_up, run_tests
from tests.faults.table import Count, as_json


@dataclass(frozen=True)
class Point:
    """One point.

    Attributes:
        run: by profile ("ci", "slow", "full"): what is run. The suite runs "ci", its slow tests "slow".
        wanted: by profile: cases that there must be at least.
    """

    number: int
    name: str
    run: dict[str, Callable[[], Count]]
    wanted: dict[str, int]


PROFILES = ("ci", "slow", "full")


def _sweep(number: int, name: str, run: Callable[[int], Count], full: int, slow: int = 10, ci: int = 3) -> Point:
    """`run(count)`, by profile."""
    counts = dict(zip(PROFILES, (ci, min(slow, full), full), strict=True))
    return Point(number, name, {profile: partial(run, count) for profile, count in counts.items()}, counts)


def _tests(number: int, name: str, names: tuple[str, ...], more: Callable[[str], Count] | None = None) -> Point:
    """Below "full" they are only looked up, for the suite itself runs these tests."""

    def run(profile: str) -> Count:
        count = run_tests(names) if profile == "full" else look_up(names)
        if more is not None:
            count += more(profile)
        return count

    return Point(
        number, name, {profile: partial(run, profile) for profile in PROFILES}, dict.fromkeys(PROFILES, len(names))
    )


def _terminations() -> Count:
    """Twenty on forked ranks, and a run under torchrun that is killed, stopped and started again by it."""
    count = points_runs.terminations(20)
    count += run_tests(("tests/faults/test_restart.py",), "-m", "slow")
    return count


BAR = (
    _sweep(1, "kill -9 in a step: peers end, the resumed run is bit-identical", points_runs.kills, 50, slow=5, ci=1),
    Point(
        2,
        "kill -9 at the boundaries of a save: always a whole commit",
        {
            "ci": lambda: points_saves.boundaries(4),
            "slow": lambda: points_saves.boundaries(10),
            "full": lambda: points_saves.boundaries(None),
        },
        {"ci": 4, "slow": 10, "full": 30},
    ),
    _sweep(3, "a save of the same step killed: old or new", points_saves.resaves, 20),
    Point(
        4,
        "flipped bytes, truncations, missing files: found and named",
        {
            "ci": lambda: points_saves.damage(10, 10),
            "slow": lambda: points_saves.damage(10, 10),
            "full": lambda: points_saves.damage(200, 50),
        },
        {"ci": 20, "slow": 20, "full": 250},
    ),
    _sweep(5, "disk full: the commit before stays, the policy decides", points_saves.full_disks, 10),
    Point(
        6,
        "reshard: any layout and number of ranks to any other",
        {
            "ci": lambda: look_up(points_rest.RESHARD_POINTS),
            "slow": lambda: look_up(points_rest.RESHARD_POINTS),
            "full": lambda: run_tests(points_rest.RESHARD_SWEEP, "-m", "slow"),
        },
        {"ci": 1, "slow": 1, "full": 20},
    ),
    _tests(7, "every layout equals one process; Newton-Schulz counted", points_rest.REFERENCE),
    _sweep(8, "NaN or inf on one rank: nothing changes anywhere", points_rest.not_finite, 20),
    _sweep(9, "a finite loss spike: one decision, also after resume", points_runs.spikes, 10, slow=3, ci=2),
    Point(
        10,
        "a rank made differently: refused, the field named",
        {
            "ci": lambda: points_rest.mutations(points_rest.ONE_OF_EACH_FIELD),
            "slow": points_rest.mutations,
            "full": points_rest.mutations,
        },
        {"ci": 7, "slow": 12, "full": 12},
    ),
    _sweep(11, "a flipped bit in a copy: parameter and rank named", points_runs.flips, 100, slow=20, ci=6),
    _tests(12, "gradients missing: no hang, equal to the reference", points_rest.MISSING),
    _sweep(13, "SIGSTOP: rank, operation, bucket, step named in time", points_runs.stops, 10, slow=2, ci=1),
    Point(
        14,
        "SIGTERM to one rank: all commit one step, exact resume",
        {
            "ci": lambda: points_runs.terminations(1),
            "slow": lambda: points_runs.terminations(5),
            "full": _terminations,
        },
        {"ci": 1, "slow": 5, "full": 21},
    ),
    _tests(
        15,
        "damaged shards named; resume in mid-epoch exact",
        points_rest.DATA,
        lambda profile: points_rest.data_positions(20),
    ),
    _sweep(16, "a slow rank is named; no false alarm", points_runs.stragglers, 5, slow=1, ci=1),
    _tests(17, "bad input: message and exit code", points_rest.bad_input()),
    _tests(18, "hostile files: nothing executed, escaped, leaked", points_rest.HOSTILE),
)


def measure(point: Point, profile: str) -> dict[str, Any]:
    """Run a point; its row. An exception is a case that did not hold."""
    began = time.time()
    try:
        count = point.run[profile]()
    except Exception as error:
        count = Count()
        count.fail(f"{type(error).__name__}: {error}")
    return as_json(point.number, point.name, count, point.wanted[profile], time.time() - began)
