"""``muon-dist checkpoint``: look at, verify and convert checkpoints.

Each command imports what it needs itself, so that --help answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from muon_dist.arguments import existing_run
from muon_dist.errors import CheckpointError

app = typer.Typer(name="checkpoint", help="Look at, verify and convert checkpoints.", no_args_is_help=True)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="PATH", callback=existing_run, help="A run folder, a folder of checkpoints, or one checkpoint."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")]


@app.command(name="list")
def list_(
    path: Source, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False
) -> None:
    """Steps, sizes, ranks and layouts. Damage that shows without reading all bytes is marked."""
    from muon_dist.train import checkpoints

    rows = [checkpoints.describe(p) for p in checkpoints.found(path)]
    typer.echo(checkpoints.to_json(rows) if as_json else checkpoints.table(rows))


@app.command()
def verify(path: Source) -> None:
    """Read every byte and compare it with the manifest. A damaged file is named, and the exit code is 7."""
    from muon_dist.train import checkpoints

    wrong = 0
    for checkpoint, problem in checkpoints.verify(path):
        typer.echo(f"{checkpoint}: {'every byte is right' if problem is None else f'DAMAGED: {problem}'}")
        wrong += problem is not None
    if wrong:
        raise CheckpointError(f"{wrong} damaged: --resume auto continues from the newest undamaged checkpoint")


@app.command()
def export(
    path: Source,
    out: Out,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as trained.")] = None,
) -> None:
    """Write the model of a checkpoint, or of a run's newest good one, for AutoModelForCausalLM and AutoTokenizer."""
    from muon_dist.train import checkpoints

    source = checkpoints.export(path, out, dtype)
    typer.echo(f"{out}: the model of {source}")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face folder, DeepSpeed's universal format, or a checkpoint of muon-dist."
        ),
    ],
    out: Out,
    model: Annotated[
        Path | None,
        typer.Option(help="With DeepSpeed's universal format: a folder with the model's config.json and tokenizer."),
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave out AdamW's state.")] = False,
    step: Annotated[
        int | None,
        typer.Option(help="AdamW's step number, which DeepSpeed's universal format lacks under ZeRO-3.", min=0),
    ] = None,
) -> None:
    """Make a checkpoint from other weights, to begin a run with (train --resume OUT); or a Hugging Face folder from a
    checkpoint."""
    from muon_dist.train import checkpoints

    what = checkpoints.convert(source, out, model=model, weights_only=weights_only, step=step)
    typer.echo(f"{out}: {what}")
