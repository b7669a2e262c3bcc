"""``muon-dist launch``: write the file that starts a run somewhere. Nothing is started here.

Each command imports what it needs itself, so that --help answers at once.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from muon_dist.arguments import IF_ANY, SettingsCommand

if TYPE_CHECKING:
    from muon_dist.launcher.job import Job

app = typer.Typer(
    name="launch",
    help="Write the file that starts a training run: torchrun, SLURM, Kubernetes, DeepSpeed, accelerate.",
    no_args_is_help=True,
)

ConfigOption = Annotated[Path, typer.Option("--config", metavar="CONFIG", help="A YAML file, as for muon-dist train.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, as for muon-dist train."),
]
NodesOption = Annotated[
    str, typer.Option("--nodes", metavar="N|MIN:MAX", help="Number of machines; a range for an elastic run.")
]
GpusOption = Annotated[int, typer.Option("--gpus-per-node", min=0, help="GPUs per machine; 0: CPU.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option("--processes-per-node", min=1, help="Processes per machine; default: one per GPU."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The file to write; default: standard output."),
]
FolderOption = Annotated[
    str | None,
    typer.Option(
        "--folder",
        help="Folder in which the run starts, on every machine; default: the folder in which the file is started.",
    ),
]
VenvOption = Annotated[
    str | None,
    typer.Option("--venv", help="Folder of the Python virtual environment, on every machine."),
]
InterfaceOption = Annotated[
    str | None,
    typer.Option("--interface", help="Network interface for gloo and NCCL, such as eth0."),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Name of the job; default: the configuration's."),
]
RunDirOption = Annotated[
    str | None,
    typer.Option("--run-dir", help="As for muon-dist train."),
]
AddressOption = Annotated[
    str, typer.Option("--master-addr", help="Address of the first machine, to which the others connect.")
]
PortOption = Annotated[int, typer.Option("--master-port", help="A free port of the first machine.")]


def _job(
    config: Path,
    overrides: Sequence[str],
    nodes: str,
    gpus: int,
    processes: int | None,
    name: str | None,
    run_dir: str | None,
    repeated: str | None,
    *,
    folder: str | None = None,
    environment: str | None = None,
    interface: str | None = None,
) -> Job:
    """The job, from a configuration that was read and checked; warnings about it go to standard error."""
    from muon_dist.config import load_config
    from muon_dist.launcher.job import Job, check_resumable, parse_nodes

    settings = load_config(config, overrides)
    fewest, most = parse_nodes(nodes)
    where = ["--run-dir", run_dir] if run_dir is not None else []
    # a restart of the same command continues from the newest checkpoint
    arguments = ("train", str(config), *overrides, *where, "--resume", IF_ANY)
    job = Job(
        name=name if name is not None else settings.name,
        arguments=arguments,
        fewest_nodes=fewest,
        nodes=most,
        gpus=gpus,
        processes=processes if processes is not None else max(1, gpus),
        folder=folder,
        environment=environment,
        interface=interface,
    )
    secret = [word.partition("=")[0] for word in overrides if _is_secret(word)]
    if secret:
        _warn([f"{', '.join(secret)}: the value is written into the file; better set it in the environment"])
    _warn(check_resumable(settings.model_dump(mode="json"), job, repeated))
    return job


def _is_secret(word: str) -> bool:
    """Whether a KEY=VALUE looks like a credential; a number does not (evaluation.generate_tokens=64)."""
    from muon_dist.config import is_secret

    key, equals, value = word.partition("=")
    return bool(equals) and is_secret(key.rpartition(".")[2]) and not value.replace(".", "").isdigit()


def _made_by() -> list[str]:
    """The command line, for the comment in the file; values that look like credentials are left out."""
    from muon_dist.config import REDACTED

    words = ["muon-dist", *sys.argv[1:]]
    return [f"{word.partition('=')[0]}={REDACTED}" if _is_secret(word) else word for word in words]


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def _write(text: str, output: Path | None, executable: bool = False, start: str | None = None) -> None:
    """Write a file, or print it without `output`. start: the command that starts a run from the file, for a
    message."""
    from muon_dist.errors import ConfigError

    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
        if executable:
            output.chmod(output.stat().st_mode | 0o111)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from error
    print(str(output), file=sys.stderr)
    if start is not None:
        print(f"start the run: {start} {shlex.quote(str(output))}", file=sys.stderr)


@app.command(cls=SettingsCommand)
def torchrun(
    config: ConfigOption,
    overrides: Overrides = None,
    nodes: NodesOption = "1",
    gpus: GpusOption = 0,
    processes: ProcessesOption = None,
    master_addr: AddressOption = "127.0.0.1",
    master_port: PortOption = 29500,
    static: Annotated[
        bool, typer.Option("--static", help="Give each machine its number by hand, instead of c10d.")
    ] = False,
    max_restarts: Annotated[
        int | None,
        typer.Option(min=0, help="Restarts after a failure; default: 0, or 3 for an elastic run."),
    ] = None,
    name: NameOption = None,
    run_dir: RunDirOption = None,
    folder: FolderOption = None,
    venv: VenvOption = None,
    interface: InterfaceOption = None,
    output: OutputOption = None,
) -> None:
    """A bash script to run once on every machine."""
    from muon_dist.errors import ConfigError
    from muon_dist.launcher.job import check_address
    from muon_dist.launcher.torchrun import render_torchrun

    job = _job(config, overrides or [], nodes, gpus, processes, name, run_dir, None,
               folder=folder, environment=venv, interface=interface)  # fmt: skip
    if static and job.elastic:
        raise ConfigError(f"--static: an elastic job (--nodes {nodes}) has no fixed numbers; leave one of the two out")
    _warn(check_address(master_addr, master_port, job.nodes))
    text = render_torchrun(
        job, _made_by(), address=master_addr, port=master_port, static=static, restarts=max_restarts
    )
    _write(text, output, executable=True, start=None if static else "bash")


@app.command(cls=SettingsCommand)
def slurm(
    config: ConfigOption,
    overrides: Overrides = None,
    nodes: NodesOption = "1",
    gpus: GpusOption = 0,
    processes: ProcessesOption = None,
    time: Annotated[str, typer.Option(help="Time limit, in sbatch's format.")] = "24:00:00",
    warn: Annotated[
        int, typer.Option(min=30, help="The run saves and ends this many seconds before the limit.")
    ] = 180,
    requeues: Annotated[int, typer.Option(min=0, help="How often the job may start itself again.")] = 50,
    cpus: Annotated[int | None, typer.Option("--cpus-per-task", min=1, help="Cores per machine.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per machine, such as 200G.")] = None,
    partition: Annotated[str | None, typer.Option(help="sbatch's option of this name.")] = None,
    account: Annotated[str | None, typer.Option(help="sbatch's option of this name.")] = None,
    qos: Annotated[str | None, typer.Option(help="sbatch's option of this name.")] = None,
    constraint: Annotated[str | None, typer.Option(help="sbatch's option of this name.")] = None,
    exclusive: Annotated[bool, typer.Option("--exclusive", help="Do not share machines with other jobs.")] = False,
    log: Annotated[str, typer.Option(help="sbatch's --output.")] = "%x-%j.out",
    name: NameOption = None,
    run_dir: RunDirOption = None,
    folder: FolderOption = None,
    venv: VenvOption = None,
    interface: InterfaceOption = None,
    output: OutputOption = None,
) -> None:
    """A script for sbatch: one task per machine, a signal before the time limit, requeue and resume."""
    from muon_dist.launcher.slurm import Slurm, render_slurm

    job = _job(config, overrides or [], nodes, gpus, processes, name, run_dir, "SLURM's requeue",
               folder=folder, environment=venv, interface=interface)  # fmt: skip
    options = Slurm(
        time=time, partition=partition, account=account, qos=qos, constraint=constraint, cpus=cpus, memory=memory,
        output=log, warn=warn, requeues=requeues, exclusive=exclusive,
    )  # fmt: skip
    _write(render_slurm(job, options, _made_by()), output, start="sbatch")


@app.command(cls=SettingsCommand)
def k8s(
    config: ConfigOption,
    image: Annotated[str, typer.Option(help="Container image with muon-dist installed.")],
    overrides: Overrides = None,
    nodes: NodesOption = "1",
    gpus: GpusOption = 0,
    processes: ProcessesOption = None,
    kind: Annotated[str, typer.Option(help="trainjob (Kubeflow Trainer v2) or pytorchjob (v1, can be elastic).")] = (
        "trainjob"
    ),
    namespace: Annotated[str | None, typer.Option(help="Namespace of the job.")] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(metavar="CLAIM:/PATH", help="Mount a persistent volume claim; repeat it."),
    ] = None,
    cpu: Annotated[str | None, typer.Option(help="Cores per pod.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per pod, such as 200Gi.")] = None,
    shm: Annotated[str, typer.Option(help="Largest size of /dev/shm.")] = "8Gi",
    grace: Annotated[int, typer.Option(min=30, help="Seconds for saving when a pod is stopped.")] = 180,
    name: NameOption = None,
    run_dir: RunDirOption = None,
    folder: FolderOption = None,
    venv: VenvOption = None,
    interface: InterfaceOption = None,
    output: OutputOption = None,
) -> None:
    """A Kubernetes manifest: a TrainJob with its own runtime, or a PyTorchJob."""
    from muon_dist.errors import ConfigError
    from muon_dist.launcher.kubernetes import Kubernetes, render_kubernetes

    if kind not in ("trainjob", "pytorchjob"):
        raise ConfigError(f"--kind: {kind!r} is neither trainjob nor pytorchjob")
    job = _job(config, overrides or [], nodes, gpus, processes, name, run_dir, "a restart of its pods",
               folder=folder, environment=venv, interface=interface)  # fmt: skip
    if not volume:
        _warn(["no --volume: data and checkpoints are lost with the pods, and machines do not share them"])
    options = Kubernetes(
        image=image, kind="trainjob" if kind == "trainjob" else "pytorchjob", namespace=namespace,
        volumes=tuple(volume or ()), cpu=cpu, memory=memory, shared_memory=shm, grace=grace,
    )  # fmt: skip
    _write(render_kubernetes(job, options, _made_by()), output, start="kubectl apply -f")


@app.command(cls=SettingsCommand)
def deepspeed(
    config: ConfigOption,
    host: Annotated[list[str], typer.Option(help="A machine's ssh name; repeat it, first machine first.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The hostfile to write.")],
    overrides: Overrides = None,
    gpus: GpusOption = 0,
    processes: ProcessesOption = None,
    master_port: PortOption = 29500,
    name: NameOption = None,
    run_dir: RunDirOption = None,
    interface: InterfaceOption = None,
) -> None:
    """A hostfile, and the deepspeed command for the first machine."""
    from muon_dist.launcher.hosts import render_hostfile, variables
    from muon_dist.launcher.job import check_address

    job = _job(config, overrides or [], str(len(host)), gpus, processes, name, run_dir, None, interface=interface)
    files = render_hostfile(job, host, master_port, _made_by())
    _warn(check_address(host[0], master_port, job.nodes))
    _write(files.text, output)
    # By itself DeepSpeed passes few variables to the other machines.
    note = "# for ~/.deepspeed_env on the first machine; DeepSpeed passes them to the others:"
    _show([note, *(f"#   {variable}" for variable in variables(job))], files.command, output)


@app.command(cls=SettingsCommand)
def accelerate(
    config: ConfigOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="accelerate's configuration file to write.")],
    overrides: Overrides = None,
    nodes: NodesOption = "1",
    gpus: GpusOption = 0,
    processes: ProcessesOption = None,
    master_addr: AddressOption = "127.0.0.1",
    master_port: PortOption = 29500,
    name: NameOption = None,
    run_dir: RunDirOption = None,
    interface: InterfaceOption = None,
) -> None:
    """A configuration file for accelerate, and the command for every machine."""
    from muon_dist.launcher.hosts import render_accelerate, variables
    from muon_dist.launcher.job import check_address

    job = _job(config, overrides or [], nodes, gpus, processes, name, run_dir, None, interface=interface)
    files = render_accelerate(job, master_addr, master_port, _made_by())
    _warn(check_address(master_addr, master_port, job.nodes))
    _write(files.text, output)
    _show([f"export {variable}" for variable in variables(job)], files.command, output)


def _show(preparation: Sequence[str], command: str, output: Path) -> None:
    """The commands to run, on standard output."""
    typer.echo("\n".join(preparation))
    typer.echo(command.replace("{file}", shlex.quote(str(output)), 1))
