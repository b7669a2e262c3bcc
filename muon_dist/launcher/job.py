"""The command to run and its machines: the input of every launcher's file, checked before a file is written."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muon_dist.errors import ConfigError

# Host names (RFC 1123) and addresses: they need no quoting in any file.
_HOST = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$|^[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*$")
_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$")
_INTERFACE = re.compile(r"^[A-Za-z0-9._@-]{1,15}$")  # IFNAMSIZ - 1
_NODES = re.compile(r"^([1-9][0-9]{0,5})(?::([1-9][0-9]{0,5}))?$")
DEFAULT_PORT = 29500  # torchrun's own


@dataclass(frozen=True)
class Job:
    """One run of `muon-dist train` on a number of machines.

    Attributes:
        name: name of the run.
        arguments: words after `muon-dist`; any text, quoted wherever they are written.
        fewest_nodes, nodes: machines; they differ when the job is elastic.
        gpus: GPUs per machine; 0 for CPU.
        processes: processes on each machine.
        folder: working folder, the same on all machines; None: the folder in which the launcher's file is started.
        environment: folder of a Python virtual environment to activate; None: the python in PATH.
        interface: network interface of gloo and NCCL; None: gloo and NCCL choose.
        threads: OMP_NUM_THREADS per process.
    """

    name: str
    arguments: tuple[str, ...]
    fewest_nodes: int = 1
    nodes: int = 1
    gpus: int = 0
    processes: int = 1
    folder: str | None = None
    environment: str | None = None
    interface: str | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(f"--name: {self.name!r} is not a valid job name: letters, digits and _ . -, no . first")
        if self.interface is not None and not _INTERFACE.match(self.interface):
            raise ConfigError(f"--interface: {self.interface!r} is not a valid network interface, such as eth0")
        for option, text in (("--folder", self.folder), ("--venv", self.environment), *self._words()):
            if text is not None and ("\0" in text or "\n" in text):
                raise ConfigError(
                    f"{option}: {text!r} contains a line break or a zero byte, which no launcher can pass on"
                )

    def _words(self) -> list[tuple[str, str]]:
        return [("argument", word) for word in self.arguments]

    @property
    def elastic(self) -> bool:
        """Whether the number of machines may change while it runs."""
        return self.fewest_nodes != self.nodes

    @property
    def node_range(self) -> str:
        """ "4", or "2:4" when elastic."""
        return f"{self.fewest_nodes}:{self.nodes}" if self.elastic else str(self.nodes)


def parse_nodes(text: str) -> tuple[int, int]:
    """ "4" -> (4, 4), "2:4" -> (2, 4). Raises ConfigError for anything else."""
    match = _NODES.match(text)
    if match is None:
        raise ConfigError(f"--nodes: {text!r} is neither a number of machines, such as 4, nor a range, such as 2:4")
    fewest, most = int(match[1]), int(match[2] or match[1])
    if fewest > most:
        raise ConfigError(f"--nodes: {text!r} begins above its end")
    return fewest, most


def check_address(address: str, port: int, nodes: int) -> list[str]:
    """Warnings about a rendezvous address, which every machine must reach, but no one else should.

    Raises ConfigError if it cannot work: not a host name or address, a port out of range, loopback for several
    machines.
    """
    if not _HOST.match(address):
        raise ConfigError(f"--master-addr: {address!r} is not a host name or address")
    if not 1024 <= port <= 65535:
        raise ConfigError(f"--master-port: {port} is not between 1024 and 65535")
    try:
        ip: Any = ipaddress.ip_address(address)
    except ValueError:
        ip = None
    loopback = address == "localhost" or (ip is not None and ip.is_loopback)
    if loopback and nodes > 1:
        raise ConfigError(
            f"--master-addr: {address} is this machine only; {nodes} machines need an address that all reach"
        )
    if nodes == 1:
        return []
    if ip is not None and ip.is_global:
        return [
            f"--master-addr {address} is a public address: the rendezvous of torch.distributed listens there without "
            f"a password, and who reaches port {port} can run code in the job. Use a private address, or a firewall"
        ]
    return [
        "the rendezvous of torch.distributed listens on every interface of the first machine, without a password: "
        "no interface of it may be public (muon-dist doctor looks)"
    ]


def check_resumable(settings: Mapping[str, Any], job: Job, repeated: str | None) -> list[str]:
    """Warnings about a configuration whose run should continue after an interruption, or on fewer machines.

    settings: the configuration as plain data. repeated: the event that starts the same command again ("SLURM's
    requeue"), or None.
    """
    trainer, warnings = settings.get("trainer", {}), []
    again = "an elastic restart" if job.elastic else repeated
    if again is not None and trainer.get("save_strategy") == "no":
        warnings.append(f"trainer.save_strategy is no: after {again} the run begins again")
    if not job.elastic:
        return warnings
    batch = settings.get("data", {}).get("global_batch_size")
    if batch is None:
        warnings.append(
            "data.global_batch_size is not set: with fewer machines the batch shrinks, and the loss curve changes"
        )
    else:
        sizes = range(job.fewest_nodes, job.nodes + 1)
        uneven = [str(n) for n in sizes if batch % (n * job.processes)]
        if uneven:
            warnings.append(
                f"data.global_batch_size: {batch} samples cannot be shared by the {job.processes} processes of each "
                f"of {', '.join(uneven)} machines: the run ends there; choose a multiple"
            )
    timeout = trainer.get("ddp_timeout", 1800)
    if timeout > 600:
        warnings.append(f"trainer.ddp_timeout is {timeout} s: the other machines wait this long for a lost machine")
    return warnings
