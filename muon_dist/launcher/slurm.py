"""An sbatch script: one task a machine, a signal before the time limit, requeue and resume."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.errors import ConfigError
from muon_dist.launcher.job import Job
from muon_dist.launcher.shell import ALONE, ALONE_OPTIONS, AWAIT, header, preparation, words

# What sbatch takes for its own options. It parses #SBATCH lines itself, with rules of its own for quotes, so nothing
# that would need any is let in.
_TIME = re.compile(r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2}){0,2})$")
_WORD = re.compile(r"^[A-Za-z0-9_./%][A-Za-z0-9_.,:=@+/%-]*$")


@dataclass(frozen=True)
class Slurm:
    """Options of sbatch; None leaves one out.

    warn: seconds before the time limit at which the run is told to save and end. requeues: how often it may be started
    again.
    """

    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus: int | None = None
    memory: str | None = None
    output: str = "%x-%j.out"
    warn: int = 180
    requeues: int = 50
    exclusive: bool = False

    def __post_init__(self) -> None:
        if not _TIME.match(self.time):
            raise ConfigError(f"--time: {self.time!r} is not a time limit of SLURM, such as 24:00:00 or 2-12")
        for option in ("partition", "account", "qos", "constraint", "memory", "output"):
            value = getattr(self, option)
            if value is not None and not _WORD.match(value):
                raise ConfigError(
                    f"--{option}: {value!r} holds characters that sbatch would not read as meant; letters, digits and "
                    "_ . , : = @ + / % - are allowed"
                )


_MEETING = (
    'MASTER_ADDR="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?this file is for sbatch}" | head -n 1)"',
    "# a port of the job's own, so that two jobs that share a first machine do not meet",
    'MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"',
    "export MASTER_ADDR MASTER_PORT",
)
# srun is waited for in the background, because bash runs a trap only between commands. SIGUSR1 goes to the steps (not
# --batch); there only the training processes heed it: they agree on a step, save and end. SIGTERM, which SLURM sends
# to all when the job is cancelled or preempted, does the same, and then the job is not requeued from here.
_SIGNALS = (
    "warned=",
    "# shellcheck disable=SC2329",
    "on_warning() {",
    '    [[ -z "$warned" ]] || return 0',
    "    warned=yes",
    '    echo "time is nearly over: telling the run to save and end" >&2',
    '    scancel --signal=USR1 "$SLURM_JOB_ID"',
    "}",
    "trap on_warning USR1",
    "trap : TERM",
    "# torchrun must not pass on a SIGTERM that its processes had from SLURM: a second one would end them at once",
    "export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT",
)


def render_slurm(job: Job, slurm: Slurm, command: Sequence[str]) -> str:
    """The sbatch script. Raises ConfigError for an elastic job: SLURM's allocations are fixed."""
    if job.elastic:
        raise ConfigError(
            f"--nodes {job.node_range}: SLURM gives a job a fixed number of machines; give one number. When one "
            "fails, the job is requeued and continues from its newest checkpoint"
        )
    directives = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(job.gpus) if job.gpus else None,
        "cpus-per-task": str(slurm.cpus) if slurm.cpus else None,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "output": slurm.output,
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.warn}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    lines += ["#SBATCH --requeue", *(["#SBATCH --exclusive"] if slurm.exclusive else [])]
    note = "Submit it with sbatch, from a folder that all machines share. Prepare the data once before."
    return (
        "\n".join(
            [
                "#!/usr/bin/env bash",
                *lines,
                *header(command, [note]),
                *preparation(job),
                *_SIGNALS,
                *_step(job),
                *AWAIT,
                *_requeue(slurm),
                'exit "$status"',
            ]
        )
        + "\n"
    )


def _step(job: Job) -> list[str]:
    """srun with torchrun on every machine."""
    options, meeting = ALONE_OPTIONS, list(ALONE)
    if job.nodes > 1:
        # each machine sees its own SLURM_NODEID, so it is read there
        options = "--node-rank $SLURM_NODEID --master-addr $MASTER_ADDR --master-port $MASTER_PORT"
        meeting = list(_MEETING)
    start = f"python -m torch.distributed.run --nnodes {job.nodes} --nproc-per-node {job.processes} {options}"
    return [
        *meeting,
        "# shellcheck disable=SC2016",
        f'srun --kill-on-bad-exit=1 bash -c \'trap "" TERM USR1; exec {start} "$@"\' torchrun \\',
        f"    {words(job)} &",
        "child=$!",
    ]


def _requeue(slurm: Slurm) -> list[str]:
    return [
        f'if [[ -n "$warned" ]] && ((${{SLURM_RESTART_COUNT:-0}} < {slurm.requeues})); then',
        '    echo "requeued: the run continues from its newest checkpoint" >&2',
        '    scontrol requeue "$SLURM_JOB_ID"',
        "fi",
    ]
