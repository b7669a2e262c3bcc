"""Forked gloo ranks that may die: the outcome of each, and its time."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it on first use: 2 s that every forked rank would pay again
import torch.distributed as dist

from muon_dist.errors import MuonDistError

GROUP_TIMEOUT = 240.0


@dataclass
class Outcome:
    """The outcome of a rank.

    Attributes:
        code: exit code; minus the number of the signal that ended it; None for a rank that had to be ended here.
        ended: time.time() at which that was seen.
        value: what the function returned, None if it did not.
        error: its standard error.
    """

    code: int | None
    ended: float
    value: Any
    error: str


def _child(fn: Callable[..., Any], rank: int, world: int, folder: Path, timeout: float, args: tuple) -> None:
    code = 1
    try:
        error = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(error, 1)
        os.dup2(error, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest's are elsewhere
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"
        )
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        value = fn(*args)
        dist.barrier()
        (folder / f"value-{rank}").write_bytes(pickle.dumps(value))
        code = 0
    except MuonDistError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def launch(
    fn: Callable[..., Any], world: int, *args: Any, patience: float = 240.0, timeout: float = GROUP_TIMEOUT
) -> list[Outcome]:
    """Run `fn(*args)` on forked ranks until each has ended in some way; the outcomes in rank order.

    patience: seconds after which, or after the others have ended, a rank that is left (a stopped one) is killed.
    timeout: of the process group.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pids: dict[int, int] = {}
        # A rank's garbage collector touches what is not frozen, and so copies every page: 1 s per launch.
        gc.freeze()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, world, folder, timeout, args)
            pids[pid] = rank
        gc.unfreeze()
        codes = _collect(pids, patience)
        out = []
        for rank in range(world):
            value, error = folder / f"value-{rank}", folder / f"stderr-{rank}"
            code, ended = codes[rank]
            kept = pickle.loads(value.read_bytes()) if code == 0 and value.exists() else None
            text = error.read_text("utf-8", "replace") if error.exists() else ""
            out.append(Outcome(code, ended, kept, text))
        return out


def _collect(pids: dict[int, int], patience: float) -> dict[int, tuple[int | None, float]]:
    codes: dict[int, tuple[int | None, float]] = {}
    waiting = dict(pids)
    began = time.monotonic()
    while waiting:
        for pid in list(waiting):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[waiting.pop(pid)] = os.waitstatus_to_exitcode(status), time.time()
        stopped = [pid for pid in waiting if _is_stopped(pid)]
        if waiting and (time.monotonic() - began > patience or len(stopped) == len(waiting)):
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            codes.update({rank: (None, time.time()) for rank in waiting.values()})
            break
        time.sleep(0.005)
    return codes


def _is_stopped(pid: int) -> bool:
    """Whether the process lies stopped by a signal (state T in /proc)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text.rpartition(")")[2].split()[0] == "T"


def succeeded(outcomes: list[Outcome]) -> list[Any]:
    """The values of ranks that must all have ended well; an AssertionError with their errors otherwise."""
    bad = [f"--- rank {r}: exit {o.code}\n{o.error}" for r, o in enumerate(outcomes) if o.code != 0]
    assert not bad, "\n".join(bad)
    return [o.value for o in outcomes]
