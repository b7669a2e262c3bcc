"""All private names of the Hugging Face Trainer that we use, each with the reason.

`PrivateTrainer` overrides private methods of `transformers.Trainer`. Each override has one or two lines and calls a
public method, whose docstring gives its purpose. Subclasses override only the public methods. A new version of
transformers may change any private name: `check_private` refuses a version without one of them, and
tests/adapters/hf/test_private.py names a method whose signature changed or that Trainer no longer calls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

from muon_dist.errors import FrameworkError
from muon_dist.waiting import starting, told

OVERRIDDEN = (
    "_get_train_sampler",
    "_get_grad_norm",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_prepare_for_training",
    "_load_rng_state",
    "_load_best_model",
    "_finalize_training",
)
"""Private methods of Trainer that `PrivateTrainer` replaces or wraps."""

CALLED = ("_get_output_dir", "_prepare_inputs")
"""Private methods of Trainer that we call."""


class PrivateTrainer(Trainer):
    """A `Trainer` whose private methods call public methods that a subclass can override."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_private(Trainer)
        super().__init__(*args, **kwargs)

    # ---- methods that a subclass overrides

    def training_order(self, dataset: Any) -> torch.utils.data.Sampler[int] | None:
        """The sampler of the training data; by default Trainer's. Called when the training data loader is made."""
        return super()._get_train_sampler(dataset)

    def clip_gradients(self, model: nn.Module, norm: Any) -> Any:
        """Clip the gradients, and return the norm for the log. Called before each optimizer step.

        norm: norm of the gradients if Trainer has clipped them (`max_grad_norm`), else None.
        """
        return super()._get_grad_norm(model, norm)

    def write_checkpoint(self, folder: Path) -> None:
        """Save the run below `folder`, on every rank. Called when a save is due."""

    def restore(self) -> None:
        """Load weights and all state. Called once model and optimizer are wrapped, before training begins."""

    def restore_rank(self) -> None:
        """Load this rank's own state (random generators). Called when the first epoch of a resumed run begins."""

    def load_best_weights(self, path: Path) -> None:
        """Load the weights of the best checkpoint. Called after the last step, with `load_best_model_at_end`."""

    def finish_saves(self) -> None:
        """Wait for saves in the background. Called after the last step, before the best checkpoint is loaded."""

    # ---- attributes that we read

    @property
    def micro_batch_size(self) -> int:
        """Number of samples per micro-batch on this rank.

        Reads a private attribute, because `args.train_batch_size` keeps its value if `auto_find_batch_size` lowers the
        size.
        """
        return int(self._train_batch_size)

    def on_device(self, inputs: Any) -> Any:
        """`inputs` on the device of the model, in the dtype that DeepSpeed needs.

        Uses a private method, because Trainer has no public one: it does this inside `prediction_step`.
        """
        return self._prepare_inputs(inputs)

    # ---- Trainer's private methods

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Trainer has no argument for a sampler; the alternative is to rewrite `get_train_dataloader`.
        return self.training_order(train_dataset)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The event `on_pre_optimizer_step` comes too late: Trainer has then computed the norm for the log, by a second
        # pass over all gradients, and on a mesh by more messages.
        return self.clip_gradients(model, grad_norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # The event `on_save` comes after the save; `save_model` saves only the weights.
        self.write_checkpoint(Path(self._get_output_dir(trial=trial)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Do nothing: Trainer looks for files that our checkpoints do not have. `restore` loads weights and optimizer
        # state when both are on their final devices. Trainer needs the path only to load its own state.
        pass

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # Without a path Trainer does not look for files of optimizer and scheduler. The event `on_train_begin` is too
        # late for `restore`, because other callbacks, such as trackers, must see the restored state.
        with told(lambda: starting("DeepSpeed" if self.is_deepspeed_enabled else "accelerate")):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.restore()
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Trainer would unpickle its own random-state files.
        self.restore_rank()

    def _load_best_model(self) -> None:
        # Trainer would look for its own weight files.
        assert self.state.best_model_checkpoint is not None
        self.load_best_weights(Path(self.state.best_model_checkpoint))

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With `save_total_limit=1` Trainer deletes all checkpoints but the best here, file by file; a run must be able
        # to resume from the newest. The event `on_train_end` comes later.
        self.finish_saves()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit


def check_private(trainer: type) -> None:
    """Raises FrameworkError if `trainer`, the installed `Trainer`, lacks a private method that we override or call.

    Without this check Python would not complain about an override that is never called, and a resumed run would start
    with fresh weights.
    """
    missing = [name for name in (*OVERRIDDEN, *CALLED) if not callable(getattr(trainer, name, None))]
    if missing:
        raise FrameworkError(
            f"transformers {transformers.__version__}: its Trainer has no {', '.join(missing)}, which MuonTrainer "
            "needs to save, resume and clip: install another version of transformers (see pyproject.toml), or use "
            "the stock Trainer with optimizer_cls_and_kwargs=muon_dist.for_trainer(args)"
        )


def use_one_gpu(args: TrainingArguments) -> None:
    """Let this process use only one GPU; with several visible GPUs Trainer would use DataParallel.

    Sets a private attribute, because `TrainingArguments.n_gpu` cannot be set.
    """
    args._n_gpu = 1
