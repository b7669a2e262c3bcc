"""Where a rank stands: what it is doing now, for the watchdog, the fault injector and messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Progress:
    """The operation that this rank is in; written by whoever works, read by another thread.

    Attributes:
        step: optimizer steps that were finished.
        operation: "idle", or what runs, such as "gather", "orthogonalize", "scatter", "gradient flags".
        bucket: index of the bucket that it works on, if any.
        since: time.monotonic() at which it began.
        listeners: called with this object after each change; they must be quick.
    """

    step: int = 0
    operation: str = "idle"
    bucket: int | None = None
    since: float = field(default_factory=time.monotonic)
    listeners: list[Callable[[Progress], None]] = field(default_factory=list, repr=False)

    def enter(self, operation: str, bucket: int | None = None) -> None:
        """Say what runs from now on."""
        self.operation, self.bucket, self.since = operation, bucket, time.monotonic()
        for listener in self.listeners:
            listener(self)

    def finish_step(self) -> None:
        """Count a finished optimizer step."""
        self.step += 1
        self.enter("idle")


def place(operation: str, bucket: int | None, step: int) -> str:
    """ "gather of bucket 3 in step 17", for messages; `step` counts finished steps, the message counts from 1."""
    return f"{operation}{'' if bucket is None else f' of bucket {bucket}'} in step {step + 1}"
