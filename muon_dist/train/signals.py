"""Signals that ask a run to stop: SIGTERM (preemption, `torchrun` ending) and SIGUSR1 (SLURM's `--signal`)."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, the first signal is recorded instead of ending the process; a second signal ends it.

    In the vote of a step (see `Guards`) the ranks agree to stop; they commit a checkpoint and end with exit code 75.

    Attributes:
        requested: number of the first signal received, or 0.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # The launcher does not wait any longer: end now.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = number
