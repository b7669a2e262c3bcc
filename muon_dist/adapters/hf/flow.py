"""Decides when a run begins to change its folder, and counts epochs as passes over the data."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy


class RunRecord(TrainerCallback):
    """A callback that keeps files in the run folder. It touches them in `begin_run` at the earliest."""

    def begin_run(self, args: Any, state: Any) -> None:
        """The run is about to take its first step, from `state.global_step` on. Called on every rank."""


class BeginRun(TrainerCallback):
    """Calls `trainer.begin_run()` once, when nothing that belongs to a start can be refused any more.

    That is before the first step: trackers have begun, DeepSpeed has been attached, guards stand, and the first batch
    has been read. An evaluation before the first step, and a run that has no step left, count as a beginning too.
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
    """Makes `state.epoch` the number of passes over the training samples, and acts where a pass ends.

    The trainer's own epoch is the whole stream of samples, however often it passes over the data, and begins again
    with each process. "epoch" as the strategy of logging, evaluation or saving means the step that completes a pass,
    and the last step.
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
        # Trainer's flow has just asked for everything again, because the stream has ended.
        if self._acted == state.global_step or state.global_step < state.max_steps:
            if args.eval_strategy == IntervalStrategy.EPOCH:
                control.should_evaluate = False
            if args.save_strategy == SaveStrategy.EPOCH:
                control.should_save = False
