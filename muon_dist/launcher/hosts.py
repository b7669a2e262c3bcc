"""Files for DeepSpeed's and accelerate's own launchers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from muon_dist.errors import ConfigError
from muon_dist.launcher.job import Job, check_address
from muon_dist.launcher.shell import header, words


@dataclass(frozen=True)
class Files:
    """A file for a launcher, and the command that uses it. In the command, {file} stands for the file's path."""

    text: str
    command: str


def render_hostfile(job: Job, hosts: Sequence[str], port: int, command: Sequence[str]) -> Files:
    """DeepSpeed's hostfile, one line per machine, and the command for the first machine (one machine: without the
    file).

    Raises ConfigError if the number of hosts is not the number of machines, a host is named twice, or the job is
    elastic.
    """
    _fixed(job, "deepspeed")
    if len(hosts) != job.nodes or len(set(hosts)) != len(hosts):
        raise ConfigError(f"--host: {len(set(hosts))} different hosts for --nodes {job.nodes}; name each once")
    for host in hosts:
        check_address(host, port, 1)
    lines = [header(command), *(f"{host} slots={job.processes}" for host in hosts)]
    # --module: a module follows; --no_local_rank: muon-dist reads the local rank from the environment
    last = ["--master_port", str(port), "--no_local_rank", "--module"]
    if job.nodes == 1:
        # with a hostfile DeepSpeed uses ssh even to this machine; without one it reads /job/hostfile
        where = shlex.join(["--hostfile", "/dev/null", "--num_gpus", str(job.processes), *last])
    else:
        where = f"--hostfile {{file}} {shlex.join(['--master_addr', hosts[0], *last])}"
    run = f"deepspeed {where} {words(job).removeprefix('-m ')}"
    return Files(text="\n".join(lines) + "\n", command=run)


def render_accelerate(job: Job, address: str, port: int, command: Sequence[str]) -> Files:
    """accelerate's configuration file, the same for all machines, and the command for each of them.

    Raises ConfigError for an elastic job, and for several processes without GPUs.
    """
    _fixed(job, "accelerate")
    if not job.gpus and job.nodes * job.processes > 1:
        raise ConfigError("accelerate starts several processes without GPUs only through mpirun; use launch torchrun")
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "NO" if job.nodes * job.processes == 1 else "MULTI_GPU",
        "main_training_function": "main",
        # the Trainer sets the precision itself, from trainer.bf16 and trainer.fp16
        "mixed_precision": "no",
        "num_machines": job.nodes,
        "num_processes": job.nodes * job.processes,
        "machine_rank": 0,
        "main_process_ip": address,
        "main_process_port": port,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": job.gpus == 0,
    }
    text = f"{header(command)}\n{yaml.safe_dump(settings, sort_keys=False)}"
    rank = " --machine_rank NODE_RANK" if job.nodes > 1 else ""
    return Files(text=text, command=f"accelerate launch --config_file {{file}}{rank} {words(job)}")


def variables(job: Job) -> list[str]:
    """NAME=VALUE of the environment that the processes need on every machine."""
    found = [f"OMP_NUM_THREADS={job.threads}", "TOKENIZERS_PARALLELISM=false"]
    if job.interface is not None:
        found += [f"GLOO_SOCKET_IFNAME={job.interface}", f"NCCL_SOCKET_IFNAME={job.interface}"]
    return found


def _fixed(job: Job, launcher: str) -> None:
    if job.elastic:
        raise ConfigError(f"--nodes {job.node_range}: {launcher} has a fixed number of machines; use launch torchrun")
