"""The newest weights of a run: its final model, or a later checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.checkpoint.folder import commits, step_of
from muon_dist.checkpoint.manifest import NAME as MANIFEST
from muon_dist.checkpoint.reader import Checkpoint

RECORD = "muon_dist.json"
"""File in the folder of a final model that says of which optimizer step the weights are."""


@dataclass(frozen=True)
class Weights:
    """A model folder or a checkpoint. step: the optimizer step of its weights, None where nothing says it."""

    path: Path
    step: int | None

    def __str__(self) -> str:
        return f"{self.path} ({'step unknown' if self.step is None else f'step {self.step:,}'})"


def record_step(folder: Path, step: int) -> None:
    """Write into the model folder `folder` that its weights are those of optimizer step `step`."""
    (folder / RECORD).write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")


def weights_at(folder: Path) -> Weights:
    """The weights in a checkpoint or a model folder, with their step. CheckpointError for a damaged manifest."""
    if (folder / MANIFEST).is_file():
        return Weights(folder, Checkpoint.look(folder).manifest.step)
    return Weights(folder, _number(folder / RECORD, "step"))


def newest_weights(root: Path) -> Weights | None:
    """The weights of the highest step in a run folder: those in model/ or in a committed checkpoint.

    Of equal steps the model/ folder is taken. Where it does not say its step (it was written by an earlier version),
    its step is that of summary.json, which was written with it. None where there are no weights.
    """
    model = weights_at(root / "model")
    if model.step is None:
        model = Weights(model.path, _number(root / "summary.json", "steps"))
    saved = commits(root / "checkpoints")
    newest = Weights(saved[-1], step_of(saved[-1])) if saved else None
    if not (model.path / "config.json").is_file():
        return newest
    if newest is None or newest.step is None or (model.step is not None and model.step >= newest.step):
        return model
    return newest


def _number(file: Path, key: str) -> int | None:
    try:
        value: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, int) else None
