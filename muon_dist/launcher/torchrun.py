"""A shell script that starts torchrun, to be run once on every machine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from muon_dist.launcher.job import DEFAULT_PORT, Job
from muon_dist.launcher.shell import header, preparation, script, torchrun

_NODE_RANK = (
    'node_rank="${1:-}"',
    '[[ "$node_rank" =~ ^[0-9]+$ ]] || {',
    '    echo "usage: bash $0 NODE_RANK, from 0 on the machine that the others meet at" >&2',
    "    exit 2",
    "}",
)


def render_torchrun(
    job: Job,
    command: Sequence[str],
    *,
    address: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    static: bool = False,
    restarts: int | None = None,
) -> str:
    """The script. `static`: each machine is told its number; else they come in any order (c10d rendezvous).

    An elastic job is started again `restarts` times (3 by default) after a failure, another never.
    """
    if job.nodes == 1:
        how, options = "Run it on one machine; nothing listens beyond the loopback interface.", ""
    elif static and not job.elastic:
        how = f"Run it on each of the {job.nodes} machines with its number: bash FILE 0 on {address}, bash FILE 1, ..."
        options = f'--node-rank "$node_rank" --master-addr {address} --master-port {port}'
    else:
        how = f"Run it on each of the {job.nodes} machines, in any order; they meet at {address}."
        options = f"--rdzv-backend c10d --rdzv-id {job.name} --rdzv-endpoint {shlex.quote(endpoint(address, port))}"
    restarts = restarts if restarts is not None else 3 if job.elastic else 0
    if job.nodes > 1:
        options += f" --max-restarts {restarts}"
    rank = _NODE_RANK if "node_rank" in options else ()
    return script(
        ["#!/usr/bin/env bash"], header(command, [how]), preparation(job)[:1], rank, preparation(job)[1:],
        torchrun(job, options),
    )  # fmt: skip


def endpoint(address: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
