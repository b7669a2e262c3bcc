"""The vote of a step: one small all-reduce of each rank's loss, wish to stop, and busy seconds.

It begins with the backward pass and is read when the optimizer steps, so nobody waits for it.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ballot:
    """The same on every rank.

    Attributes:
        loss: mean over the ranks.
        stop: rank -> what it asked for, of those that asked (a signal number).
        busy: by rank, seconds of its own work in this step, in which it could not wait for another.
    """

    loss: float
    stop: dict[int, int]
    busy: tuple[float, ...]


class Stopwatch:
    """Seconds of this rank's own work in a step; to be paused wherever it may wait for others.

    On a GPU, kernels run behind: their time (by events) is known one step later, and the longer of both counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._since: float | None = None
        self._seconds = self._kernels_before = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """A new step begins, before its data are read."""
        self.pause()  # else its last event was never recorded
        if self._events and self._events[-1][1].query():
            self._kernels_before = sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._seconds, self._since, self._events = 0.0, None, []
        self.resume()

    def resume(self) -> None:
        """Own work continues."""
        if self._since is not None:
            return
        self._since = time.perf_counter()
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()

    def pause(self) -> None:
        """Others may be waited for."""
        if self._since is None:
            return
        self._seconds += time.perf_counter() - self._since
        self._since = None
        if self._cuda:
            self._events[-1][1].record()

    def seconds(self) -> float:
        """Seconds of this step so far."""
        running = time.perf_counter() - self._since if self._since is not None else 0.0
        return max(self._seconds + running, self._kernels_before)


class StepVote:
    """One vote a step over a process group (None: a single process).

    Attributes:
        work: the watch of this rank's own work, told with the vote.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.work = Stopwatch(device)
        self._cast: tuple[torch.Tensor, Any] | None = None

    def cast(self, loss: torch.Tensor | float, stop: int = 0) -> None:
        """Begin the vote of this step, on every rank. loss: of this rank, a number or a tensor of one element."""
        own = torch.zeros(1 + 2 * self.world_size, dtype=torch.float64)
        own[1 + self.rank] = stop
        self.work.pause()
        own[1 + self.world_size + self.rank] = self.work.seconds()
        votes = own.to(self.device, non_blocking=True)
        votes[0] = loss.detach() if isinstance(loss, torch.Tensor) else loss
        work = dist.all_reduce(votes, group=self.group, async_op=True) if self.world_size > 1 else None
        self._cast = votes, work

    def result(self) -> Ballot | None:
        """Wait for the vote that was begun; None when none was since the last call."""
        if self._cast is None:
            return None
        votes, work = self._cast
        self._cast = None
        if work is not None:
            work.wait()
        loss, *rest = votes.tolist()
        stop = {rank: int(value) for rank, value in enumerate(rest[: self.world_size]) if value}
        return Ballot(loss / self.world_size, stop, tuple(rest[self.world_size :]))


class StragglerReport:
    """Names a rank that is repeatedly slower than the others.

    A rank is named if it was the slowest in at least 6/7 of the last `window` steps, and if its median busy time
    exceeds the median of the other ranks' medians by `seconds` (in seconds) and by one fifth. A single slow step, or
    load that moves between ranks, names no rank.
    """

    def __init__(self, world_size: int, *, seconds: float = 0.1, window: int = 16) -> None:
        self.world_size, self.seconds = world_size, seconds
        self._steps: deque[tuple[float, ...]] = deque(maxlen=window)

    def add(self, busy: tuple[float, ...]) -> str | None:
        """Add the busy seconds of each rank in one step. Returns a message if a rank is slow, and starts again."""
        self._steps.append(busy)
        if self.world_size < 2 or len(self._steps) < (self._steps.maxlen or 1):
            return None
        rank, times = Counter(max(range(self.world_size), key=b.__getitem__) for b in self._steps).most_common(1)[0]
        medians = [_median([b[r] for b in self._steps]) for r in range(self.world_size)]
        usual = _median([m for r, m in enumerate(medians) if r != rank])
        excess = medians[rank] - usual
        if times * 7 < len(self._steps) * 6 or excess < max(self.seconds, 0.2 * usual):
            return None
        steps = len(self._steps)
        self._steps.clear()
        return (
            f"rank {rank} is slow: {medians[rank]:.3f} s of its own work per step, the others {usual:.3f} s (medians "
            f"of {steps} steps; the slowest in {times} of them)"
        )


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
