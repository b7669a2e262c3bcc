"""Processes of one run: meeting, and doing things once."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError, MuonDistError

T = TypeVar("T")

# Preparing data on the first rank may take hours; the others wait on gloo, whose timeout is this.
_PATIENCE = timedelta(hours=24)


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
        raise ConfigError(f"the environment variable {name} is {text!r}, not a number: the launcher sets it") from error


def start(timeout_seconds: float = 1800.0) -> None:
    """Join the default process group when a launcher started several processes.

    gloo on CPU, NCCL beside it with CUDA. With MUON_DIST_STORE (launch/torchrun.sh, one node) the processes meet in
    that file, and no store listens on the network; else as MASTER_ADDR and MASTER_PORT say.
    """
    if dist.is_initialized() or world_size() == 1:
        return
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    path = os.environ.get("MUON_DIST_STORE")
    if path is None:
        dist.init_process_group(backend, timeout=timeout)
        return
    # A restarted group must not meet what the failed one left in the file.
    path = f"{path}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.FileStore(path, world_size())
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def once(work: Callable[[], T]) -> T:
    """Run `work` on the first rank while the others wait, and give its (picklable) result to all.

    A MuonDistError there is raised on every rank, so that none is left waiting.
    """
    if world_size() == 1:
        return work()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    message: list[Any] = [None]
    failure: Exception | None = None
    if rank() == 0:
        try:
            message = [(True, work())]
        except Exception as error:
            failure = error
            known = type(error) if isinstance(error, MuonDistError) else MuonDistError
            message = [(False, (known, f"rank 0: {error}"))]
    dist.broadcast_object_list(message, src=0, group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    done, value = message[0]
    if not done:
        kind, text = value
        raise kind(text)
    return cast(T, value)


def on_each_node(work: Callable[[], Any]) -> None:
    """Run `work` on the first rank, then on the first process of every other node.

    With a shared file system the later ones find everything done; without one, each node does its own.
    """
    once(lambda: bool(work() or True))
    if world_size() == 1:
        return
    failure: Exception | None = None
    if local_rank() == 0 and rank() != 0:
        try:
            work()
        except Exception as error:
            failure = error
    outcomes: list[Any] = [None] * world_size()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.all_gather_object(outcomes, str(failure) if failure is not None else None, group=group)
    dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    for other, text in enumerate(outcomes):
        if text is not None:
            raise MuonDistError(f"rank {other}: {text}")
