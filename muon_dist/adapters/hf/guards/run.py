"""State that the guards of a run share: trainer, vote of the step, this rank's current operation, messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from muon_dist.errors import PeerError
from muon_dist.exchange.progress import Progress, place
from muon_dist.exchange.transport import is_network_error
from muon_dist.guards.vote import Ballot, StepVote
from muon_dist.optim.muon import Muon
from muon_dist.optim.unwrap import find_muon


class GuardedRun:
    """State that the guards of one trainer share.

    Attributes:
        trainer: the `MuonTrainer`; None until `Guards.attach`.
        progress: this rank's current operation; during training it is Muon's object.
        vote: one small all-reduce per step; None before training.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.trainer: Any = None
        self.progress = Progress()
        self.vote: StepVote | None = None
        self._say = say
        self._loss: torch.Tensor | float = 0.0
        self._ballot: Ballot | None = None

    @property
    def rank(self) -> int:
        """This rank; 0 before training."""
        return self.vote.rank if self.vote is not None else 0

    @property
    def muon(self) -> Muon | None:
        """The trainer's `Muon`; None with another optimizer, or before the optimizer is made."""
        return find_muon(getattr(self.trainer, "optimizer", None))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of all ranks; None for a single process."""
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def say(self, message: str) -> None:
        """Print a message, only on the first rank."""
        if self.rank == 0:
            self._say(message)

    def begin(self, device: torch.device, step: int) -> None:
        """Start the votes, as tensors on `device`. `step` steps are finished."""
        self.vote = StepVote(self.group, device)
        muon = self.muon
        if muon is not None:
            self.progress = muon.progress
        self.progress.step = step

    def begin_step(self) -> None:
        """Called when this rank begins to read the batches of the next step; drops the last step's vote."""
        self.progress.enter("data")
        self._loss, self._ballot = 0.0, None

    def add_loss(self, loss: torch.Tensor, last: bool, stop: int) -> None:
        """Add a micro-batch's part of this step's loss; the last micro-batch starts the vote.

        stop: the signal that asked this rank to stop, or 0.
        """
        self._loss = self._loss + loss.detach()
        if last and self.vote is not None:
            self.vote.cast(self._loss, stop)

    def ballot(self) -> Ballot | None:
        """This step's vote, equal on every rank; None without a vote. The first call in a step waits for it."""
        if self._ballot is None and self.vote is not None:
            self.progress.enter("step vote")
            self._ballot = self.vote.result()
        return self._ballot

    def named(self, error: RuntimeError) -> PeerError | None:
        """The error for a failed message between ranks, with operation and step; None for any other error."""
        if not is_network_error(error):
            return None
        p = self.progress
        first_line = str(error).strip().partition("\n")[0]
        return PeerError(
            f"rank {self.rank}: {place(p.operation, p.bucket, p.step)} failed: {first_line}. Another rank has ended, "
            "or the network is down: look for the first error of the other ranks"
        )


class Guard(TrainerCallback):
    """Base class of guards: Trainer callbacks with one check each. All guards of a run share one `GuardedRun`."""

    def __init__(self, run: GuardedRun) -> None:
        self.run = run

    def close(self) -> None:
        """End everything that runs during training. Called at the end, also after an error, possibly twice."""
