"""Decides when a run may start to change its folder, and counts epochs as passes over the data."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


class RunRecord(TrainerCallback):
    """A callback with files in the run folder. It must not change them before `begin_run`."""

    def begin_run(self, args: Any, state: Any) -> None:
        """Called on every rank before the run's first step; `state.global_step` steps are finished."""


class BeginRun(TrainerCallback):
    """Calls `trainer.begin_run()` once, after all checks that can stop a run at its start.

    This is before the first step: trackers have started, DeepSpeed is attached, guards are active, and the first batch
    is read. It is also called before an evaluation that precedes the first step, and in a run without steps left.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._begun = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = False

    def _begin(self, args: Any, state: Any) -> None:
        if self._begun or not self.trainer.is_in_train:
            return
        self._begun = True
        self.trainer.begin_run()
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, RunRecord):
                callback.begin_run(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(args, state)


class Passes(TrainerCallback):
    """Sets `state.epoch` to the number of passes over the training samples, and acts at the end of a pass.

    Trainer's epoch is the whole stream of samples, even if it passes over the data several times, and restarts with
    each process. The strategy "epoch" for logging, evaluation or saving means the step that completes a pass, and the
    last step.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._acted = -1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        samples, consumed = len(self.trainer.train_dataset), self.trainer.consumed_samples
        state.epoch = consumed / samples
        if consumed // samples > (consumed - self.trainer.samples_per_step) // samples:
            self._acted = state.global_step
            if args.logging_strategy == IntervalStrategy.EPOCH:
                control.should_log = True
            if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch:
                control.should_evaluate = True
            if args.save_strategy == SaveStrategy.EPOCH:
                control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # At the end of the stream Trainer requests logging, evaluation and saving again.
        if self._acted == state.global_step or state.global_step < state.max_steps:
            if args.eval_strategy == IntervalStrategy.EPOCH:
                control.should_evaluate = False
            if args.save_strategy == SaveStrategy.EPOCH:
                control.should_save = False
