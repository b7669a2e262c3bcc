"""The result of a check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "problem"]
_ORDER: tuple[Level, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Verdict:
    """One finding.

    Attributes:
        check: short name of the check.
        level: "ok"; "warning": a run works, but slowly or at a risk; "problem": a run will not work.
        text: the finding, in one sentence. fix: what to do; None if there is nothing to do. host: the machine, if
            several were checked. figures: the numbers of the finding, plain data.
    """

    check: str
    level: Level
    text: str
    fix: str | None = None
    host: str | None = None
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def line(self) -> str:
        """For people: level, check, host and text; the fix on the next line."""
        where = f" [{self.host}]" if self.host is not None else ""
        fix = f"\n{'':9}fix: {self.fix}" if self.fix is not None else ""
        return f"{self.level:<8} {self.check}{where}: {self.text}{fix}"


def worst(verdicts: Sequence[Verdict]) -> Level:
    """The worst level of the verdicts; "ok" without verdicts."""
    return max((v.level for v in verdicts), key=_ORDER.index, default="ok")


def attempt(check: str, look: Callable[[], list[Verdict]]) -> list[Verdict]:
    """The verdicts of a check. If it raises, the error becomes a warning, and the other checks still run."""
    try:
        return look()
    except Exception as error:
        return [Verdict(check, "warning", f"could not be checked: {type(error).__name__}: {error}")]
