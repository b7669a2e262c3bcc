"""The fuzzer's loop and its report."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from muon_dist.errors import ConfigError, InexactError
from muon_dist.fuzz.case import Case
from muon_dist.fuzz.draw import draw
from muon_dist.fuzz.judge import PATIENCE, RIGHT, WRONG, Judge, Outcome
from muon_dist.fuzz.shrink import shrink
from muon_dist.json_files import write_json

Say = Callable[[str], None]
SHRINK_SECONDS = 60.0
_SEARCHED = 20_000


@dataclass
class Wrong:
    """A wrong case, as drawn and as shrunk."""

    number: int
    drawn: Case
    case: Case
    outcome: Outcome

    def replay(self) -> str:
        """The command that runs it again."""
        return _replay_of(self.case)


def _replay_of(case: Case) -> str:
    return f"muon-dist fuzz --replay '{case.to_json()}'"


@dataclass
class Report:
    """The result of a fuzzing run.

    Attributes:
        counts: right, wrong and refused.
        by: per framework, rule and way to resume, the number of cases by outcome. refusals: first line of each message
            -> count. refused_cases: first line of each message -> command that runs its first case again. largest: the
            largest error of a right case whose messages are as wide as the updates, and its replay.
    """

    seed: int
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    by: dict[str, Counter[str]] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    refused_cases: dict[str, str] = field(default_factory=dict)
    wrong: list[Wrong] = field(default_factory=list)
    largest: tuple[float, str] = (0.0, "")

    def add(self, case: Case, outcome: Outcome) -> None:
        self.counts[outcome.kind] += 1
        for label in case.labels():
            self.by.setdefault(label, Counter())[outcome.kind] += 1
        if outcome.kind == RIGHT and case.wire != "bfloat16" and (outcome.error or 0.0) > self.largest[0]:
            self.largest = outcome.error or 0.0, case.to_json()
        elif outcome.kind not in (RIGHT, WRONG):
            message = outcome.message.partition("\n")[0]
            self.refusals[message] += 1
            self.refused_cases.setdefault(message, _replay_of(case))

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "cases": self.counts.total(),
            **{kind: self.counts[kind] for kind in ("right", "wrong", "refused")},
            "largest_error_of_a_right_case": {"error": self.largest[0], "case": self.largest[1]},
            "by": {label: dict(self.by[label]) for label in sorted(self.by)},
            "refusals": dict(self.refusals.most_common()),
            "refused_cases": self.refused_cases,
            "wrong_cases": [
                {
                    "number": w.number,
                    "replay": w.replay(),
                    "error": w.outcome.error,
                    "parameter": w.outcome.parameter,
                    "message": w.outcome.message,
                    "drawn": w.drawn.to_json(),
                }
                for w in self.wrong
            ],
        }

    def table(self) -> str:
        """Rows for a reader."""
        rows = [f"{'':28s} {'right':>7s} {'wrong':>7s} {'refused':>7s}"]
        for label, found in [*sorted(self.by.items()), ("all", self.counts)]:
            rows.append(f"{label:28s} " + " ".join(f"{found[kind]:7d}" for kind in ("right", "wrong", "refused")))
        for message, count in self.refusals.most_common():
            rows += [f"refused {count} times: {message}", f"the first of them: {self.refused_cases[message]}"]
        return "\n".join(rows)


def fuzz(
    seconds: float,
    seed: int,
    say: Say = print,
    *,
    only: str = "",
    engines: bool | None = None,
    prepare: Callable[[], None] | None = None,
    stop_at_first: bool = False,
    shrink_seconds: float = SHRINK_SECONDS,
    patience: float = PATIENCE,
) -> Report:
    """Run cases for `seconds`, each against the reference, and shrink those that are wrong.

    Args:
        seed: decides the cases; the speed of the machine decides their number.
        say: prints a line.
        only: text that a label of each case must contain.
        engines: whether DeepSpeed may be drawn; by default if it is installed.
        prepare: called in every rank, for tests.
        stop_at_first: end with the first wrong case.
        shrink_seconds: for each wrong case.
        patience: seconds after which a case counts as hanging.

    Raises:
        ConfigError: no case has a label with the text `only`.
    """
    if engines is None:
        engines = importlib.util.find_spec("deepspeed") is not None
    warm(engines)
    report, begun, number = Report(seed), time.monotonic(), 0
    with Judge(prepare, patience) as judge:
        while time.monotonic() - begun < seconds:
            number, case = _next(seed, number, engines, only)
            outcome = judge.run(case)
            report.add(case, outcome)
            report.seconds = time.monotonic() - begun
            if outcome.kind == WRONG:
                say(f"case {number} is wrong: {outcome.message}")
                smaller, found = shrink(case, outcome, judge.run, shrink_seconds)
                report.wrong.append(Wrong(number, case, smaller, found))
                say(f"shrunk: {found.message}\n{report.wrong[-1].replay()}")
                if stop_at_first:
                    break
            number += 1
    return report


def _next(seed: int, number: int, engines: bool, only: str) -> tuple[int, Case]:
    """The first case from `number` on with a label that contains `only`."""
    for at in range(number, number + _SEARCHED):
        case = draw(seed, at, engines)
        if any(only in label for label in case.labels()):
            return at, case
    raise ConfigError(f"--only '{only}': none of {_SEARCHED} cases has such a label; the table of a run lists labels")


def replay(text: str, say: Say = print) -> Outcome:
    """Run one case, given as JSON."""
    case = Case.from_json(text)
    warm(any(setup.framework == "zero" for setup, _ in case.segments()))
    with Judge() as judge:
        outcome = judge.run(case)
    error = "" if outcome.error is None else f", largest error {outcome.error:.1e} in {outcome.parameter}"
    say(f"{outcome.kind}{error}" + (f": {outcome.message}" if outcome.message else ""))
    return outcome


def warm(engines: bool) -> None:
    """Import, before ranks are forked, the modules that each rank would import."""
    torch.set_num_threads(1)
    import muon_dist.fuzz.meshes

    if engines:
        import muon_dist.fuzz.engines  # noqa: F401


def command(seconds: float, seed: int, json_file: Path | None, case: str | None, say: Say, only: str = "") -> None:
    """`muon-dist fuzz`.

    Raises:
        InexactError: a case is wrong.
        ConfigError: `case` is not a case, or no case has a label with the text `only`.
    """
    if case is not None:
        outcome = replay(case, say)
        if outcome.kind == WRONG:
            raise InexactError("the case is wrong")
        return
    report = fuzz(seconds, seed, say, only=only)
    say(report.table())
    say(
        f"{report.counts.total()} cases in {report.seconds:.0f} s from seed {seed}: {report.counts['right']} right, "
        f"{report.counts['refused']} refused, {report.counts['wrong']} wrong; largest error of a right case "
        f"{report.largest[0]:.1e}"
    )
    if json_file is not None:
        write_json(json_file, report.to_json())
        say(f"-> {json_file}")
    if report.wrong:
        raise InexactError(f"{len(report.wrong)} cases are wrong; the lines above run them again")
