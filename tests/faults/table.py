"""Counts and the table of the bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Count:
    """The number of tried and passed cases of a point, and the failed ones."""

    tried: int = 0
    held: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, good: bool, what: str) -> None:
        """One case; `what` is kept when it did not hold."""
        self.tried += 1
        self.held += good
        if not good:
            self.failures.append(what)

    def fail(self, what: str) -> None:
        """A case that did not hold."""
        self.add(False, what)

    def __iadd__(self, other: Count) -> Count:
        self.tried += other.tried
        self.held += other.held
        self.failures += other.failures
        return self


def as_json(number: int, name: str, count: Count, wanted: int, seconds: float) -> dict[str, Any]:
    """A row: passed when at least `wanted` cases were tried and every one held."""
    return {
        "number": number,
        "name": name,
        "passed": count.held == count.tried >= wanted,
        "tried": count.tried,
        "held": count.held,
        "wanted": wanted,
        "seconds": round(seconds, 1),
        "failures": count.failures[:20],
    }


def render(points: Sequence[dict[str, Any]]) -> str:
    """The table, as Markdown."""
    lines = ["| # | point | held / tried | seconds | passed |", "|---|---|---|---|---|"]
    for p in points:
        passed = "yes" if p["passed"] else "**no**"
        lines.append(f"| {p['number']} | {p['name']} | {p['held']} / {p['tried']} | {p['seconds']} | {passed} |")
    total = sum(p["seconds"] for p in points)
    good = sum(p["passed"] for p in points)
    return "\n".join([*lines, "", f"{good} of {len(points)} points in {total:.0f} s"])
