"""Signals that ask a run to stop: SIGTERM (preemption, `torchrun` ending) and SIGUSR1 (SLURM's `--signal`)."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, a signal is remembered instead of ending the process; a second one ends it.

    The ranks agree on it in the vote of a step (see `Guards`), commit a checkpoint and leave with exit code 75.

    Attributes:
        requested: number of the first signal that came, or 0.
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
            # A launcher that has lost patience: end as the signal says.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = number
