"""Processes of one run: how they meet."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError

PATIENCE = timedelta(hours=24).total_seconds()
"""Seconds that ranks wait for the first one, which may prepare data for hours."""


def rank() -> int:
    """This process's rank, from torch.distributed or else from the launcher's environment; 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else _number("RANK", 0)


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its node."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError as error:
        raise ConfigError(f"the environment variable {name} is {text!r}: the launcher sets a number") from error


def start(timeout_seconds: float = 1800.0, use_cpu: bool = False) -> bool:
    """Join the default process group when a launcher started several processes; True when that was done here.

    gloo on CPU, NCCL beside it with CUDA. With MUON_DIST_STORE (launch/torchrun.sh, one node) the processes meet in
    that file, and no store listens on the network; else as MASTER_ADDR and MASTER_PORT say.

    Args:
        timeout_seconds: of each collective.
        use_cpu: leave GPUs alone.

    Raises:
        ConfigError: this process has no GPU of its own although the machine has some.
    """
    if dist.is_initialized() or world_size() == 1:
        return False
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if torch.cuda.is_available() and not use_cpu:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    path = os.environ.get("MUON_DIST_STORE")
    if path is None:
        dist.init_process_group(backend, timeout=timeout)
        return True
    # A restarted group must not meet what the failed one left in the file.
    path = f"{path}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.FileStore(path, world_size())
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)
    return True


def _own_gpu(visible: int) -> int:
    """The index of this process's GPU among the `visible` ones: its number on the node."""
    if local_rank() < visible:
        return local_rank()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "is not set" if named is None else f"is {named!r}"
    raise ConfigError(
        f"process {local_rank()} of this machine (LOCAL_RANK) has no GPU: torch sees {visible}, and each process "
        f"needs one. Start at most {visible} processes here (--nproc-per-node {visible}), make more GPUs visible "
        f"(CUDA_VISIBLE_DEVICES {shown}; of a GPU split by MIG torch sees one instance), or train on the CPU "
        "(trainer.use_cpu=true)"
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
