"""``muon-dist spectra``: run the experiments and the Newton-Schulz study, and write the page of their results.

Each command imports what it needs itself, so that --help answers at once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="spectra",
    help="The paper 'Spectral Flattening Is All Muon Needs' (arXiv 2605.13079), measured.",
    no_args_is_help=True,
)

ProfileOption = Annotated[str, typer.Option(help="quick (all within 5 minutes on two cores) or full (more seeds).")]
OutputOption = Annotated[Path, typer.Option(help="Folder for the result files: one JSON and one SVG per experiment.")]


@app.command()
def run(
    experiments: Annotated[
        list[str], typer.Argument(metavar="EXPERIMENT...", help="E1 to E8, NS (the Newton-Schulz study), or all.")
    ],
    profile: ProfileOption = "quick",
    output: OutputOption = Path("spectra"),
) -> None:
    """Run experiments. A claim that the numbers contradict is a result, not an error: the exit code stays 0."""
    from muon_dist.experiments.registry import profile_config, run_and_write, select

    chosen = [(name, profile_config(name, profile)) for name in select(experiments)]
    for name, config in chosen:
        _report(run_and_write(name, config, profile, output), output)


@app.command(name="newton-schulz")
def newton_schulz(
    profile: ProfileOption = "quick",
    output: OutputOption = Path("spectra"),
    momentum: Annotated[
        Path | None,
        typer.Option(help="A torch.save file of name -> matrix, instead of momentum from E8's training."),
    ] = None,
    save_momentum: Annotated[
        Path | None,
        typer.Option(help="Also save the momentum captured from E8's training here, and use it."),
    ] = None,
) -> None:
    """Every schedule, number of steps, dtype and spectrum: range, residual, cosine, FLOPs, stable step."""
    from muon_dist.errors import ConfigError
    from muon_dist.experiments import newton_schulz_study
    from muon_dist.experiments.registry import NEWTON_SCHULZ, profile_config, run_and_write

    config = profile_config(NEWTON_SCHULZ, profile)
    if momentum is not None and save_momentum is not None:
        raise ConfigError("--momentum and --save-momentum exclude each other: give the file to read or to write")
    if save_momentum is not None:
        captured = newton_schulz_study.captured_momentum(config.training, config.seeds)
        newton_schulz_study.save_momentum(captured, save_momentum)
        momentum = save_momentum
    if momentum is not None:
        config = dataclasses.replace(config, momentum=str(momentum))
    record = run_and_write(NEWTON_SCHULZ, config, profile, output)
    _report(record, output)
    typer.echo(f"\n{record['notes'][0]}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A folder that `spectra run` wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write; default: experiments.html in RESULTS."),
    ] = None,
) -> None:
    """One self-contained HTML page of the experiments in a folder."""
    from muon_dist.report.experiments_page import write_page

    typer.echo(str(write_page(results, output or results / "experiments.html")))


def _report(record: dict[str, Any], output: Path) -> None:
    """A few lines of text for one experiment."""
    typer.echo(f"{record['experiment']}  {record['title']} ({record['seconds']:.0f} s): {record['verdict']}")
    for criterion in record["criteria"]:
        measured = criterion["measured"]
        shown = f"{measured:.4g}" if isinstance(measured, float) else str(measured)
        mark = "pass" if criterion["passed"] else "FAIL"
        typer.echo(f"  {mark}  {criterion['name']}: {shown} (wanted {criterion['threshold']})")
    typer.echo(f"  -> {output / record['experiment']}.json")
