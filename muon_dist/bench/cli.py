"""``muon-dist bench``: Newton-Schulz against its matrix products only, and the optimizer step against other
optimizers.

Each command imports what it needs itself, so that --help answers at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="bench",
    help="Measure Newton-Schulz, and the optimizer step against other Muon optimizers.",
    no_args_is_help=True,
)

ProfileOption = Annotated[str, typer.Option(help="quick, full, gpu, or ci (tiny: checks that it works).")]
StepProfile = Annotated[
    str, typer.Option(help="quick, full, gpu (with --device cuda), link (few steps: for slow links) or ci (tiny).")
]
_QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false"}


@app.command()
def orthogonalize(
    profile: ProfileOption = "quick",
    output: Annotated[Path, typer.Option(help="Folder for orthogonalize.json and orthogonalize.md.")] = Path("bench"),
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32, bfloat16, float16 or float64; repeat it. Default: the profile's."),
    ] = None,
    only: Annotated[str, typer.Option(help="Run only shapes that contain this text, such as 1024x384.")] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """FLOP/s of Newton-Schulz and of its matrix products alone, timed in turn, and the errors to fp64 and to the
    SVD."""
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


@app.command()
def step(
    profile: StepProfile = "quick",
    output: Annotated[Path, typer.Option(help="Folder for step.json and step.md.")] = Path("bench"),
    ranks: Annotated[
        int, typer.Option(min=2, help="Processes on this machine; under a launcher, the launcher's number is used.")
    ] = 2,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="Run only peers whose name contains this text, such as deepspeed; repeat it."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run only cases whose name contains this text, such as ZeRO-3; repeat it."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: under torchrun with one process per GPU.")] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(help="Model, instead of the profile's: tiny, quick, small, medium or half-1b."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Number of timed steps, instead of the profile's.")] = None,
    link: Annotated[str, typer.Option(help="The connection between the ranks, for the table.")] = "loopback",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Do not switch off torch.compile in peers that use it.")
    ] = False,
    append: Annotated[bool, typer.Option("--append", help="Keep the other rows of an existing step.json.")] = False,
) -> None:
    """Our Muon, every other Muon and AdamW on the same model and ranks, stepped in turn: time, bytes, memory,
    error."""
    # Before torch and DeepSpeed are imported. Other packages' torch.compile costs up to a minute a case on a CPU.
    defaults = {"DS_ACCELERATOR": device, "TORCHDYNAMO_DISABLE": "0" if compiled else "1", "OMP_NUM_THREADS": "1"}
    for name, value in (defaults | _QUIET).items():
        os.environ.setdefault(name, value)
    from muon_dist.bench import step as bench

    bench.command(
        profile, output, ranks=ranks, peers=peers or [], only=only or [], device=device, model=model, rounds=rounds,
        link=link, append=append, echo=typer.echo,
    )  # fmt: skip


@app.command()
def conformance(
    output: Annotated[Path, typer.Option(help="Folder for conformance.json and conformance.md.")] = Path("bench"),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Run only rows whose name contains this text, such as 'DeepSpeed Muon, zero1'; repeat it."),
    ] = None,
) -> None:
    """Test every installed Muon with a witness: frameworks, clipping, precision, offload, resume, zero gradients."""
    defaults = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    for name, value in (defaults | _QUIET).items():
        os.environ.setdefault(name, value)
    from muon_dist.bench import conformance as bench

    bench.command(output, only or [], typer.echo)


@app.command()
def host(
    model: Annotated[str, typer.Option(help="A YAML file, or the name of one in configs/, such as llama-7b.")],
    layout: Annotated[str, typer.Option(help="fsdp2, hsdp, zero1, zero2, zero3 or ddp.")] = "fsdp2",
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks; this process plays one of them.")] = 64,
    rank: Annotated[int, typer.Option(min=0, help="The rank that is measured.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the result to this file."),
    ] = None,
) -> None:
    """Count the operations that a step dispatches on one of many ranks, and time them on the host; needs no GPU."""

    from muon_dist.bench.host import measure
    from muon_dist.config import load_config
    from muon_dist.errors import ConfigError
    from muon_dist.json_files import write_json
    from muon_dist.planner.cli import routed, unpack
    from muon_dist.project import packaged

    path = Path(model)
    path = path if path.suffix in (".yaml", ".yml") else packaged(f"configs/{model}.yaml")
    if rank >= ranks:
        raise ConfigError(f"--rank {rank}: it must be below --ranks {ranks}")
    config = load_config(path)
    found = measure(*routed(config), *unpack(config), layout, ranks, rank)
    for name, count in found["by_kind"].items():
        typer.echo(f"{count:8d}  {name}")
    typer.echo(
        f"{found['operations']:8d}  operations of a step of {found['model']}, {layout}, rank {rank} of {ranks}; "
        f"{found['host_ms']:.1f} ms on this host; {found['collectives']} collectives; Newton-Schulz, left out: "
        f"{found['newton_schulz']['matrices']} matrices in {found['newton_schulz']['stacks']} stacks"
    )
    if json_file is not None:
        write_json(json_file, found)
        typer.echo(f"-> {json_file}")
