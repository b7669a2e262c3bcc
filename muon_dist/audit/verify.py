"""`muon-dist verify`: checks the chain of an audit, its coverage, and its errors."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muon_dist.audit.chain import FILE, Read, read_chain
from muon_dist.checkpoint import commits, open_checkpoint
from muon_dist.errors import AuditError, ConfigError, MuonDistError

_PARTS = 5
STATE = "audit"
"""Name of an audit's state in a checkpoint."""


@dataclass(frozen=True)
class Period:
    """Errors in a part of the run.

    Attributes:
        first, last: first and last step.
        audits: number of audited tensors.
        errors: by stage, the largest error as a share of its tolerance; 1 is the bound.
        alarms: number of lines with an alarm.
    """

    first: int
    last: int
    audits: int
    errors: dict[str, float]
    alarms: int


@dataclass
class Verified:
    """The result of a verification.

    Attributes:
        path: the file of the chain.
        lines: number of lines in the file.
        problems: problems of the chain and of checkpoints; empty if there are none.
        audits: records of audited tensors that belong to the run.
        abandoned: number of lines in abandoned branches of the run.
        starts: number of processes of the run, including resumed ones.
        heads: checkpoints whose line was found in the chain.
        names: all Muon matrices, from the newest start.
        settings: the audit's settings, from the newest start.
        gaps: first and last missing step of each gap in the audited steps.
    """

    path: Path
    lines: int = 0
    problems: list[str] = field(default_factory=list)
    audits: list[dict[str, Any]] = field(default_factory=list)
    abandoned: int = 0
    starts: int = 0
    heads: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    gaps: list[tuple[int, int]] = field(default_factory=list)

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Records with an alarm."""
        return [r for r in self.audits if r["alarms"]]

    @property
    def good(self) -> bool:
        """Whether the chain is complete and there was no alarm."""
        return not self.problems and not self.alarms

    def counts(self) -> Counter[str]:
        """Number of audits of each Muon matrix; 0 for a matrix that was never audited."""
        found = Counter(dict.fromkeys(self.names, 0))
        found.update(r["matrix"] for r in self.audits if r["algorithm"] == "muon")
        return found

    def ranks(self) -> dict[int, tuple[int, int]]:
        """Per rank: number of times that it was audited, and number of times that it was the auditor."""
        owners, auditors = Counter(r["owner"] for r in self.audits), Counter(r["auditor"] for r in self.audits)
        world = range(int(self.settings.get("world_size", 1)))
        return {rank: (owners[rank], auditors[rank]) for rank in sorted({*world, *owners, *auditors})}

    def periods(self) -> list[Period]:
        """Up to five parts of the run with about equal numbers of audits."""
        count = len(self.audits)
        borders = sorted({count * n // _PARTS for n in range(_PARTS + 1)})
        return [_period(self.audits[a:b]) for a, b in itertools.pairwise(borders)]

    def raise_if_bad(self) -> None:
        """Raise AuditError with the problem, if there is one."""
        if self.problems:
            raise AuditError(f"{self.path} is damaged or incomplete: {self.problems[0]}")
        if self.alarms:
            steps = ", ".join(str(r["step"]) for r in self.alarms[:5])
            raise AuditError(f"{len(self.alarms)} audited steps differ from what was asked for: step {steps}")


def _period(audits: list[dict[str, Any]]) -> Period:
    shares: dict[str, float] = {}
    for r in audits:
        for stage, bound in r["tolerance"].items():
            error = r["errors"].get(stage)
            share = error / bound if error is not None and bound else float("inf")
            shares[stage] = max(shares.get(stage, 0.0), share)
    steps = [r["step"] for r in audits]
    return Period(min(steps), max(steps), len(audits), shares, sum(bool(r["alarms"]) for r in audits))


def verify(run: Path) -> Verified:
    """Check the chain of a run folder, or of a file.

    Raises:
        ConfigError: there is no chain.
    """
    path = run / FILE if run.is_dir() else run
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: the run was not audited. Set optimizer.audit.every in its configuration"
        )
    chain = read_chain(path)
    found = Verified(path, len(chain.records), list(chain.problems), chain.audits, len(chain.abandoned))
    starts = [r for n, r in chain.records if r.get("kind") == "start"]
    if starts:
        found.settings = {key: starts[-1].get(key) for key in ("every", "matrices", "seed", "layout", "world_size")}
        found.names = list(starts[-1].get("names", []))
    found.starts = len(starts)
    found.gaps = list(_gaps([r["step"] for r in found.audits], found.settings.get("every")))
    _check_heads(found, chain, run)
    return found


def _gaps(steps: Iterable[int], every: int | None) -> Iterable[tuple[int, int]]:
    if not every:
        return
    ordered = sorted(set(steps))
    for before, after in itertools.pairwise(ordered):
        if after - before > every:
            yield before + every, after - every


def _check_heads(found: Verified, chain: Read, run: Path) -> None:
    """Check that every checkpoint of an audited step names a line of this chain; a cut or rewritten chain lacks it."""
    every = int(found.settings.get("every") or 1)
    steps = {r["step"] + n for _, r in chain.records for n in range(every)}
    without: list[str] = []
    folders = [f for f in (run / "checkpoints", run) if f.is_dir()]
    for path in (path for folder in folders for path in commits(folder)):
        try:
            with contextlib.closing(open_checkpoint(path)) as checkpoint:
                state, audited = (
                    checkpoint.state().get(STATE),
                    checkpoint.step in steps and not checkpoint.weights_only,
                )
        except MuonDistError as error:
            found.problems.append(f"{path.name}: {error}")
            continue
        if state is None:
            without += [path.name] if audited else []
            continue
        head, lines = state.get("head"), state.get("lines")
        if not isinstance(lines, int) or (lines and head not in chain.digests):
            found.problems.append(f"{path.name}: line {lines}, which it names, is not in the chain")
        elif lines:
            found.heads.append(path.name)
    # A user's own training loop may not save the head.
    for name in without if found.heads else ():
        found.problems.append(f"{name}: it names no line of the chain, though its step was audited")
