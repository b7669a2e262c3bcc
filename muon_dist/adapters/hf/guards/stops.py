"""Guard of stops: a signal to one rank stops all ranks after the same step, with a committed checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from muon_dist.adapters.hf.guards.run import Guard, GuardedRun


class StopGuard(Guard):
    """Ends training after the step in which a rank asked to stop.

    requested: returns the number of the signal that asked this rank to stop, or 0.

    Attributes:
        stopped: rank -> signal, for ranks that asked to stop, after all ranks have committed a checkpoint; else empty.
        committed: name of the newest checkpoint at the stop; an older one if the save failed (`on_error: continue`).
    """

    def __init__(self, run: GuardedRun, requested: Callable[[], int]) -> None:
        super().__init__(run)
        self.requested = requested
        self.stopped: dict[int, int] = {}
        self.committed: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ballot = self.run.ballot()
        if ballot is None or not ballot.stop:
            return
        newest = self.run.trainer.commit()
        self.committed = newest.name if newest is not None else None
        self.stopped = ballot.stop
        control.should_save = control.should_evaluate = False
        control.should_training_stop = True


def stop_text(stopped: dict[int, int]) -> str:
    """Text about the signals that ranks received, such as "SIGTERM on rank 2". stopped: rank -> signal number."""
    return ", ".join(f"{signal.Signals(number).name} on rank {rank}" for rank, number in sorted(stopped.items()))
