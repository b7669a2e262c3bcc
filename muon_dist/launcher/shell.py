"""Lines of shell that the launchers' files share. Every word from outside is quoted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from muon_dist.launcher.job import Job

# One machine: the processes meet in files, and nothing listens beyond the loopback interface. torchrun would share a
# TCP store that listens everywhere; muon_dist makes a file store of MUON_DIST_STORE instead (train/distributed.py).
ALONE = (
    'meeting="$(mktemp -d "${TMPDIR:-/tmp}/muon-dist.XXXXXXXX")"',
    "trap 'rm -rf -- \"$meeting\"' EXIT",
    'export meeting TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 MUON_DIST_STORE="$meeting/store"',
    'export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"',
)
ALONE_OPTIONS = (
    '--rdzv-backend c10d --rdzv-endpoint "$meeting/rendezvous" --rdzv-conf store_type=file --local-addr 127.0.0.1'
)
# c10d on several machines: each round of the rendezvous gets a store of its own. In a store that rounds share, keys
# differ by each machine's count of restarts alone, and a machine that restarts because another failed does not count:
# it would read what the lost round left there.
OWN_STORE = "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
# A signal ends `wait` early; bash remembers the status of a process that is gone.
AWAIT = (
    'while kill -0 "$child" 2>/dev/null; do',
    '    wait "$child" || true',
    "done",
    "status=0",
    'wait "$child" || status=$?',
)
# A signal is passed on to torchrun, and from it to the processes.
WAIT = (
    "child=$!",
    "trap 'kill -TERM \"$child\" 2>/dev/null || true' TERM INT",
    *AWAIT,
    'exit "$status"',
)


def header(command: Sequence[str], notes: Sequence[str]) -> list[str]:
    """The comment at the top of a file: the command that made it, and notes."""
    made = shlex.join(command).replace("\n", " ")
    return [f"# Made by: {made}", *(f"# {note}" for note in notes)]


def preparation(job: Job) -> list[str]:
    """Folder, Python environment, threads and network interface."""
    lines = ["set -euo pipefail"]
    if job.folder is not None:
        lines.append(f"cd -- {shlex.quote(job.folder)}")
    if job.environment is not None:
        lines.append(f"source {shlex.quote(job.environment + '/bin/activate')}")
    lines.append(f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-{job.threads}}}" TOKENIZERS_PARALLELISM=false')
    if job.interface is not None:
        lines.append(f"export GLOO_SOCKET_IFNAME={job.interface} NCCL_SOCKET_IFNAME={job.interface}")
    return lines


def words(job: Job) -> str:
    """`-m muon_dist.cli ...`, quoted."""
    return shlex.join(["-m", "muon_dist.cli", *job.arguments])


def torchrun(job: Job, options: str, program: str | None = None) -> list[str]:
    """torchrun on this machine as the end of a script.

    options: those of the rendezvous, in shell's words. program: the words after them, `words(job)` by default.
    """
    program = words(job) if program is None else program
    start = f"python -m torch.distributed.run --nnodes {job.node_range} --nproc-per-node {job.processes}"
    if job.nodes == 1:
        return [*ALONE, f"{start} {ALONE_OPTIONS} \\\n    {program} &", *WAIT]
    own = [OWN_STORE] if "c10d" in options else []
    return [*own, f"exec {start} {options} \\\n    {program}"]


def script(*parts: Sequence[str]) -> str:
    """A bash script of these lines."""
    return "\n".join(line for part in parts for line in part) + "\n"
