"""Which cases of a test with several parameters run unless slow tests are asked for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import pytest

Case = Mapping[str, Hashable]


def each_choice(cases: Sequence[Case]) -> list[int]:
    """Indices of cases in which each value of each parameter occurs at least once ("each choice" coverage).

    Greedy: the case with most values that have not occurred comes next, the first of equals.

    Args:
        cases: parameter -> value, of each case.
    """
    missing = {pair for case in cases for pair in case.items()}
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(missing & cases[i].items()))
        chosen.append(best)
        missing -= cases[best].items()
    return sorted(chosen)


def mark_the_others_slow(items: Iterable[Any]) -> None:
    """Mark as slow what `each_choice` leaves out of the cases of each test that is marked `each_choice`.

    Cases that are marked as slow already count for nothing.
    """
    functions: dict[tuple[Any, str], list[Any]] = {}
    for item in items:
        if item.get_closest_marker("each_choice") is not None and item.get_closest_marker("slow") is None:
            functions.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    for cases in functions.values():
        chosen = set(
            each_choice([{name: str(value) for name, value in case.callspec.params.items()} for case in cases])
        )
        for number, case in enumerate(cases):
            if number not in chosen:
                case.add_marker(pytest.mark.slow)
