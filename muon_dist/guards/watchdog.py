"""A thread that detects a hanging step, and names the absent rank, its operation, and since when it hangs.

gloo and NCCL detect a stopped peer only at their timeout, and name neither operation nor step.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import PeerError
from muon_dist.exchange.progress import IDLE, Progress, Standing, place

_MOST_INTERVAL = 5.0
_STORE_PATIENCE = 2.0
_LAST_WORDS = 1.0


@dataclass(frozen=True)
class Beat:
    """The last publication of a rank: number of publications so far, and current operation."""

    count: int
    step: int
    operation: str
    bucket: int | None
    seconds: float
    host: str = ""

    def text(self) -> str:
        """Text such as "gather of bucket 3 in step 17, for 12 s (host node2)"."""
        where = f" (host {self.host})" if self.host else ""
        return f"{place(self.operation, self.bucket, self.step)}, for {self.seconds:.0f} s{where}"


def leave(message: str) -> None:
    """Print `message` and end the process: its main thread hangs in a collective and cannot raise."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Let the other ranks print their messages first: when this rank ends, they get a network error.
    time.sleep(_LAST_WORDS)
    os._exit(PeerError.exit_code)


class Watchdog:
    """Publishes this rank's current operation and ends it when one operation takes longer than `timeout` seconds.

    On a GPU the host continues while the device still works or waits for another rank. So an operation lasts until the
    device has finished it, and the device's operation counts, even if the host is idle.

    progress: this rank's progress; nothing is watched while it is "idle".
    store: store for the publications of all ranks, usually `default_store()`. None for a single process.
    timeout: seconds; less than the process group's timeout, whose error does not name the operation.
    interval: seconds between two publications; default a twentieth of the timeout, at most 5.
    device: the device of the work; on a CUDA device the device's own progress is watched.
    on_timeout: called in the thread with the message; by default it is printed and the process ends with exit code 10.
    """

    def __init__(
        self,
        progress: Progress,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        *,
        timeout: float,
        interval: float | None = None,
        device: torch.device | None = None,
        on_timeout: Callable[[str], None] = leave,
    ) -> None:
        self.progress, self.rank, self.world_size = progress, rank, world_size
        self.timeout = timeout
        self.interval = interval if interval is not None else min(_MOST_INTERVAL, timeout / 20)
        self._store = store
        self._on_timeout = on_timeout
        self._count = 0
        self._published = 0.0
        self._host = socket.gethostname()
        self._device = device
        self._seen: Standing | None = None
        self._seen_since = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="muon_dist watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread."""
        if self._device is not None and self._device.type == "cuda" and self.progress.mark is None:
            self.progress.mark = lambda: torch.cuda.current_stream(self._device).record_event()
        self._publish()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread; the last publication stays in the store."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_STORE_PATIENCE)

    # ---- the thread

    def _run(self) -> None:
        baseline: dict[int, Beat] = {}
        since = 0.0
        while not self._stop.wait(min(self.interval, 1.0)):
            if time.monotonic() - self._published >= self.interval:
                self._publish()
            at, began = self._standing()
            waited = time.monotonic() - began
            if at.operation == IDLE or waited < self.timeout - 2.5 * self.interval:
                baseline = {}
                continue
            if not baseline or began != since:
                baseline, since = self.beats(), began
            if waited >= self.timeout:
                self._on_timeout(self.describe(baseline, self.beats()))
                return

    def _standing(self) -> tuple[Standing, float]:
        """This rank's operation and its start time: the device's operation, or the host's if the device keeps up."""
        behind = self.progress.device()
        if behind is None:
            host = self.progress.host()
            return host, host.since
        if behind is not self._seen:  # the device cannot have begun it before the previous one ended
            self._seen, self._seen_since = behind, time.monotonic()
        return behind, self._seen_since

    def _key(self, rank: int) -> str:
        return f"muon_dist/watchdog/{rank}"

    def _publish(self) -> None:
        self._count += 1
        self._published = time.monotonic()
        at, since = self._standing()
        seconds = round(max(self._published - since, 0.0), 3)
        beat = Beat(self._count, at.step, at.operation, at.bucket, seconds, self._host)
        if self._store is not None:
            store, text = self._store, json.dumps(asdict(beat))
            _patiently(lambda: store.set(self._key(self.rank), text))

    def beats(self) -> dict[int, Beat]:
        """The last publication of each rank; empty if the store does not answer."""
        if self._store is None:
            return {}
        store = self._store

        def read() -> dict[int, Beat]:
            found = {}
            for rank in range(self.world_size):
                if store.check([self._key(rank)]):
                    found[rank] = Beat(**json.loads(store.get(self._key(rank))))
            return found

        return _patiently(read) or {}

    def describe(self, before: Mapping[int, Beat], after: Mapping[int, Beat]) -> str:
        """The message of a timeout, from two readings that are more than an interval apart."""
        at, since = self._standing()
        waited = time.monotonic() - since
        own = f"rank {self.rank} has been in {at.text()} for {waited:.0f} s"
        if at.mark is not None:
            own += f" on its device (its host is in {self.progress.host().text()})"
        if self.world_size == 1:
            return f"{own}: longer than the watchdog's {self.timeout:.0f} s"
        if not after:
            return f"{own}, and the store of the process group does not answer: the host that runs it may be gone"
        others = [r for r in range(self.world_size) if r != self.rank]
        never = [r for r in others if r not in after]
        absent = [r for r in others if r in after and r in before and after[r].count == before[r].count]
        parts = [f"rank {r} is absent: last seen in {after[r].text()}" for r in absent]
        parts += [f"rank {r} was never seen" for r in never]
        if not parts:
            behind = min(others, key=lambda r: (after[r].step, after[r].operation == at.operation))
            parts = [f"all ranks are alive; rank {behind} is behind, in {after[behind].text()}"]
        return f"{own}: {'; '.join(parts)}"


def _patiently(work: Callable[[], Any]) -> Any:
    """The result of `work`; None if it fails or takes too long, because the store's host may be gone."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except (RuntimeError, ValueError):  # errors of torch's store; an incomplete value
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_STORE_PATIENCE)
    return result[0] if result else None


def default_store() -> dist.Store | None:
    """The store of the default process group, for use in another thread; None without a process group.

    For a server store it opens a new connection, because the main thread may block in the shared one.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    store: Any = dist.distributed_c10d._get_default_store()
    below = store
    while isinstance(below, dist.PrefixStore):
        below = below.underlying_store
    chosen: dist.Store = store if isinstance(below, dist.FileStore) else store.clone()
    return chosen
