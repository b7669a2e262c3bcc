"""Processes of one run: how they meet."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError, PeerError

PATIENCE = timedelta(hours=24).total_seconds()
"""Seconds that other ranks wait for rank 0, which may prepare data for hours."""

_lent: list[str] = []


def rank() -> int:
    """This process's rank, from torch.distributed or else from the launcher's environment; 0 in a run of one
    process."""
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


def start(timeout_seconds: float = 1800.0, use_cpu: bool = False, alone: bool = False) -> bool:
    """Join the default process group if a launcher started several processes. Returns True if this call joined it.

    gloo for CPU tensors, and NCCL for CUDA tensors. With MUON_DIST_STORE (launch/torchrun.sh, one node) the processes
    meet in that file, and no store listens on the network; else at MASTER_ADDR and MASTER_PORT.

    Args:
        timeout_seconds: of each collective.
        use_cpu: leave GPUs alone.
        alone: make a group also for a single process; DeepSpeed needs one, else it looks for MPI.

    Raises:
        ConfigError: this process has no GPU of its own although the machine has some, or the launcher's environment
            variables are incomplete or wrong.
        PeerError: the processes cannot meet: the port is taken, the address is wrong, or one is absent.
    """
    if world_size() < 1:
        raise ConfigError(f"the environment variable WORLD_SIZE is {world_size()}: it counts the processes of the run")
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return False
    if world_size() > 1:
        _check_environment()
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if torch.cuda.is_available() and not use_cpu:
        torch.cuda.set_device(_own_gpu(torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    path = os.environ.get("MUON_DIST_STORE")
    if world_size() == 1:
        for name, value in (("LOCAL_RANK", "0"), ("GLOO_SOCKET_IFNAME", "lo")):
            if name not in os.environ:
                os.environ[name] = value
                _lent.append(name)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return True
    if path is None:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as error:
            raise PeerError(
                f"rank {rank()} cannot meet the others at MASTER_ADDR={os.environ['MASTER_ADDR']}, "
                f"MASTER_PORT={os.environ['MASTER_PORT']}: {' '.join(str(error).split())}. Is the port free on the "
                "first node, does every node reach that address, and have all processes been started?"
            ) from error
        return True
    # Restarted processes must not read the entries that the failed ones left in the file.
    path = f"{path}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.FileStore(path, world_size())
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)
    return True


def _check_environment() -> None:
    """Raises ConfigError unless the launcher has set all that the processes need to meet."""
    needed = ["RANK", "WORLD_SIZE"]
    if "MUON_DIST_STORE" not in os.environ:
        needed += ["MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, so this is one of several processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: start them with launch/torchrun.sh (or torchrun), or "
            "unset WORLD_SIZE to train in one process"
        )
    if not 0 <= rank() < world_size():
        raise ConfigError(f"the environment variable RANK is {rank()}, and must be below WORLD_SIZE = {world_size()}")
    port = _number("MASTER_PORT", 1)
    if not 0 < port < 1 << 16:
        raise ConfigError(f"the environment variable MASTER_PORT is {port}: a port is a number from 1 to 65535")


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
    """Leave the process group, and take back the variables that `start` set for a group of one."""
    while _lent:
        os.environ.pop(_lent.pop(), None)
    if dist.is_initialized():
        dist.destroy_process_group()
