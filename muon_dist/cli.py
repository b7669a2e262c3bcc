"""The command line. Each command imports its modules when it runs, so that --help answers at once."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from muon_dist import failures, streams
from muon_dist.arguments import SettingsCommand, existing, existing_checkpoint, existing_run, existing_runs
from muon_dist.audit.cli import verify as verify_run
from muon_dist.bench.cli import app as bench
from muon_dist.defaults import PROMPT, TEMPERATURE, TOP_K
from muon_dist.doctor.cli import doctor
from muon_dist.errors import ConfigError, MuonDistError
from muon_dist.experiments.cli import app as spectra
from muon_dist.fuzz.cli import fuzz
from muon_dist.json_files import indented, one_line
from muon_dist.launcher.cli import app as launch
from muon_dist.planner.cli import app as planner
from muon_dist.train.checkpoint_cli import app as checkpoint
from muon_dist.version import __version__

app = typer.Typer(
    name="muon-dist",
    help="Pretrain language models with Muon, from one process to many machines.",
    epilog="Start with: muon-dist init my-project. On two processes: bash launch/torchrun.sh --nproc-per-node 2 train "
    "configs/quickstart.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(spectra)
app.add_typer(checkpoint)
app.add_typer(bench)
app.add_typer(launch)
app.command()(doctor)
app.command()(fuzz)
app.command(name="verify")(verify_run)
app.add_typer(planner)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/quickstart.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, for example optimizer.muon.lr=0.003."),
]
RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        callback=existing_run,
        help="A run folder, such as runs/quickstart, a checkpoint or a model folder.",
    ),
]
Step = Annotated[
    int | None,
    typer.Option(min=0, help="With a run folder: the weights of this step, not the newest."),
]
Best = Annotated[bool, typer.Option("--best", help="With a run folder: the saved weights with the best metric.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Make it again even if it exists, for instance if files are damaged."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"muon_dist {__version__}")
        raise typer.Exit


@app.callback()
def _general(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain language models with Muon, from one process to many machines."""


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of the project; it is made if needed.")],
) -> None:
    """Write a project folder: configurations, launch files and a README with the first commands."""
    from muon_dist import project

    if not folder:  # such as a variable that is not set; as a path it would be the current folder
        raise ConfigError("DIR is empty: name a folder, or write . for the current one")
    for path in project.init(Path(folder)):
        typer.echo(str(path))
    typer.echo(f"next: cd {shlex.quote(folder)} && muon-dist train configs/quickstart.yaml", err=True)


@app.command(cls=SettingsCommand)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Parent of the run folder, instead of the configuration's run_dir.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="Continue from a checkpoint: its path, auto (this run's newest), or if-any (new if none)."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again in a folder that holds a run.")] = False,
) -> None:
    """Train a model: tokenizer, data, training, evaluation, a sample. Start it with torchrun for several processes."""
    _quiet()
    streams.outlive_readers()
    from muon_dist.config import load_config

    first = os.environ.get("RANK", "0") == "0"
    try:
        existing_checkpoint(resume)
        settings = load_config(config, overrides or [], reads_files=first)
    except MuonDistError as error:
        error.reported_elsewhere = not first
        raise
    from muon_dist.train.run import train as run  # seconds, so after the configuration is known to be right

    run(settings, run_dir=run_dir, resume=resume, overwrite=overwrite)


