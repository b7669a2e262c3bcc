"""``muon-dist verify``: checks whether a run's steps were correct."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muon_dist.arguments import existing_run


def verify(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", callback=existing_run, help="A run folder, or its audit.jsonl.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Check the audit of a run: completeness of the chain, recomputed matrices, size of errors.

    Exit code 0 if everything is right; 13 if a line is missing or was changed, or if there was an alarm.
    """
    from muon_dist.audit.page import show, to_json
    from muon_dist.audit.verify import verify as check

    found = check(run)
    if as_json:
        typer.echo(to_json(found))
    else:
        show(found)
    found.raise_if_bad()
