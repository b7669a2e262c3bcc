"""The current operation of a rank, for the watchdog, the fault injector and messages."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

IDLE = "idle"
_KEPT = 1024
"""Operations that are remembered while a device is behind; a step has some hundred."""


class Mark(Protocol):
    """A place in the queue of a device, such as a `torch.cuda.Event` that was recorded."""

    def query(self) -> bool:
        """Whether the device has come there."""


@dataclass(frozen=True, eq=False)
class Standing:
    """An operation of a step, for messages.

    Attributes:
        operation, bucket, step: as in `Progress`.
        since: time.monotonic() at which the host began it.
        mark: where it begins in the queue of the device; None if there is none.
    """

    operation: str
    bucket: int | None
    step: int
    since: float
    mark: Mark | None = None

    def text(self) -> str:
        """ "gather of bucket 3 in step 17"."""
        return place(self.operation, self.bucket, self.step)


@dataclass
class Progress:
    """The operation that this rank is in; written by whoever works, read by another thread.

    Attributes:
        step: optimizer steps that were finished.
        operation: "idle", or what runs, such as "gather", "orthogonalize", "scatter", "gradient flags".
        bucket: index of the bucket that it works on, if any.
        since: time.monotonic() at which it began.
        listeners: called with this object after each change; they must be quick.
        mark: makes a mark in the queue of the device, where the host does not wait for what it has started; else None.
    """

    step: int = 0
    operation: str = IDLE
    bucket: int | None = None
    since: float = field(default_factory=time.monotonic)
    listeners: list[Callable[[Progress], None]] = field(default_factory=list, repr=False)
    mark: Callable[[], Mark] | None = field(default=None, repr=False)
    _trail: deque[Standing] = field(default_factory=lambda: deque(maxlen=_KEPT), repr=False)

    def enter(self, operation: str, bucket: int | None = None) -> None:
        """Say what runs from now on."""
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
        """The oldest operation that the device has not finished, while the host has gone on; None if it keeps up.

        To be called by one thread, the watchdog's. An operation is finished when the device has come to the next one.
        """
        trail = self._trail
        while len(trail) > 1:
            after = trail[1].mark
            if after is None or not after.query():
                return trail[0]
            trail.popleft()
        return None


def place(operation: str, bucket: int | None, step: int) -> str:
    """ "gather of bucket 3 in step 17", for messages; `step` counts finished steps, the message counts from 1."""
    return f"{operation}{'' if bucket is None else f' of bucket {bucket}'} in step {step + 1}"
