"""``muon-dist bench``: Newton-Schulz against bare matrix products, and the optimizer step against other optimizers.

Each command imports what it needs itself, so that --help answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

app = typer.Typer(name="bench", help="Measure the iteration, and the step against its peers.", no_args_is_help=True)

ProfileOption = Annotated[str, typer.Option(help="quick, full, or ci (tiny: checks that it works).")]


@app.command()
def orthogonalize(
    profile: ProfileOption = "quick",
    output: Annotated[Path, typer.Option(help="Folder for orthogonalize.json and orthogonalize.md.")] = Path("bench"),
    dtype: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it on Python 3.10 too)
        typer.Option(help="float32, bfloat16, float16 or float64; repeat it. The profile's unless given."),
    ] = None,
    only: Annotated[str, typer.Option(help="A part of the shapes to run, such as 1024x384.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """FLOP/s of Newton-Schulz and of the same matrix products alone, in turn, and the error to fp64 and to the SVD."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import torch

    from muon_dist.bench import machine
    from muon_dist.bench import orthogonalize as bench

    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = bench.run(profile, dtype, only, device)
    environment = machine.describe()
    text = f"{environment['processor']}, {threads} thread(s), torch {torch.__version__}\n\n{bench.table(rows)}"
    typer.echo(text)
    record = {"environment": environment, "profile": profile, "device": str(device), "rows": rows}
    for path in machine.write(output, "orthogonalize", record, text):
        typer.echo(f"-> {path}")
