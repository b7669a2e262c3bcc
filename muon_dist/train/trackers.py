"""Folders of trackers (TensorBoard, wandb, trackio): in the run folder, unless the user has set others."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

# tracker -> (variable that it reads, folder below the run's)
_PLACES = {
    "tensorboard": ("TENSORBOARD_LOGGING_DIR", "tensorboard"),
    "wandb": ("WANDB_DIR", "."),  # wandb makes a folder "wandb" in it
    "trackio": ("TRACKIO_DIR", "trackio"),
}


class TrackerFolder:
    """The trackers' folder of one start of a run.

    While entered, the environment variables of the requested trackers name this folder. A variable that the user has
    set does not change. Use it on every rank; `first`: this rank makes and clears the folder.
    """

    def __init__(self, folder: Path, trackers: str | Sequence[str] | None, first: bool) -> None:
        self.folder, self.first = folder, first
        wanted = [trackers] if isinstance(trackers, str) else list(trackers or ())
        self.wanted = list(_PLACES) if "all" in wanted else [name for name in wanted if name in _PLACES]
        self._lent: list[str] = []
        self._before: dict[Path, int] = {}
        self._made: list[Path] = []

    def __enter__(self) -> TrackerFolder:
        self._before = self._files()
        for name in self.wanted:
            variable, place = _PLACES[name]
            if os.environ.get(variable):
                continue
            target = (self.folder / place).absolute()
            if self.first:
                self._made += [path for path in (target, *target.parents) if not path.exists()]
                target.mkdir(parents=True, exist_ok=True)  # if this folder does not exist, wandb uses another one
            os.environ[variable] = str(target)
            self._lent.append(variable)
        return self

    def __exit__(self, *_: object) -> None:
        while self._lent:
            os.environ.pop(self._lent.pop(), None)

    def drop_old(self) -> None:
        """Remove the tracker events of the run that this start replaces."""
        for path, changed in self._before.items():
            if path.exists() and path.stat().st_mtime_ns == changed:
                path.unlink()
        self._drop_empty()

    def drop_new(self) -> None:
        """Remove the tracker files of a start that failed before its first step."""
        for path in self._files().keys() - self._before.keys():
            with contextlib.suppress(OSError):
                path.unlink()
        self._drop_empty()
        for path in self._made:  # the run folder and its parents, if this start made them
            with contextlib.suppress(OSError):
                path.rmdir()

    def _files(self) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in self.folder.rglob("*") if p.is_file()}

    def _drop_empty(self) -> None:
        folders = sorted((p for p in self.folder.rglob("*") if p.is_dir()), reverse=True)
        for path in (*folders, self.folder):
            with contextlib.suppress(OSError):
                path.rmdir()
