"""Forked ranks that run one function after another: a fork of a large process costs more than most functions.

The ranks are replaced as soon as one is not as it was: when it died, or its function left behind patched code, a
thread, a device mesh, another default dtype or DeepSpeed's state. They are also replaced when the code of this process
is no longer that from which they were forked.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing as mp
import os
import pickle
import random
import sys
import tempfile
import threading
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.tensor.debug
from torch.distributed.device_mesh import DeviceMesh

from muon_dist.bench import ranks
from muon_dist.routing.announce import _shown

KEPT_AT_MOST = 4
WATCHED = ("torch.distributed", "torch.distributed.distributed_c10d", "torch.distributed.fsdp", "transformers.trainer")
"""Modules whose functions tests patch, beside all of muon_dist."""

Fingerprint = dict[tuple[str, str], Any]
"""By module or class and name: the value, kept alive so that no other value gets its identity."""


@dataclass(frozen=True)
class _Outcome:
    """What a rank came to: `value` is the result or, if not `good`, the traceback."""

    good: bool
    value: Any
    left_changed: bool


class KeptRanks:
    """Ranks that stay. They are forked when first needed, from the process as it is then."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.forks = self.jobs = 0
        self._members: list[tuple[Any, Connection]] = []
        self._parent: Fingerprint = {}
        self._unsuited: set[Callable[..., Any]] = set()

    def suits(self, fn: Callable[..., Any]) -> bool:
        """Whether kept ranks can run `fn`: it left no rank changed before."""
        return fn not in self._unsuited

    def run(self, fn: Callable[..., Any], world_size: int, args: tuple, timeout: float) -> list[Any]:
        """`fn(*args)` on the first `world_size` ranks; raises as `muon_dist.bench.ranks.run_ranks`."""
        self.jobs += 1
        if self._members and changed(self._parent, code_of_process()):
            self.close()
        self._fork_up_to(world_size)
        used = self._members[:world_size]
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, (_, pipe) in enumerate(used):
                job = (fn, rank, world_size, store, timeout, args, dict(os.environ), os.getcwd(), random_state())
                pipe.send_bytes(pickle.dumps(job))
            outcomes = self._collect(used, timeout)
        if any(outcome.left_changed for outcome in outcomes):
            self.close()
            self._unsuited.add(fn)
        failures = [f"--- rank {r}\n{outcome.value}" for r, outcome in enumerate(outcomes) if not outcome.good]
        if failures:
            raise ranks.RankFailure("\n".join(failures))
        return [outcome.value for outcome in outcomes]

    def _collect(self, used: list[tuple[Any, Connection]], timeout: float) -> list[_Outcome]:
        outcomes: dict[int, _Outcome] = {}
        end = time.monotonic() + timeout
        while len(outcomes) < len(used):
            waiting: dict[Any, int] = {pipe: r for r, (_, pipe) in enumerate(used) if r not in outcomes}
            ready: list[Any] = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))  # type: ignore[assignment]
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answer, left_changed = pickle.loads(pipe.recv_bytes())
                    outcomes[rank] = _Outcome(*pickle.loads(answer), left_changed=left_changed)
                except (EOFError, OSError):
                    process = used[rank][0]
                    process.join(5)
                    text = f"rank {rank} died without a result (exit {process.exitcode})"
                    outcomes[rank] = _Outcome(False, text, left_changed=True)
            if not ready:
                for rank in waiting.values():
                    outcomes[rank] = _Outcome(False, f"rank {rank}: no result within {timeout} s", left_changed=True)
        return [outcomes[rank] for rank in range(len(used))]

    def close(self) -> None:
        """End the ranks, whatever they do. A fork of this process leaves them alone."""
        if os.getpid() != self.owner:
            return
        for process, pipe in self._members:
            process.kill()
            process.join()
            pipe.close()
        self._members.clear()

    def _fork_up_to(self, world_size: int) -> None:
        if not self._members:
            self._parent = code_of_process()
        if not self.forks:
            atexit.register(self.close)  # before that of multiprocessing, which waits for the ranks
        sys.stdout.flush()
        sys.stderr.flush()
        _caches[:] = caches()  # a rank does not find those among its own objects, as they are frozen there
        # Objects that are frozen are not touched by the ranks' garbage collector, so their pages stay shared.
        gc.freeze()
        while len(self._members) < world_size:
            context = mp.get_context("fork")
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,))
            process.start()
            there.close()
            self._members.append((process, here))
            self.forks += 1
        gc.unfreeze()


