"""An sbatch script: one task per machine, a signal before the time limit, requeue and resume."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from muon_dist.errors import ConfigError
from muon_dist.launcher.job import Job
from muon_dist.launcher.shell import header, script, words

# Characters allowed in sbatch's options. sbatch parses #SBATCH lines with its own rules for quotes, so a value that
# needs quotes is refused.
_TIME = re.compile(r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d{1,2}(:\d{2}){0,2})$")
_WORD = re.compile(r"^[A-Za-z0-9_./%][A-Za-z0-9_.,:=@+/%-]*$")


@dataclass(frozen=True)
class Slurm:
    """Options of sbatch; None: the option is left out.

    warn: seconds before the time limit at which the run is told to save and end. requeues: how often the job may
    requeue itself.
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
    note = "Submit it with sbatch, from a folder that all machines share. Prepare the data once before."
    return script(
        "slurm.sbatch", job=job, slurm=slurm, directives=directives, header=header(command, note), words=words(job)
    )