@app.command(cls=SettingsCommand)
def tokenizer(config: ConfigPath, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Train the tokenizer on the configuration's text and save it for AutoTokenizer."""
    from muon_dist.config import load_config

    settings = load_config(config, overrides or [], reads_files=True)
    from muon_dist.train import corpus  # seconds, so after the configuration is known to be right

    info = corpus.make_tokenizer(settings, overwrite)
    typer.echo(f"{info.path}: {info.vocab_size:,} tokens, sha256 {info.sha256}")


@app.command(cls=SettingsCommand)
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of already prepared data.")] = False,
    show: Annotated[
        int, typer.Option(min=0, help="Print this many training samples of each source, decoded, with document ends.")
    ] = 0,
) -> None:
    """Convert the configuration's text to token shards. Existing shards are kept if their inputs have not changed."""
    from muon_dist.config import load_config

    settings = load_config(config, overrides or [], reads_files=True)
    from muon_dist.train import corpus  # seconds, so after the configuration is known to be right

    manifest = corpus.prepare(settings, overwrite, verify)
    for source in manifest.sources:
        for split, totals in source.splits.items():
            typer.echo(f"{source.folder} {split}: {totals.documents:,} documents, {totals.tokens:,} tokens")
    for line in corpus.shown(settings, show) if show else ():
        typer.echo(line)
    typer.echo(str(corpus.tokens_folder(settings)))


@app.command(name="export-tokens", cls=SettingsCommand)
def export_tokens(
    config: ConfigPath,
    out: Annotated[Path, typer.Option("--out", help="A folder that does not exist yet.")],
    overrides: Overrides = None,
    to: Annotated[
        str, typer.Option(help="megatron (.bin, .idx) or datatrove (.ds, .ds.index; nanotron).")
    ] = "megatron",
) -> None:
    """Write prepared tokens as files for Megatron or nanotron. Such files can also be a source's path."""
    _quiet()
    from muon_dist.config import load_config
    from muon_dist.data.token_files import export_tokens as export
    from muon_dist.train import corpus

    for path in export(corpus.tokens_folder(load_config(config, overrides or [])), out, to):
        typer.echo(str(path))


@app.command(name="eval")
def evaluate(
    run: RunPath,
    data: Annotated[Path | None, typer.Option(help="Prepared data (a folder `tokens`), instead of the run's.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per sample, instead of the run's.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Only this many samples.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Raw text (a file, folder or URL) instead of prepared data.")
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Tasks of lm-evaluation-harness: a YAML file, or a folder of them.")
    ] = None,
    step: Step = None,
    best: Best = False,
) -> None:
    """Loss, perplexity and bits per byte on the validation text, as one line of JSON; or the scores of tasks."""
    _quiet()
    from muon_dist.train.models import choice_of, evaluate_folder

    choice = choice_of(run, step, best)
    if tasks is not None:
        from muon_dist.train.tasks import evaluate_tasks

        if data is not None or text is not None:
            raise ConfigError("--tasks brings its own text: leave --data and --text out")
        figures = evaluate_tasks(run, tasks, batch_size=batch_size, limit=max_samples, choice=choice)
    else:
        figures = evaluate_folder(
            run,
            data=data,
            text=text,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_samples=max_samples,
            choice=choice,
        )
    typer.echo(one_line(figures))


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = PROMPT,
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most probable token.")] = TEMPERATURE,
    top_k: Annotated[int, typer.Option(min=1, help="Choose among this many most probable tokens.")] = TOP_K,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    step: Step = None,
    best: Best = False,
) -> None:
    """Let a trained model continue a text."""
    _quiet()
    from muon_dist.train.models import choice_of, generate_from_folder

    sampling = {"temperature": temperature, "top_k": top_k, "seed": seed}
    text, weights = generate_from_folder(run, prompt, tokens, choice=choice_of(run, step, best), **sampling)
    typer.echo(f"weights: {weights}", err=True)
    typer.echo(text)


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: as trained.")] = None,
    step: Step = None,
    best: Best = False,
) -> None:
    """Write model and tokenizer to a folder for AutoModelForCausalLM and AutoTokenizer, of transformers 4.57 and 5."""
    _quiet()
    from muon_dist.train.models import choice_of, export_folder

    typer.echo(f"weights: {export_folder(run, out, dtype, choice_of(run, step, best))}", err=True)
    typer.echo(str(out))


