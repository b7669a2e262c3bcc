"""A shell script that starts torchrun, to be run once on every machine."""

from __future__ import annotations

from collections.abc import Sequence

from muon_dist.launcher.job import DEFAULT_PORT, Job
from muon_dist.launcher.shell import header, script, words


def render_torchrun(
    job: Job,
    command: Sequence[str],
    *,
    address: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    static: bool = False,
    restarts: int | None = None,
) -> str:
    """The script. `static`: each machine gets its number; else machines may start in any order (c10d rendezvous).

    After a failure an elastic job restarts at most `restarts` times (default 3); other jobs default to 0.
    """
    numbered = job.nodes > 1 and static and not job.elastic
    if job.nodes == 1:
        how = "Run it on one machine; no port is open to other machines."
    elif numbered:
        how = f"Run it on each of the {job.nodes} machines with its number: bash FILE 0 on {address}, bash FILE 1, ..."
    else:
        how = f"Run it on each of the {job.nodes} machines, in any order; they meet at {address}."
    return script(
        "torchrun.sh",
        job=job,
        header=header(command, how),
        words=words(job),
        numbered=numbered,
        address=address,
        port=port,
        endpoint=endpoint(address, port),
        restarts=restarts if restarts is not None else 3 if job.elastic else 0,
    )


def endpoint(address: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
