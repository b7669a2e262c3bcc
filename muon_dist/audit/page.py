"""The text that `muon-dist verify` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from muon_dist.audit.verify import Verified
from muon_dist.json_files import indented

_SHOWN = 12


def to_json(found: Verified) -> str:
    """One object with everything, for programs."""
    counts = found.counts()
    return indented(
        {
            "good": found.good,
            "lines": found.lines,
            "problems": found.problems,
            "audits": len(found.audits),
            "abandoned_lines": found.abandoned,
            "starts": found.starts,
            "checkpoints": found.heads,
            "matrices": dict(counts),
            "ranks": {str(rank): {"audited": a, "auditor": b} for rank, (a, b) in found.ranks().items()},
            "periods": [period.__dict__ for period in found.periods()],
            "missing_steps": found.gaps,
            "alarms": found.alarms,
        }
    )


def summary(found: Verified) -> list[tuple[str, str]]:
    """(label, text) of the most important results."""
    counts = found.counts()
    visited = sum(n > 0 for n in counts.values())
    chain = "whole" if not found.problems else f"{len(found.problems)} problems"
    rows = [
        ("chain", f"{chain}, {found.lines:,} lines, {found.starts} start{'s' if found.starts != 1 else ''}"),
        ("audits", f"{len(found.audits):,}, one step in {found.settings.get('every')}"),
        ("alarms", str(len(found.alarms))),
        ("matrices", f"{visited} of {len(counts)} recomputed, each {min(counts.values(), default=0)} to "
                     f"{max(counts.values(), default=0)} times"),
        ("ranks", ", ".join(f"{r}: {a} audited, {b} as auditor" for r, (a, b) in found.ranks().items())),
    ]  # fmt: skip
    if found.abandoned:
        rows.append(("abandoned branches", f"{found.abandoned} lines from which no resumed run continued"))
    if found.heads:
        rows.append(("checkpoints", f"{len(found.heads)} name a line of this chain"))
    if found.gaps:
        said = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found.gaps[:_SHOWN])
        rows.append(("not audited", f"steps {said}: skipped because of their gradients, or without a gradient"))
    return rows


def show(found: Verified) -> None:
    """Print one page."""
    console = Console()
    table = Table(title=f"audit of {found.path}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, text in summary(found):
        table.add_row(label, text)
    console.print(table)
    if found.audits:
        console.print(errors_in_time(found))
    for problem in found.problems[:_SHOWN]:
        console.print(f"problem: {problem}", markup=False)
    for record in found.alarms[:_SHOWN]:
        for alarm in record["alarms"]:
            said = f"alarm: step {record['step']}, {record['matrix']}: {alarm['stage']}: {alarm['sentence']}"
            console.print(said + (" (undone)" if record.get("undone") else ""), markup=False)
    never = [name for name, n in found.counts().items() if not n]
    if never:
        console.print(f"not recomputed yet: {', '.join(never[:_SHOWN])}{' ...' if len(never) > _SHOWN else ''}")


def errors_in_time(found: Verified) -> Table:
    """The largest error of each stage in each part of the run, as a share of its tolerance."""
    table = Table(title="largest error, as a share of its tolerance", title_justify="left")
    for name in ("steps", "audits", "momentum", "update", "alarms"):
        table.add_column(name, justify="right")
    for p in found.periods():
        shares = [f"{p.errors.get(stage, 0.0):.3f}" for stage in ("momentum", "direction")]
        table.add_row(f"{p.first} to {p.last}", str(p.audits), *shares, str(p.alarms))
    return table
