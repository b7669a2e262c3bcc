"""All guards of a `MuonTrainer` run (one file per guard in guards/), and the trainer's calls to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback

from muon_dist.adapters.hf.guards.hangs import HangGuard
from muon_dist.adapters.hf.guards.nonfinite import NonFiniteGuard
from muon_dist.adapters.hf.guards.replicas import ReplicaGuard
from muon_dist.adapters.hf.guards.run import Guard, GuardedRun
from muon_dist.adapters.hf.guards.spikes import SpikeGuard
from muon_dist.adapters.hf.guards.stops import StopGuard, stop_text
from muon_dist.adapters.hf.guards.stragglers import StragglerGuard
from muon_dist.adapters.hf.parallel import SequenceParallelTrainer
from muon_dist.defaults import HASH_EVERY, MAX_NONFINITE, SPIKE_SIGMAS, SPIKE_WINDOW, STRAGGLER_SECONDS
from muon_dist.guards.spikes import SpikeDetector

__all__ = ["GuardedTrainer", "Guards", "stop_text"]


class Guards(TrainerCallback):
    """The guards of one run; pass it to `MuonTrainer(guards=...)`.

    spike: what to do if the loss, averaged over all ranks, jumps (see `SpikeDetector`). "off": nothing. "skip": skip
        the step; parameters and state do not change. "rollback": skip the step and load parameters and optimizer state
        of the last commit; step count, schedule and data continue.
    spike_window, spike_sigmas: arguments of the detector.
    hash_every: steps between two comparisons of parameter copies. Copies are also compared before each save, and after
        a step that was skipped because of NaN or infinity. 0: never.
    watchdog_seconds: the run ends with a message if one operation takes longer. None: 0.9 of the process group's
        timeout; 0: never.
    straggler_seconds: name a rank whose own work takes this much longer in several steps in a row; 0: never.
    max_nonfinite: this many steps in a row that DeepSpeed skips because of NaN or infinity end the run; `Muon` counts
        its own. Not in fp16 with a dynamic loss scale, where such steps are normal.
    stop_requested: returns the number of the signal that asked this rank to stop, or 0.
    say: prints messages; called on the first rank.

    Each guard is a separate callback, in the order of `parts`. At the end of a step all guards read the same vote.
    """

    def __init__(
        self,
        *,
        spike: str = "off",
        spike_window: int = SPIKE_WINDOW,
        spike_sigmas: float = SPIKE_SIGMAS,
        hash_every: int = HASH_EVERY,
        watchdog_seconds: float | None = None,
        straggler_seconds: float = STRAGGLER_SECONDS,
        max_nonfinite: int = MAX_NONFINITE,
        stop_requested: Callable[[], int] = lambda: 0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run = GuardedRun(say)
        self.stragglers = StragglerGuard(self.run, straggler_seconds)
        self.nonfinite = NonFiniteGuard(self.run, max_nonfinite)
        self.spike = SpikeGuard(self.run, spike, SpikeDetector(spike_window, spike_sigmas))
        self.replicas = ReplicaGuard(self.run, hash_every, self.nonfinite)
        self.stop = StopGuard(self.run, stop_requested)
        self.hangs = HangGuard(self.run, watchdog_seconds)

    @property
    def parts(self) -> tuple[Guard, ...]:
        """The guards, in the order in which they act at the end of a step."""
        return (self.stragglers, self.nonfinite, self.spike, self.replicas, self.stop, self.hangs)

    @property
    def stopped(self) -> dict[int, int]:
        """Rank -> signal, for ranks that asked to stop, after all ranks have committed a checkpoint; else empty."""
        return self.stop.stopped

    @property
    def committed(self) -> str | None:
        """Name of the newest checkpoint at the stop; an older one if the last save failed (`on_error: continue`)."""
        return self.stop.committed

    @property
    def spikes(self) -> int:
        """Number of steps skipped because of their loss."""
        return self.spike.spikes

    @property
    def rollbacks(self) -> int:
        """Number of times that the weights went back to a commit."""
        return self.spike.rollbacks

    # ---- state in checkpoints

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, so that a resumed run makes the same decisions."""
        muon = self.run.muon
        return {
            "detector": self.spike.detector.state_dict(),
            "spikes": self.spike.spikes,
            "rollbacks": self.spike.rollbacks,
            "bad_in_row": self.nonfinite.in_a_row,
            "step_guard": muon.guard.state_dict() if muon is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.spike.detector.load_state_dict(state["detector"])
        self.spike.spikes, self.spike.rollbacks = int(state["spikes"]), int(state["rollbacks"])
        self.nonfinite.in_a_row = int(state["bad_in_row"])
        muon = self.run.muon
        if muon is not None and state["step_guard"] is not None:
            muon.guard.load_state_dict(state["step_guard"])

    # ---- called by MuonTrainer

    def attach(self, trainer: Any) -> None:
        """Add the guards to `trainer` as callbacks; call it before training."""
        self.run.trainer = trainer
        for callback in (self, *self.parts):
            trainer.add_callback(callback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()  # `auto_find_batch_size` starts training again after running out of memory
        self.run.begin(args.device, state.global_step)

    def begin_step(self) -> None:
        """Called when this rank begins to read the batches of the next step."""
        self.run.begin_step()
        self.stragglers.begin_step()

    def add_loss(self, loss: torch.Tensor, last: bool) -> None:
        """Add a micro-batch's part of this step's loss, before its backward pass; `last` starts the vote."""
        self.stragglers.pause()
        self.run.add_loss(loss, last, self.stop.requested() if last else 0)

    def close(self) -> None:
        """End everything that runs during training; also called after an error."""
        self.hangs.close()  # first, because the watchdog does not cover the rest
        for guard in self.parts:
            guard.close()


class _Reading:
    """Wraps a data loader's iterator: reading a batch counts as this rank's own work."""

    def __init__(self, batches: Iterator[Any], guard: StragglerGuard) -> None:
        self.batches, self.guard = batches, guard

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.guard.resume()
        try:
            return next(self.batches)
        finally:
            self.guard.pause()


class GuardedTrainer(SequenceParallelTrainer):
    """A `Trainer` that reports its operations to its guards. It also works without guards."""

    guards: Guards | None = None

    def watch_with(self, guards: Guards) -> None:
        """Use `guards` for this trainer."""
        self.guards = guards
        guards.attach(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`. A failed message between ranks becomes a `PeerError` with operation and step."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            named = self.guards.run.named(error) if self.guards is not None else None
            if named is None:
                raise
            raise named from error
        finally:
            if self.guards is not None:
                self.guards.close()

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, as Trainer's. Counting their tokens is a collective."""
        if self.guards is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self.guards.begin_step()
        read = _Reading(epoch_iterator, self.guards.stragglers)
        batches = super().get_batch_samples(read, num_batches, device)
        self.guards.stragglers.resume()
        return batches

    def write_checkpoint(self, folder: Any) -> None:
        """Record the operation "save"."""
        if self.guards is not None:
            self.guards.run.progress.enter("save")
        super().write_checkpoint(folder)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `compute_loss`, which also reports the loss to the guards."""
        if self.guards is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.guards.stragglers.pause()
        found = super().compute_loss(model, inputs, *args, **kwargs)
        # weighted as training_step weights micro-batches
        scaled = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
        loss = found[0] if isinstance(found, tuple) else found
        part = loss if scaled or self.compute_loss_func else loss / self.current_gradient_accumulation_steps
        # a loss of several elements, one per GPU under DataParallel, is averaged as training_step averages it
        self.guards.add_loss(part.mean(), last=self.accelerator.sync_gradients)
        return found
