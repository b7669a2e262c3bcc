"""A stopped peer: found by the watchdog shortly after its time, and named with operation, bucket and step."""

from __future__ import annotations

import os
import re
import signal
import threading
import time

import pytest
import torch.distributed as dist

from muon_dist.exchange.progress import Mark, Progress
from muon_dist.guards.watchdog import Beat, Watchdog, default_store
from tests.distributed import run_ranks

TIMEOUT = 1.5


def hang(stopped: int) -> tuple[str, float] | None:
    """Rank `stopped` stops itself; the others wait in a named operation until the watchdog speaks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    progress = Progress()
    said: list[str] = []
    spoke = threading.Event()

    def hear(message: str) -> None:
        said.append(message)
        spoke.set()

    watchdog = Watchdog(progress, default_store(), rank, world, timeout=TIMEOUT, interval=0.1, on_timeout=hear)
    with watchdog:
        for _ in range(16):
            progress.finish_step()
        dist.barrier()
        began = time.monotonic()
        if rank == stopped:
            progress.enter("orthogonalize", 2)
            while watchdog.beats()[rank].operation != "orthogonalize":
                time.sleep(0.05)
            pid = os.getpid()
            if os.fork() == 0:  # wakes its parent again, for the end of the test
                time.sleep(TIMEOUT + 5)
                os.kill(pid, signal.SIGCONT)
                os._exit(0)
            os.kill(pid, signal.SIGSTOP)
            progress.enter("idle")
            return None
        progress.enter("scatter", 2)
        assert spoke.wait(60)
        return said[0], time.monotonic() - began


def test_a_stopped_rank_is_named() -> None:
    results = run_ranks(hang, 3, 1)
    assert results[1] is None
    for rank in (0, 2):
        message, seconds = results[rank]
        assert seconds >= TIMEOUT
        assert re.search(rf"^rank {rank} has been in scatter of bucket 2 in step 17 for \d s: ", message)
        assert "rank 1 is absent: last seen in orthogonalize of bucket 2 in step 17" in message
        assert "rank 0 is" not in message and "rank 2 is" not in message


def slow() -> str | None:
    rank = dist.get_rank()
    progress = Progress()
    said: list[str] = []
    with Watchdog(progress, default_store(), rank, 2, timeout=4.0, interval=0.6, on_timeout=said.append):
        progress.enter("forward/backward" if rank == 1 else "gather", None if rank == 1 else 0)
        while not said:
            time.sleep(0.1)
        time.sleep(1.0)  # alive until the other rank has looked as well
        progress.enter("idle")
    return said[0] if said else None


def test_a_rank_that_lives_but_is_behind_is_named() -> None:
    messages = run_ranks(slow, 2)
    assert "all ranks are alive; rank 1 is behind, in forward/backward in step 1" in messages[0]
    assert "rank 0 is behind, in gather of bucket 0 in step 1" in messages[1]


def test_nothing_is_said_while_idle_or_while_operations_change() -> None:
    progress = Progress()
    said: list[str] = []
    with Watchdog(progress, None, 0, 1, timeout=30.0, interval=0.02, on_timeout=said.append):
        progress.since -= 60  # idle for longer than the time-out
        time.sleep(0.3)
        for _ in range(10):
            progress.enter("gather")
            time.sleep(0.05)
        assert not said
        progress.since -= 60
        while not said:
            time.sleep(0.02)
    assert len(said) == 1 and said[0].startswith("rank 0 has been in gather in step 1")


def test_by_default_the_process_ends_with_its_message(capfd: pytest.CaptureFixture[str]) -> None:
    pid = os.fork()
    if pid == 0:
        progress = Progress()
        progress.enter("gather", 4)
        Watchdog(progress, None, 0, 1, timeout=0.2, interval=0.05).start()
        time.sleep(10)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 10
    assert "error: rank 0 has been in gather of bucket 4 in step 1" in capfd.readouterr().err


def test_a_store_that_does_not_answer_is_said() -> None:
    progress = Progress()
    progress.enter("gather")
    message = Watchdog(progress, None, 0, 4, timeout=1.0).describe({}, {})
    assert "the store of the process group does not answer" in message
    beat = Beat(1, 3, "idle", None, 2.0)
    message = Watchdog(progress, None, 0, 3, timeout=1.0).describe({1: beat}, {1: beat})
    assert "rank 1 is absent: last seen in idle in step 4, for 2 s; rank 2 was never seen" in message


class Queue:
    """The queue of a device, whose host does not wait: it has come to the first `done` marks."""

    def __init__(self) -> None:
        self.done = self.marks = 0

    def mark(self) -> Mark:
        number = self.marks
        self.marks += 1

        class At:
            def query(_) -> bool:
                return self.done > number

        return At()


def watched(queue: Queue, progress: Progress, seconds: float) -> list[str]:
    said: list[str] = []
    with Watchdog(progress, None, 0, 1, timeout=0.5, interval=0.05, on_timeout=said.append):
        time.sleep(seconds)
    return said


def step(progress: Progress) -> None:
    for operation in ("gather", "orthogonalize", "scatter", "update"):
        progress.enter(operation, 0)
    progress.finish_step()


def test_a_device_that_hangs_is_named_while_its_host_is_idle_or_elsewhere() -> None:
    for goes_on in (False, True):
        queue = Queue()
        progress = Progress(mark=queue.mark)
        step(progress)
        queue.done = 3  # it has begun the scatter
        if goes_on:
            progress.enter("gradient flags")
        (said,) = watched(queue, progress, 1.5)
        where = "gradient flags in step 2" if goes_on else "idle in step 2"
        assert said.startswith("rank 0 has been in scatter of bucket 0 in step 1 for ")
        assert f"on its device (its host is in {where})" in said


def test_a_device_that_goes_on_is_left_alone_however_far_behind_it_is() -> None:
    queue = Queue()
    progress = Progress(mark=queue.mark)
    for _ in range(4):
        step(progress)
    said: list[str] = []
    with Watchdog(progress, None, 0, 1, timeout=0.5, interval=0.05, on_timeout=said.append):
        for _ in range(10):
            time.sleep(0.2)
            queue.done += 2
    assert not said and progress.device() is None


def test_a_device_that_is_done_leaves_the_host_to_be_watched() -> None:
    queue = Queue()
    progress = Progress(mark=queue.mark)
    step(progress)
    queue.done = queue.marks
    assert watched(queue, progress, 1.0) == []
    progress.enter("step vote")
    queue.done = queue.marks
    (said,) = watched(queue, progress, 1.5)
    assert "step vote in step 2" in said and "on its device" not in said
