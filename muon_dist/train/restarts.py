"""Detects a restart of the launch that made the run folder; such a process resumes by itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from muon_dist.json_files import read_object


def launch_names(environment: Mapping[str, str] | None = None, *, restarting: bool = False) -> list[str]:
    """Names of the launch to which this process belongs; none for a process that was started by hand.

    MUON_DIST_LAUNCH_ID, if set. torchrun's run id, which all its restarts share; without an id (static rendezvous),
    the agent: host, process, start time. A SLURM job; with `restarting` only if SLURM says that it was requeued,
    because one allocation may run a command several times.

    restarting: return the names that identify a restart, instead of the names to record.
    """
    env = os.environ if environment is None else environment
    names = []
    if own := env.get("MUON_DIST_LAUNCH_ID"):
        names.append(f"launch {own}")
    if "TORCHELASTIC_RUN_ID" in env:
        run_id = env["TORCHELASTIC_RUN_ID"]
        names.append(f"torchrun {run_id}" if run_id not in ("", "none") else f"agent {_parent()}")
    if (job := env.get("SLURM_JOB_ID")) and (not restarting or int(env.get("SLURM_RESTART_COUNT") or 0) > 0):
        names.append(f"slurm {job}")
    return names


def _parent() -> str:
    """Host, number and start time of the parent process; the start time tells it from a later process with the same
    number."""
    pid = os.getppid()
    try:
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()} {pid} {started}"


def is_restart(record: Path) -> bool:
    """Whether an earlier start of this process's launch wrote `record`."""
    try:
        left = read_object(record)["names"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(left, list) and not set(launch_names(restarting=True)).isdisjoint(left)
