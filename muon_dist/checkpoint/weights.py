"""Chooses the weights of a run: the newest, those of a step, or the best. All commands use this rule."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.checkpoint.folder import commits, step_of
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.reader import Checkpoint
from muon_dist.errors import CheckpointError
from muon_dist.json_files import read_lines, read_object, write_json

RECORD = "muon_dist.json"
"""File in the folder of a final model with the optimizer step of its weights."""

DATA = "data.json"
"""File in a run folder about the data and tokenizer of its training."""


@dataclass(frozen=True)
class Weights:
    """A model folder or a checkpoint. step: the optimizer step of its weights, None if unknown."""

    path: Path
    step: int | None

    def __str__(self) -> str:
        return f"{self.path} ({'step unknown' if self.step is None else f'step {self.step:,}'})"


@dataclass(frozen=True)
class Choice:
    """A choice of weights in a run folder: the newest, unless `step` or `best` is set.

    step: the weights of this optimizer step. best: the weights with the best value of `metric` in the log. metric: a
    name in metrics.jsonl. greater: whether a greater value is better.
    """

    step: int | None = None
    best: bool = False
    metric: str = "eval_loss"
    greater: bool = False

    def __post_init__(self) -> None:
        if self.best and self.step is not None:
            raise CheckpointError("--step and --best both choose the weights: give one of them")


NEWEST = Choice()


def record_step(folder: Path, step: int | None, reached: int | None = None, tokenizers: Collection[str] = ()) -> None:
    """Record in the model folder `folder` that its weights are those of optimizer step `step`.

    reached: the run's step when it wrote them, if it is later (best weights). tokenizers: SHA-256 of the tokenizers of
    the training data; the saved tokenizer file has another hash.
    """
    record: dict[str, Any] = {"step": step} if step is not None else {}
    if reached not in (None, step):
        record["reached"] = reached
    if tokenizers:
        record["tokenizers"] = sorted(tokenizers)
    write_json(folder / RECORD, record)


def weights_at(folder: Path) -> Weights:
    """The weights in a checkpoint or a model folder, with their step. CheckpointError for a damaged manifest."""
    if is_checkpoint(folder):
        return Weights(folder, Checkpoint.look(folder).manifest.step)
    return Weights(folder, _number(folder / RECORD, "step"))


def trained_with(folder: Path) -> set[str]:
    """SHA-256 of the tokenizers of the training data of a model folder or a checkpoint.

    Read from the folder itself or from its run folder; empty if not recorded.
    """
    records = (folder / RECORD, folder.parent / DATA, folder.parent.parent / DATA)
    return {digest for file in records for digest in _value(file, "tokenizers", list) or () if isinstance(digest, str)}


def newest_weights(root: Path) -> Weights | None:
    """The newest weights of a run folder: its final model, or a checkpoint that was committed later; None without any.

    If the run loaded its best weights at the end, the final model has weights of an earlier step, but still counts as
    the newest until the run continues. A model of an earlier version does not record its step: it has the step in
    summary.json, which was written at the same time.
    """
    model = _final_model(root)
    saved = commits(root / "checkpoints")
    newest = Weights(saved[-1], step_of(saved[-1])) if saved else None
    if model is None:
        return newest
    reached = final_step(root)
    if newest is None or newest.step is None or (reached is not None and reached >= newest.step):
        return model
    return newest


def final_step(root: Path) -> int | None:
    """The step that the run had reached when it wrote its final model; None without a final model, or if unknown."""
    model = _final_model(root)
    if model is None:
        return None
    reached = _number(model.path / RECORD, "reached")
    return reached if reached is not None else model.step


def choose_weights(root: Path, choice: Choice = NEWEST) -> Weights | None:
    """The weights of a run folder selected by `choice`; None if the folder has no weights.

    Raises CheckpointError if there are weights, but not of that step, or without a value of the metric in the log.
    """
    if choice.step is None and not choice.best:
        return newest_weights(root)
    held = _held(root)
    if not held:
        return None
    if choice.step is not None:
        if choice.step not in held:
            steps = ", ".join(map(str, sorted(held)))
            raise CheckpointError(f"{root} holds no weights of step {choice.step}, but of {steps}")
        return held[choice.step]
    figures = {step: value for step, value in _logged(root / "metrics.jsonl", choice.metric) if step in held}
    if not figures:
        raise CheckpointError(
            f"{root}: no saved weights have {choice.metric} in metrics.jsonl, so the best are unknown: evaluate at "
            "the steps of checkpoints (trainer.eval_strategy, trainer.eval_steps), or choose by --step"
        )
    order = sorted(figures, key=lambda step: (-figures[step] if choice.greater else figures[step], step))
    return held[order[0]]


def set_model_aside(root: Path, step: int) -> list[Path]:
    """Rename the final model and the summary of a run that resumes from an earlier `step`; return the new paths.

    They belong to an abandoned branch of the run, like the checkpoints after `step`.
    """
    reached = final_step(root)
    if reached is None or reached <= step:
        return []
    mark = f"{reached}-{os.urandom(4).hex()}"
    moved = []
    for path in (root / "model", root / "summary.json"):
        if path.exists():
            moved.append(path.rename(root / f"set-aside-{path.stem}-{mark}{path.suffix}"))
    return moved


def _final_model(root: Path) -> Weights | None:
    model = weights_at(root / "model")
    if not (model.path / "config.json").is_file():
        return None
    return model if model.step is not None else Weights(model.path, _number(root / "summary.json", "steps"))


def _held(root: Path) -> dict[int, Weights]:
    """Step -> weights of that step; the final model has priority over a checkpoint of the same step."""
    found = [Weights(path, step_of(path)) for path in commits(root / "checkpoints")]
    model = _final_model(root)
    return {w.step: w for w in (*found, model) if w is not None and w.step is not None}


def _logged(file: Path, name: str) -> Iterator[tuple[int, float]]:
    """(step, value) of each line of a log with a finite number `name`."""
    try:
        lines = [line for _, line in read_lines(file) if line is not None]
    except OSError:
        return
    for line in lines:
        value = line.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(line.get("step"), int):
            yield line["step"], float(value)


def _number(file: Path, key: str) -> int | None:
    found = _value(file, key, int)
    return found if isinstance(found, int) else None


def _value(file: Path, key: str, kind: type) -> Any:
    """The value of `key` in a JSON file; None if it is missing or has another type."""
    try:
        found = read_object(file).get(key)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None
