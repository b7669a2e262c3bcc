"""Guard against loss spikes: skips a step whose loss jumps; optionally loads the last commit."""

from __future__ import annotations

from typing import Any

from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.errors import ConfigError, NonFiniteError
from muon_dist.guards.spikes import SpikeDetector
from muon_dist.guards.vote import Ballot

POLICIES = ("off", "skip", "rollback")
_MOST_ROLLBACKS = 3


class SpikeGuard(Guard):
    """Tells `Muon` before each step whether to skip it, on every rank (`StepGuard.veto`).

    policy: one of `POLICIES`; see `Guards`.

    Attributes:
        spikes: number of skipped steps.
        rollbacks: number of times that the weights went back to a commit.
    """

    def __init__(self, run: GuardedRun, policy: str, detector: SpikeDetector) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"guards.spike is {policy!r}: use one of {', '.join(POLICIES)}")
        super().__init__(run)
        self.policy, self.detector = policy, detector
        self.spikes = self.rollbacks = 0
        self._judged: Ballot | None = None
        self._spiked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        muon = self.run.muon
        if muon is None and self.policy != "off":
            raise ConfigError(f"guards.spike={self.policy} needs Muon, which can skip a step: set it to off")
        if muon is not None:
            muon.guard.veto = self.spiked

    def spiked(self) -> bool:
        """Whether this step's loss is a spike. The detector judges each vote once, however often this is called."""
        ballot = self.run.ballot()
        if ballot is None or self.policy == "off":
            return False
        if ballot is not self._judged:
            self._judged = ballot
            self._spiked = self._judge(ballot)
        return self._spiked

    def _judge(self, ballot: Ballot) -> bool:
        limit = self.detector.limit()
        if not self.detector.is_spike(ballot.loss):
            return False
        self.spikes += 1
        self.run.say(
            f"step {self.run.trainer.state.global_step + 1} skipped: its loss {ballot.loss:.4f} is above "
            f"{limit:.4f}, {self.detector.sigmas:g} standard deviations over the mean of the last steps"
        )
        return True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # DeepSpeed may have skipped the step without calling Muon: then judge the vote here.
        if not self.spiked() or self.policy != "rollback":
            return
        self.rollbacks += 1
        if self.rollbacks > _MOST_ROLLBACKS:
            raise NonFiniteError(
                f"the loss jumped at step {state.global_step} for the {self.rollbacks}th time with "
                "guards.spike=rollback: rolling back does not help. Lower the learning rate, or look at the data"
            )
        self.run.progress.enter("rollback")
        found = self.run.trainer.roll_back()
        self.run.say(f"weights and optimizer state were loaded from {found}; data and schedule continue")

    def close(self) -> None:
        muon = self.run.muon
        if muon is not None:
            muon.guard.veto = None
