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


class _Outcome:
    """What a piece of work on one rank came to; travels by pickle."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.value: Any = None
        self.kind: type[MuonDistError] | None = None
        self.text = ""
        self.error: Exception | None = None
        try:
            self.value = work()
        except Exception as error:
            self.error = error
            self.kind = type(error) if isinstance(error, MuonDistError) else MuonDistError
            self.text = str(error) if isinstance(error, MuonDistError) else f"{type(error).__name__}: {error}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "error": None}  # its traceback does not pickle

    def raise_here(self, elsewhere: bool) -> None:
        """Raise what happened; on a rank that only heard of it, marked so that it is reported once."""
        if self.kind is None:
            return
        if self.error is not None:
            raise self.error
        error = self.kind(self.text)
        error.reported_elsewhere = elsewhere  # type: ignore[attr-defined]
        raise error


def once(work: Callable[[], T]) -> T:
    """Run `work` on the first rank while the others wait, and give its (picklable) result to all.

    An error there is raised on every rank, so that none is left waiting.
    """
    if world_size() == 1:
        return work()
    message: list[Any] = [_Outcome(work) if rank() == 0 else None]
    own = message[0]
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.broadcast_object_list(message, src=0, group=group)
    dist.destroy_process_group(group)
    outcome: _Outcome = own or message[0]
    outcome.raise_here(elsewhere=True)
    return cast(T, outcome.value)


def everywhere(work: Callable[[], T]) -> T:
    """Run `work` on every rank; an error on some is raised on all, and reported by the first rank that has it."""
    if world_size() == 1:
        return work()
    own = _Outcome(work)
    found: list[Any] = [None] * world_size()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.all_gather_object(found, (own.kind, own.text), group=group)
    dist.destroy_process_group(group)
    if own.error is not None:
        own.error.reported_elsewhere = (own.kind, own.text) in found[: rank()]  # type: ignore[attr-defined]
        raise own.error
    for kind, text in found:
        if kind is not None:
            error = kind(text)
            error.reported_elsewhere = True
            raise error
    return cast(T, own.value)


def on_each_node(work: Callable[[], Any]) -> None:
    """Run `work` on the first rank, then on the first process of every other node.

    With a shared file system the later ones find everything done; without one, each node does its own.
    """

    def done() -> None:
        work()

    once(done)
    if world_size() == 1:
        return
    own = _Outcome(done) if local_rank() == 0 and rank() != 0 else None
    outcomes: list[Any] = [None] * world_size()
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    dist.all_gather_object(outcomes, own, group=group)
    dist.destroy_process_group(group)
    if own is not None:
        own.raise_here(elsewhere=False)
    for outcome in outcomes:
        if outcome is not None:
            outcome.raise_here(elsewhere=True)
