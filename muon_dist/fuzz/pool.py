"""Forked gloo ranks that run many cases: a fork and a process group take longer than a case."""

from __future__ import annotations

import gc
import logging
import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch.optim imports it on first use: 2 s that every forked rank would pay again
import torch.distributed as dist

from muon_dist.errors import AuditError, MuonDistError

Job = Callable[..., Any]
GRACE = 5.0
"""Seconds that the other ranks get after one has failed, because all should refuse the same case."""


@dataclass(frozen=True)
class Answer:
    """The outcome of a rank. kind: "done", "refused" (an error of muon_dist), "failed" (any other error) or "hung"."""

    kind: str
    value: Any


class Pool:
    """Ranks that run one job after another, all the same job.

    Args:
        world_size: number of ranks. patience: seconds for a job.
        prepare: called once in every rank, for tests.
    """

    def __init__(self, world_size: int, patience: float, prepare: Callable[[], None] | None = None) -> None:
        self.world_size, self.patience, self.jobs = world_size, patience, 0
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = mp.get_context("fork")
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        gc.freeze()
        sys.stdout.flush()
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, store, patience, there, prepare), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        gc.unfreeze()

    def run(self, job: Job, *args: Any) -> list[Answer]:
        """`job(*args)` on every rank; answers in rank order. If an answer is not "done", the caller must close the
        pool."""
        self.jobs += 1
        message = pickle.dumps((job, args))
        answers: dict[int, Answer] = {}
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(message)
            except OSError:
                answers[rank] = Answer("failed", f"rank {rank} has died")
        end = time.monotonic() + self.patience
        while len(answers) < self.world_size:
            waiting: dict[Any, int] = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                answers.update((r, Answer("hung", f"rank {r} gave no answer")) for r in waiting.values())
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    answers[rank] = Answer(*pickle.loads(self._pipes[rank].recv_bytes()))
                except (EOFError, OSError):
                    answers[rank] = Answer("failed", f"rank {rank} died without an answer")
                if answers[rank].kind != "done":
                    end = min(end, time.monotonic() + GRACE)
        return [answers[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        """End the ranks, even while they work."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _serve(
    rank: int, world_size: int, store: str, patience: float, pipe: Connection, prepare: Callable[[], None] | None
) -> None:
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
    )  # fmt: skip
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size,
        timeout=timedelta(seconds=patience),
    )  # fmt: skip
    if prepare is not None:
        prepare()
    while True:
        while not pipe.poll(2.0):  # ranks hold each other's ends of pipes, so none notices that the parent has died
            if os.getppid() != parent:
                os._exit(0)
        try:
            job, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer = "done", job(*args)
        except AuditError:  # there is nothing to find
            answer = "failed", traceback.format_exc()
        except MuonDistError as error:
            answer = "refused", f"{type(error).__name__}: {error}"
        except BaseException:
            answer = "failed", traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))  # by value: torch's pickler would share a dying rank's memory