@app.command(cls=SettingsCommand)
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|RUN", callback=existing, help="YAML file or run folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE|RUN]...", help="Settings to change, or more run folders."),
    ] = None,
    lr: Annotated[list[float] | None, typer.Option(help="Grid; repeat it (0.003 0.01 0.03).")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds at each optimizer's best learning rate.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in one process with one thread.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder for the runs and the table.")] = Path("results/compare"),
) -> None:
    """Two or more run folders side by side; or, for one configuration, Muon against AdamW, each at its best rate."""
    _quiet()
    from muon_dist.train.compare import compare as compared

    typer.echo(compared(config, overrides or [], lrs=lr, seeds=seeds, jobs=jobs, output=output))


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            callback=existing_runs,
            help="One or several run folders; the runs need not be finished.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The page to write; default: report.html in the run folder, compare.html for several runs."),
    ] = None,
    step: Step = None,
    best: Best = False,
) -> None:
    """One self-contained HTML page: curves, spectra, routing, checkpoints, settings of a run; or runs side by side."""
    if len(runs) > 1:
        if best or step is not None:
            raise ConfigError("--step and --best choose weights of one run: name one run, or leave them out")
        from muon_dist.report.compare_page import write_compare_page

        typer.echo(str(write_compare_page(runs, output)))
        return
    from muon_dist.report.run_page import write_run_page
    from muon_dist.train.models import choice_of

    chosen = choice_of(runs[0], step, best) if best or step is not None else None
    typer.echo(str(write_run_page(runs[0], output, chosen)))


@app.command()
def metrics(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", callback=existing_run, help="A run folder; the run need not be finished."),
    ],
    csv: Annotated[bool, typer.Option("--csv", help="All columns, as comma-separated values.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """The log of a run as a table, one row per step; in Python: muon_dist.metrics(RUN), a DataFrame."""
    from muon_dist.report.log_table import as_csv, as_text, read_log

    rows = read_log(run)
    text = as_csv(rows) if csv else as_text(rows)
    if output is not None:
        output.write_text(text, encoding="utf-8")
        typer.echo(str(output))
    else:
        typer.echo(text, nl=False)


@spectra.command()
def probe(
    run: Annotated[Path, typer.Argument(metavar="RUN", callback=existing_run, help="A run folder with a checkpoint.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; default: the newest.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples in the probe batch.")] = 4,
    lanczos: Annotated[int, typer.Option(min=1, help="Lanczos steps for the largest eigenvalue.")] = 12,
) -> None:
    """Compare a run's learning rate with the stable step of its updates, by Hessian-vector products; one process."""
    _quiet()
    from muon_dist.train.probe import probe_run, table

    typer.echo(table(probe_run(run, step=step, samples=samples, lanczos=lanczos)))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration file, for an editor."""
    from muon_dist.config import json_schema

    typer.echo(indented(json_schema()))


def _quiet() -> None:
    """Turn off banners of libraries. Call it before torch and transformers are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _plain_switches(command: Any, context: Any) -> None:
    """Remove `<bool>` after switches in the help of a command and its subcommands: a switch has no value."""
    for option in command.get_params(context):
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for name, child in getattr(command, "commands", {}).items():
        _plain_switches(child, type(context)(child, info_name=name, parent=context))


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: run the command. Every error becomes a message and an exit code, never a traceback.

    The exit code is that of the error's class in `muon_dist.errors`. An unknown error is a bug: its message names the
    file with the traceback.
    """
    streams.make_safe()
    command = typer.main.get_command(app)
    _plain_switches(command, typer.Context(command, **command.context_settings))
    try:
        # the name also where Python was asked for the module: completion is installed for it
        return command(args=arguments, prog_name="muon-dist")
    except Exception as error:
        found = failures.as_error(error)
        if not found.reported_elsewhere:
            rank = os.environ.get("RANK", "0")
            failures.say(f"{'' if rank == '0' else f'rank {rank}: '}{found}")
        sys.exit(found.exit_code)


if __name__ == "__main__":
    main()
