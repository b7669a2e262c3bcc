"""Guard against hangs: an operation that takes too long ends the run with a message that names it."""

from __future__ import annotations

from typing import Any

from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.exchange.progress import IDLE
from muon_dist.guards.watchdog import Watchdog, default_store

_WATCHDOG_SHARE = 0.9  # of the process group's timeout, so that our message comes first: it names the operation


class HangGuard(Guard):
    """Starts the watchdog, and reports to it the trainer's operations between two optimizer steps.

    It must be the last guard: at the end of a step it reports that no operation is running.

    seconds: longest time of one operation; None: 0.9 of the process group's timeout; 0: no watchdog.
    """

    def __init__(self, run: GuardedRun, seconds: float | None) -> None:
        super().__init__(run)
        self.seconds = seconds
        self._watchdog: Watchdog | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vote = self.run.vote
        seconds = self.seconds if self.seconds is not None else _WATCHDOG_SHARE * args.ddp_timeout
        if seconds > 0 and vote is not None:
            self._watchdog = Watchdog(
                self.run.progress, default_store(), vote.rank, vote.world_size, timeout=seconds, device=args.device
            )
            self._watchdog.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.progress.enter("forward/backward")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.progress.step = state.global_step
        self.run.progress.enter(IDLE)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.progress.enter("evaluation")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.progress.enter(IDLE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.progress.enter(IDLE)

    def close(self) -> None:
        self.run.progress.enter(IDLE)
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
