"""The folder of a run: its files, and whether a run may start in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.arguments import AUTO, IF_ANY
from muon_dist.audit.chain import FILE as AUDIT_FILE
from muon_dist.checkpoint import commits
from muon_dist.checkpoint.manifest import NAME as MANIFEST
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.weights import DATA, set_model_aside
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.json_files import write_json
from muon_dist.train.restarts import is_restart, launch_names


@dataclass(frozen=True)
class Start:
    """How a run starts in its folder.

    resume: AUTO, the path of a checkpoint, or None for step 0. replaces: the run already in the folder is removed.
    """

    resume: str | None
    replaces: bool


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def data(self) -> Path:
        """The file that describes the data: the tokenizer's hash, samples of each source."""
        return self.root / DATA

    @property
    def environment(self) -> Path:
        """Versions, hardware, command line."""
        return self.root / "environment.json"

    @property
    def routing(self) -> Path:
        """The routing table for programs; routing.txt next to it is for people."""
        return self.root / "routing.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Starts, checkpoints, ends; one JSON object per line."""
        return self.root / "events.jsonl"

    @property
    def ownership(self) -> Path:
        """Which rank owns which matrix."""
        return self.root / "ownership.json"

    @property
    def spectra(self) -> Path:
        """Spectral measures, one file per rank."""
        return self.root / "spectra"

    @property
    def audit(self) -> Path:
        """The audit's record, one JSON object per line."""
        return self.root / AUDIT_FILE

    @property
    def checkpoints(self) -> Path:
        """Folders checkpoint-STEP; see `muon_dist.checkpoint`."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The final model with its tokenizer."""
        return self.root / "model"

    @property
    def trackers(self) -> Path:
        """Events of TensorBoard, wandb and trackio."""
        return self.root / "trackers"

    @property
    def summary(self) -> Path:
        """The figures at the end."""
        return self.root / "summary.json"

    @property
    def launch(self) -> Path:
        """The launch that made the folder, so that a restart of this launch continues the run by itself."""
        return self.root / "launch.json"

    def finished_checkpoints(self) -> list[Path]:
        """Committed checkpoints, oldest step first."""
        return commits(self.checkpoints)

    def decide(self, resume: str | None, overwrite: bool, policy: str = "auto") -> Start:
        """Decide how a run starts in the folder; `begin` makes the changes.

        resume: "auto" (the newest checkpoint), "if-any" (the newest checkpoint, or step 0 if there is none: for
        launchers that repeat the command), the path of a checkpoint, or None.
        policy: `checkpoint.resume`. With "auto" a restart of the launch that made the folder continues from its newest
        checkpoint, or begins again if there is none, for any `resume` and `overwrite` of the first start. With
        "always" every start without `resume` and `overwrite` does the same.

        Raises ConfigError if the folder already contains a run and neither resume nor overwrite is set;
        CheckpointError if there is no checkpoint to resume from.
        """
        resume, overwrite = self._decided(resume, overwrite, policy)
        if resume == AUTO and not self.finished_checkpoints():
            raise CheckpointError(
                f"--resume auto: {self.checkpoints} holds no finished checkpoint; leave --resume out to start again"
            )
        if resume not in (None, AUTO) and not is_checkpoint(Path(resume)):
            inside = commits(Path(resume) / self.checkpoints.name)
            meant = f"; name a checkpoint in it, such as {inside[-1]}" if inside else ""
            raise CheckpointError(
                f"--resume {resume}: this is not a finished checkpoint ({MANIFEST} is missing){meant}"
            )
        own = resume == AUTO or (resume is not None and Path(resume).resolve().parent == self.checkpoints.resolve())
        if not own and not overwrite and (self.metrics.exists() or self.checkpoints.exists()):
            raise ConfigError(
                f"{self.root} holds a run already: continue it with --resume auto, start it again with "
                "--overwrite, or choose another name=..."
            )
        return Start(resume, replaces=not own)

    def begin(self, start: Start, step: int = 0) -> None:
        """Make the folder ready for a run that is about to take its first step.

        step: the optimizer step that it continues from. A final model of a later step is set aside.
        """
        if start.replaces:
            for path in (self.checkpoints, self.model, self.spectra):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.metrics, self.summary, self.events, self.ownership, self.audit):
                path.unlink(missing_ok=True)
        else:
            set_model_aside(self.root, step)
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.launch, {"names": launch_names()})

    def remove_if_empty(self, made: Sequence[Path] = ()) -> None:
        """Remove the empty folders of a start that failed before `begin`; a folder with a file in it stays.

        made: the folders that the start made, the innermost first.
        """
        for path in (self.checkpoints, self.root, *made):
            with contextlib.suppress(OSError, ValueError):
                path.rmdir()

    def _decided(self, resume: str | None, overwrite: bool, policy: str) -> tuple[str | None, bool]:
        """The decision from `resume`, `overwrite` and the contents of the folder."""
        found = bool(self.finished_checkpoints())
        if policy != "never" and is_restart(self.launch):
            return (AUTO, False) if found else (resume if resume not in (AUTO, IF_ANY) else None, True)
        if resume == IF_ANY:
            return (AUTO, overwrite) if found else (None, True)
        if policy == "always" and resume is None and not overwrite and found:
            return AUTO, False
        return resume, overwrite


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
