"""``muon-dist doctor``: find the problems that would stop or slow a run on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from muon_dist.doctor.verdict import Verdict, worst
from muon_dist.json_files import indented


def doctor(
    run_dir: Annotated[Path, typer.Option(help="The folder for checkpoints.")] = Path("runs"),
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Port for the rendezvous.")] = 29500,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for an exchange between machines.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 for warnings too.")] = False,
) -> None:
    """Check this machine for problems; under torchrun also the connections between machines.

    Exit code 1 if there is a problem, else 0.
    """
    from muon_dist.doctor.examine import examine
    from muon_dist.train import distributed

    first = distributed.rank() == 0
    found = examine(run_dir, master_port, timeout)
    unmet = any(verdict.check == "meeting" for verdict in found)
    if first or unmet:  # a rank that could not reach the others prints its own verdicts
        typer.echo(_json(found) if as_json else _text(found))
    level = worst(found)
    sys.exit(1 if level == "problem" or (strict and level == "warning") else 0)


def _json(found: list[Verdict]) -> str:
    return indented({"level": worst(found), "verdicts": [verdict.to_json() for verdict in found]})


def _text(found: list[Verdict]) -> str:
    count = {level: sum(v.level == level for v in found) for level in ("problem", "warning")}
    total = ", ".join(f"{n} {level}{'s' if n != 1 else ''}" for level, n in count.items())
    return "\n".join([*(verdict.line() for verdict in found), f"{len(found)} checks: {total}"])
