"""Findings of a witness: kept, counted and shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.audit.cause import Cause, Difference, Kind, size_of


@dataclass
class Finding:
    """One cause at one matrix.

    Attributes:
        matrix: name of the parameter.
        cause: short and stable name, such as "by_shards".
        kind: "fault" or "choice".
        sentence: such as "update 39% off: orthogonalized by shards (2 blocks of rows)".
        first, last, count: first and last step with the cause, from 1, and the number of such steps.
        difference: the largest difference of the update from the asked one; NaN if not measured.
    """

    matrix: str
    cause: str
    kind: Kind
    sentence: str
    first: int
    last: int
    count: int
    difference: Difference


@dataclass(frozen=True)
class Seen:
    """One judged step of one matrix. noise: error only from the precision of the optimizer's Newton-Schulz."""

    step: int
    matrix: str
    difference: Difference
    noise: float
    causes: tuple[str, ...]


# Causes whose sentences already contain the numbers.
_COMPLETE = ("rate", "no_decay", "decay", "zero_gradient", "rests", "sgd", "adamw", "sign", "muon")


class Findings:
    """The findings of a witness: one per matrix and cause, with its first and last step and its largest difference."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, str], Finding] = {}

    def add(
        self, step: int, matrix: str, cause: Cause, difference: Difference, sentence: str | None = None
    ) -> Finding | None:
        """Count a cause. Returns the finding if it is new."""
        known = self._all.get((matrix, cause.name))
        if known is not None:
            known.last, known.count = step, known.count + 1
            if difference.error > known.difference.error:
                known.difference = difference
                known.sentence = sentence or _sentence(cause, difference)
            return None
        sentence = sentence or _sentence(cause, difference)
        made = Finding(matrix, cause.name, cause.kind, sentence, step, step, 1, difference)
        self._all[matrix, cause.name] = made
        return made

    def of(self, kind: Kind) -> list[Finding]:
        return [f for f in self._all.values() if f.kind == kind]

    def table(self, steps: int, followed: Sequence[str], noise: float) -> str:
        """A Markdown table; equal sentences of several matrices share a row."""
        lines = ["| kind | what | matrices | steps | error | factor | angle |", "|---|---|---|---|---|---|---|"]
        for kind in ("fault", "choice"):
            rows: dict[str, list[Finding]] = {}
            for f in self._all.values():
                if f.kind == kind:
                    rows.setdefault(f.cause, []).append(f)
            for found in rows.values():
                worst = max(found, key=lambda f: f.difference.error if math.isfinite(f.difference.error) else -1)
                d = worst.difference
                names = worst.matrix if len(found) == 1 else f"{worst.matrix} and {len(found) - 1} more"
                span = f"{min(f.first for f in found)} to {max(f.last for f in found)}"
                figures = (f"{d.error:.2g}", f"{d.factor:.3g}", f"{math.degrees(d.angle):.2g}°")
                lines.append(f"| {kind} | {worst.sentence} | {names} | {span} | {' | '.join(figures)} |")
        count = len(self.of("fault"))
        head = f"{steps} steps, {len(followed)} matrices: {count or 'no'} finding{'s' if count != 1 else ''}"
        if noise > 0:
            head += f"; Newton-Schulz's precision turns an update by up to {100 * noise:.2g}%"
        return "\n".join([head, "", *lines] if len(lines) > 2 else [head])


def _sentence(cause: Cause, difference: Difference) -> str:
    if cause.kind == "choice" or cause.name in _COMPLETE:
        return cause.sentence
    return f"{size_of(difference)}: {cause.sentence}"
