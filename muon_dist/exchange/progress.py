"""The current operation of a rank, for the watchdog, the fault injector and messages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

IDLE = "idle"
_KEPT = 1024
"""Operations that are remembered while the device is behind the host; a step has a few hundred."""


class Mark(Protocol):
    """A position in a device's queue, such as a recorded `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether the device has reached this position."""


@dataclass(frozen=True, eq=False)
class Standing:
    """An operation of a step, for messages.

    Attributes:
        operation, bucket, step: as in `Progress`.
        since: time.monotonic() when the host began the operation.
        mark: the start of the operation in the device's queue; None without marks.
    """

    operation: str
    bucket: int | None
    step: int
    since: float
    mark: Mark | None = None

    def text(self) -> str:
        """Text such as "gather of bucket 3 in step 17"."""
        return place(self.operation, self.bucket, self.step)


@dataclass
class Progress:
    """The current operation of this rank. The training thread writes it, and another thread reads it.

    Attributes:
        step: number of finished optimizer steps.
        operation: "idle", or the operation, such as "gather", "orthogonalize", "scatter", "gradient flags".
        bucket: index of the operation's bucket; None without a bucket.
        since: time.monotonic() when the operation began.
        listeners: called with this object after each change; they must be quick.
        mark: puts a mark into the device's queue; None if the host waits for each operation.
    """

    step: int = 0
    operation: str = IDLE
    bucket: int | None = None
    since: float = field(default_factory=time.monotonic)
    listeners: list[Callable[[Progress], None]] = field(default_factory=list, repr=False)
    mark: Callable[[], Mark] | None = field(default=None, repr=False)
    _trail: deque[Standing] = field(default_factory=lambda: deque(maxlen=_KEPT), repr=False)

    def enter(self, operation: str, bucket: int | None = None) -> None:
        """Record that `operation` begins."""
        self.operation, self.bucket, self.since = operation, bucket, time.monotonic()
        if self.mark is not None:
            self._trail.append(Standing(operation, bucket, self.step, self.since, self.mark()))
        for listener in self.listeners:
            listener(self)

    def finish_step(self) -> None:
        """Count a finished optimizer step."""
        self.step += 1
        self.enter(IDLE)

    def host(self) -> Standing:
        """The host's current operation."""
        return Standing(self.operation, self.bucket, self.step, self.since)

    def device(self) -> Standing | None:
        """The oldest operation that the device has not finished; None if the device keeps up with the host.

        Only the watchdog's thread may call it. The device has finished an operation when it reaches the next mark.
        """
        trail = self._trail
        while len(trail) > 1:
            after = trail[1].mark
            if after is None or not after.query():
                return trail[0]
            trail.popleft()
        return None


def place(operation: str, bucket: int | None, step: int) -> str:
    """Text such as "gather of bucket 3 in step 17". `step` counts finished steps; the text counts from 1."""
    return f"{operation}{'' if bucket is None else f' of bucket {bucket}'} in step {step + 1}"
