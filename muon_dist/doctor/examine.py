"""All checks: of this machine, or under torchrun of every machine of a job and of the links between them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from muon_dist.doctor import cluster, machine, network, software
from muon_dist.doctor.verdict import Verdict, attempt
from muon_dist.errors import MuonDistError
from muon_dist.train import distributed


def examine_machine(folder: Path, port: int | None, several: bool = False) -> list[Verdict]:
    """The checks of this machine. folder: folder for checkpoints. port: port of the rendezvous; None: it is in use by
    this job."""
    checks: dict[str, Callable[[], list[Verdict]]] = {
        "versions": software.check_versions,
        "devices": software.check_devices,
        "backends": software.check_backends,
        "combinations": software.check_combinations,
        "limits": machine.check_limits,
        "shared memory": machine.check_shared_memory,
        "extension locks": machine.check_locks,
        "disk": lambda: machine.check_disk(folder),
        "interfaces": network.check_interfaces,
        "host name": lambda: network.check_hostname(several=several),
    }
    if port is not None:
        checks["port"] = lambda: network.check_port(port)
    return [verdict for name, look in checks.items() for verdict in attempt(name, look)]


def examine(folder: Path, port: int, timeout: float) -> list[Verdict]:
    """Run all checks; with several processes also the checks between machines.

    Every rank must call it, and gets all verdicts. timeout: seconds for one exchange between machines.
    """
    if distributed.world_size() == 1:
        return examine_machine(folder, port)
    try:
        distributed.start(timeout)
    except MuonDistError:
        raise
    except Exception as error:
        fix = "check the port and the interfaces of the first machine, and the firewalls between the machines"
        text = f"rank {distributed.rank()} cannot reach the other ranks: {error}"
        return [*examine_machine(folder, None, several=True), Verdict("meeting", "problem", text, fix)]
    try:
        return _together(folder)
    except RuntimeError as error:  # gloo and NCCL raise their own errors if a rank does not answer
        fix = "the machine that reports no such error is the one that does not answer"
        text = (
            f"on {socket.gethostname()} (rank {distributed.rank()}) an exchange failed within {timeout:g} s: {error}"
        )
        return [*examine_machine(folder, None, several=True), Verdict("meeting", "problem", text, fix)]
    finally:
        distributed.stop()


def _together(folder: Path) -> list[Verdict]:
    ranks, names = cluster.one_rank_a_host()
    several = len(names) > 1
    own: list[Verdict] = []
    if dist.get_rank() in ranks:
        own = examine_machine(folder, None, several)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (own, software.installed()))
    found = []
    for rank, name in zip(ranks, names, strict=True):
        found += [Verdict(v.check, v.level, v.text, v.fix, name, v.figures) for v in parts[rank][0]]
    found += cluster.check_collective()
    if several:
        found += cluster.judge_versions([parts[rank][1] for rank in ranks], names)
        found += cluster.judge_links(cluster.measure_links(ranks), names)
        found += cluster.judge_clocks(cluster.measure_clocks(ranks), names)
    return found
