"""``muon-dist bench conformance``: does an optimizer do what its documentation says?"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import muon_dist.bench.peers_deepspeed  # noqa: F401  (once, before the ranks are forked)
from muon_dist.bench import machine
from muon_dist.bench.conformance_cases import PEERS, Case, cases
from muon_dist.bench.conformance_run import run
from muon_dist.bench.ranks import RankFailure, run_ranks
from muon_dist.errors import ConfigError

TIMEOUT = 240.0
Row = dict[str, Any]


def select(only: Sequence[str]) -> list[Case]:
    """The cases with one of `only` in their names; without `only`, all. Raises ConfigError for a word that selects
    nothing."""
    found = list(cases())
    for word in only:
        if not any(word in c.name for c in found):
            raise ConfigError(f"--only {word!r} selects nothing; rows are called such as {found[0].name!r}")
    return [c for c in found if not only or any(word in c.name for word in only)]


def measure(case: Case) -> Row:
    """One row; it says so if the peer is not installed, refuses or fails."""
    row: Row = {
        "optimizer": case.peer.name,
        "version": machine.version(case.peer.package),
        "framework": case.framework,
        "condition": case.condition,
        "reproduce": case.peer.reproduce,
    }
    if case.peer.missing is not None:
        return row | {"outcome": "missing", "said": case.peer.missing}
    try:
        return row | {"outcome": "ran"} | run_ranks(run, case.ranks, case, timeout=TIMEOUT)[0]
    except RankFailure as error:
        return row | {"outcome": "failed", "said": _last_line(str(error))}


def _last_line(text: str) -> str:
    """The message of the first rank's exception."""
    lines = [line for line in text.split("--- rank")[1].splitlines() if line and not line.startswith((" ", "["))]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines)[-1][:240]


def command(output: Path, only: Sequence[str], echo: Callable[[str], None]) -> None:
    """Run the rows, and write them as JSON and Markdown into `output`."""
    torch.set_num_threads(1)
    logging.getLogger("muon_dist.witness").setLevel(logging.ERROR)
    rows = []
    for case in select(only):
        rows.append(measure(case))
        echo(f"{case.name}: {told(rows[-1])}")
    environment = machine.describe()
    text = table(rows, environment)
    record = {"environment": environment, "date": datetime.date.today().isoformat(), "rows": rows}
    for path in machine.write(output, "conformance", record, text):
        echo(f"-> {path}")


def told(row: Row) -> str:
    """The result of a row, in words."""
    if row["outcome"] != "ran":
        return str(row["said"])
    found = "; ".join(sentence for _, sentence in row["findings"])
    return found or "as documented"


def table(rows: Sequence[Row], environment: dict[str, Any]) -> str:
    """Markdown: the date, the versions, and one line per row."""
    versions = ", ".join(f"{p.package} {v}" for p in PEERS if (v := machine.version(p.package)))
    about = f"{datetime.date.today().isoformat()}, {', '.join(dict.fromkeys(versions.split(', ')))}, 2 ranks, gloo."
    header = (
        "optimizer",
        "framework",
        "condition",
        "error of the update",
        "of that, its precision",
        "found",
        "choices",
    )
    return f"{about}\n\n{machine.markdown(header, [_line(row) for row in rows])}"


def _line(row: Row) -> tuple[str, ...]:
    head = (row["optimizer"], row["framework"], row["condition"])
    if row["outcome"] != "ran":
        return (*head, "-", "-", told(row), "")
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    return (*head, error, f"{row['noise']:.1e}", told(row), "; ".join(s for _, s in row["choices"]))
