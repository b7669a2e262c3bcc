"""The vote of a step: one small all-reduce of each rank's loss, request to stop, and busy seconds.

It starts with the backward pass and is read at the optimizer step, so usually no rank waits for it.
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
    """The result of a vote, equal on every rank.

    Attributes:
        loss: mean over the ranks.
        stop: rank -> signal number, for the ranks that asked to stop.
        busy: by rank, seconds of own work in this step, without waiting for other ranks.
    """

    loss: float
    stop: dict[int, int]
    busy: tuple[float, ...]


class Stopwatch:
    """Measures this rank's own work in a step. Pause it while the rank may wait for other ranks.

    On a GPU, kernels run later than the host. Their time, measured by events, is known one step later; the longer of
    host time and GPU time counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._since: float | None = None
        self._seconds = self._kernels_before = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Start the measurement of a new step, before its data are read."""
        self.pause()  # records the last event of the previous step
        if self._events and self._events[-1][1].query():
            self._kernels_before = sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._seconds, self._since, self._events = 0.0, None, []
        self.resume()

    def resume(self) -> None:
        """Continue the measurement."""
        if self._since is not None:
            return
        self._since = time.perf_counter()
        if self._cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events.append(pair)
            pair[0].record()

    def pause(self) -> None:
        """Stop the measurement, because this rank may now wait for others."""
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
    """One vote per step over a process group (None: a single process).

    Attributes:
        work: the stopwatch of this rank's own work; the vote sends its time.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group) if group is not None else 0
        self.world_size = dist.get_world_size(group) if group is not None else 1
        self.work = Stopwatch(device)
        self._cast: tuple[torch.Tensor, Any] | None = None

    def cast(self, loss: torch.Tensor | float, stop: int = 0) -> None:
        """Start the vote of this step, on every rank. loss: this rank's loss, a number or a tensor of one element."""
        own = torch.zeros(1 + 2 * self.world_size, dtype=torch.float64)
        own[1 + self.rank] = stop
        self.work.pause()
        own[1 + self.world_size + self.rank] = self.work.seconds()
        votes = own.to(self.device, non_blocking=True)
        votes[0] = loss.detach() if isinstance(loss, torch.Tensor) else loss
        work = dist.all_reduce(votes, group=self.group, async_op=True) if self.world_size > 1 else None
        self._cast = votes, work

    def result(self) -> Ballot | None:
        """Wait for the result of the vote; None if no vote was started since the last call."""
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
        """Add the busy seconds of each rank in one step. If a rank is slow, return a message and empty the window."""
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
            f"of {steps} steps; it was the slowest in {times} of them)"
        )


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