class _Answer:
    """Stands for the pipe of `_rank_main`: keeps the outcome until the rank has tidied up."""

    outcome = b""

    def send_bytes(self, outcome: bytes) -> None:
        self.outcome = outcome

    def close(self) -> None:
        """The pipe stays open for the next function."""


def _serve(pipe: Connection) -> None:
    """What a rank does until its parent ends."""
    parent = os.getppid()
    _follow_meshes()
    before: Fingerprint = {}
    while True:
        while not pipe.poll(2.0):  # ranks hold each other's ends of pipes: none sees that the parent has died
            if os.getppid() != parent:
                os._exit(0)
        fn, rank, world_size, store, timeout, args, environment, folder, state = pickle.loads(pipe.recv_bytes())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        set_random_state(state)
        before = before or state_of_process()
        answer: Any = _Answer()
        ranks._rank_main(fn, rank, world_size, store, timeout, answer, args)
        if dist.is_initialized():  # the function failed; ranks that still wait for this one now see that it left
            dist.destroy_process_group()
        del fn, args
        forget()
        now = state_of_process()
        pipe.send_bytes(pickle.dumps((answer.outcome, bool(changed(before, now)))))
        before = now  # with the modules that were imported since


_caches: list[Any] = []


def caches() -> list[Any]:
    """Of torch.distributed, among the objects that are not frozen."""
    kind = functools._lru_cache_wrapper
    return [x for x in gc.get_objects() if type(x) is kind and str(x.__module__).startswith("torch.distributed")]


DTENSOR_CACHES = {
    "torch.distributed.tensor._redistribute": "clear_redistribute_planner_cache",
    "torch.distributed.tensor.debug": "_clear_sharding_prop_cache",
}
"""Caches that are no `functools.lru_cache`: module and function that empties them. An older torch has fewer."""

_meshes: list[weakref.ref[DeviceMesh]] = []


def _follow_meshes() -> None:
    """Know each device mesh from here on."""
    original = DeviceMesh.__init__

    def followed(self: DeviceMesh, *args: Any, **options: Any) -> None:
        _meshes.append(weakref.ref(self))
        original(self, *args, **options)

    DeviceMesh.__init__ = followed  # type: ignore[method-assign]


def meshes_left() -> int:
    """Device meshes that something still holds, and so the names of dead process groups.

    DTensor's caches hold them: they are emptied.
    """
    if any(mesh() is not None for mesh in _meshes):
        for cache in _caches + caches():
            cache.cache_clear()
        for module, clear in DTENSOR_CACHES.items():
            getattr(sys.modules.get(module), clear, lambda: None)()
        gc.collect()
    _meshes[:] = [mesh for mesh in _meshes if mesh() is not None]
    return len(_meshes)


def random_state() -> tuple[Any, ...]:
    """Of Python, NumPy and torch."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Take over what `random_state` gave in another process."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def code_of_process() -> Fingerprint:
    """Identities of functions, classes, methods and module variables in the watched packages: patches change them."""
    found: Fingerprint = {}
    for name, module in list(sys.modules.items()):
        ours = name.partition(".")[0] == "muon_dist"
        if not isinstance(module, types.ModuleType) or not (ours or name in WATCHED):
            continue
        for key, value in list(vars(module).items()):
            if key.startswith("__"):
                continue
            if callable(value):
                found[name, key] = value
                if ours and isinstance(value, type) and value.__module__ == name:
                    found |= {(f"{name}.{key}", k): _unhooked(v) for k, v in vars(value).items() if callable(v)}
            elif ours:
                found[name, key] = (value, len(value)) if isinstance(value, list | dict | set) else value
    return found


def _unhooked(method: Any) -> Any:
    """torch.optim wraps `step` of a class when the first optimizer is made; the method itself."""
    return method.__wrapped__ if getattr(method, "hooked", False) else method


def state_of_process() -> Fingerprint:
    """What a test must leave as it was: code, and settings that hold for the whole process."""
    deepspeed = sys.modules.get("deepspeed.comm.comm")
    settings = {
        "threads": tuple(sorted(thread.name for thread in threading.enumerate())),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch threads": torch.get_num_threads(),
        "meshes": meshes_left(),
        "deepspeed": getattr(deepspeed, "cdb", None) is not None,
    }
    return code_of_process() | {("process", key): value for key, value in settings.items()}


def changed(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What of `before` is no longer the same; what came newly is only an import."""
    return [".".join(key) for key, value in before.items() if not _same(value, now.get(key))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, str | int | float) and type(a) is type(b) and a == b)


def forget() -> None:
    """Drop what accelerate and the routing tables remember of earlier tests: a process is then as good as new."""
    _shown.clear()
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
