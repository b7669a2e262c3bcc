"""Guard against slow ranks: names a rank that is repeatedly slower than the others."""

from __future__ import annotations

from typing import Any

import torch

from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.guards.vote import Stopwatch, StragglerReport


class StragglerGuard(Guard):
    """Measures this rank's own work, and names a slow rank (see `StragglerReport`).

    Own work is reading data and the forward pass, because there a rank does not wait for other ranks.

    seconds: a rank that is slower by at least this much is named; 0: no rank is named.
    """

    def __init__(self, run: GuardedRun, seconds: float) -> None:
        super().__init__(run)
        self.seconds = seconds
        self._report: StragglerReport | None = None
        self._hook: Any = None

    @property
    def work(self) -> Stopwatch | None:
        """The stopwatch of this rank's own work; None before training."""
        return self.run.vote.work if self.run.vote is not None else None

    def begin_step(self) -> None:
        """Start the measurement of the next step."""
        if self.work is not None:
            self.work.start()

    def pause(self) -> None:
        """Stop the measurement: from now on this rank may wait for others."""
        if self.work is not None:
            self.work.pause()

    def resume(self) -> None:
        """Continue the measurement."""
        if self.work is not None:
            self.work.resume()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        vote = self.run.vote
        if self.seconds and vote is not None:
            self._report = StragglerReport(vote.world_size, seconds=self.seconds)
        if not args.torch_compile:  # it would compile the hook; then the forward pass is not measured
            # Hook the inner model, because DDP sends buffers before it calls it.
            self._hook = self.run.trainer.model.register_forward_pre_hook(lambda module, given: self._forward(module))

    def _forward(self, module: torch.nn.Module) -> None:
        if module.training:
            self.resume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ballot = self.run.ballot()
        if self._report is not None and ballot is not None and (message := self._report.add(ballot.busy)):
            self.run.say(message)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
