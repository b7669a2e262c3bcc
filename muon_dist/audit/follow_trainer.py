"""Attaches a witness to the Hugging Face Trainer, whose optimizer exists only after training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback


class _Begin(TrainerCallback):
    """Calls `attach` with the optimizer or the engine when training begins."""

    def __init__(self, trainer: Any, attach: Callable[[Any, nn.Module], None]) -> None:
        self.trainer = trainer
        self.attach = attach

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = getattr(self.trainer, "deepspeed", None)
        found = engine if engine is not None else self.trainer.optimizer
        self.attach(found, self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped))


def follow_trainer(trainer: Any, attach: Callable[[Any, nn.Module], None]) -> None:
    """Call `attach(optimizer or engine, model)` when `trainer.train()` begins."""
    trainer.add_callback(_Begin(trainer, attach))
