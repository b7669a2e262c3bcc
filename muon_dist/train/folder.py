"""The folder of a run: what lies where, and whether a run may start in it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.errors import CheckpointError, ConfigError

_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# Written last, in this order: with both, the save was finished.
_LAST_FILES = ("trainer_state.json", "position.json")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, hardware, command line."""
        return self.root / "environment.json"

    @property
    def routing(self) -> Path:
        """Where each parameter went, for programs; routing.txt beside it for people."""
        return self.root / "routing.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, checkpoints, ends; one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def ownership(self) -> Path:
        """Which rank owns which matrix."""
        return self.root / "ownership.json"

    @property
    def spectra(self) -> Path:
        """Spectral measures, a file a rank."""
        return self.root / "spectra"

    @property
    def checkpoints(self) -> Path:
        """Folders checkpoint-STEP."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model with its tokenizer."""
        return self.root / "model"

    @property
    def summary(self) -> Path:
        """The figures at the end."""
        return self.root / "summary.json"

    def finished_checkpoints(self) -> list[Path]:
        """Checkpoints whose save was finished, oldest step first."""
        if not self.checkpoints.is_dir():
            return []
        found = [(int(m.group(1)), p) for p in self.checkpoints.iterdir() if (m := _CHECKPOINT.match(p.name))]
        return [p for _, p in sorted(found) if all((p / name).is_file() for name in _LAST_FILES)]

    def open(self, resume: str | None, overwrite: bool) -> str | None:
        """Make the folder ready and return the checkpoint to resume from, or None for a new run.

        resume: "auto" (the newest finished checkpoint), "if-any" (the same, and from the start when there is none: for
        launchers that repeat the command), the path of a checkpoint, or None. Raises ConfigError when the folder holds
        a run already and neither resume nor overwrite was asked for, CheckpointError when there is nothing to resume
        from.
        """
        if resume == "if-any":
            resume, overwrite = ("auto", overwrite) if self.finished_checkpoints() else (None, True)
        checkpoint = self._to_resume(resume) if resume is not None else None
        own = checkpoint is not None and checkpoint.resolve().parent == self.checkpoints.resolve()
        if not own and (self.metrics.exists() or self.checkpoints.exists()):
            if not overwrite:
                raise ConfigError(
                    f"{self.root} holds a run already: continue it with --resume auto, start it again with "
                    "--overwrite, or choose another name=..."
                )
            for path in (self.checkpoints, self.model, self.spectra):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.metrics, self.summary, self.events, self.ownership):
                path.unlink(missing_ok=True)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run_dir: cannot make the run folder {self.root}: {error}") from error
        return str(checkpoint) if checkpoint is not None else None

    def _to_resume(self, resume: str) -> Path:
        if resume == "auto":
            finished = self.finished_checkpoints()
            if not finished:
                raise CheckpointError(
                    f"--resume auto: {self.checkpoints} holds no finished checkpoint; leave --resume out to start anew"
                )
            return finished[-1]
        path = Path(resume)
        missing = [name for name in _LAST_FILES if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"--resume {path}: no finished checkpoint there ({', '.join(missing)} missing)")
        return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "optimizer.muon.lr: 0.02 -> 0.01" for each setting that differs between two configurations."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += changed_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
