"""``muon-dist fuzz``: random cases against the plain algorithm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
}


def fuzz(
    seconds: Annotated[float, typer.Option(min=1, help="Start new cases for this many seconds.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same cases.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write counts, refusals and wrong cases to this file."),
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="TEXT", help="Only cases with TEXT in a label: ZeRO, AutoTP, 'rule namo'.")
    ] = "",
    replay: Annotated[
        str | None,
        typer.Option(metavar="CASE", help="Run one case, in the form in which a wrong case was printed."),
    ] = None,
) -> None:
    """Compare random models, meshes and options, on processes of this machine, with the plain algorithm.

    Exit code 0 when no case is wrong, 12 when one is.
    """
    # Before torch and DeepSpeed are imported.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from muon_dist.fuzz.run import command

    command(seconds, seed, json_file, replay, typer.echo, only)
