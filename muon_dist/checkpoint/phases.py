"""Phases of a save: listeners are called at each phase, for the fault injector, messages and measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "start",  # every rank: before the state is copied or written; path is the future folder
    "copied",  # every rank, only background saves: the state is in host memory and training may continue
    "make",  # first rank: before the temporary folder is made
    "write",  # before each tensor and small file is written
    "fsync",  # before a file is synced
    "written",  # after a file was synced and closed
    "gather",  # every rank: its files are on disk; before the ranks exchange their results
    "manifest",  # first rank: before the manifest is written
    "sync_folder",  # first rank: before a folder is synced
    "set_aside",  # first rank: before an older commit of the same step is renamed
    "rename",  # first rank: before the temporary folder is renamed to the checkpoint
    "renamed",  # first rank: after this rename
    "committed",  # every rank: the save is finished
    "delete",  # first rank: before an old folder is renamed and removed
    "load",  # every rank: before a verified checkpoint is copied into the model
)


@dataclass(frozen=True)
class Phase:
    """A phase that a save or load has reached.

    Attributes:
        name: one of PHASES.
        path: the file or folder concerned.
        rank: rank of the process.
        number: counts the phases of this process, from 1.
    """

    name: str
    path: Path
    rank: int
    number: int


Listener = Callable[[Phase], None]
LISTENERS: list[Listener] = []
"""Functions that are called at every phase, in the thread that saves. An error in them fails the save, like a disk
error. An empty list costs nothing."""

_entered = 0


def enter(name: str, path: Path, rank: int) -> None:
    """Call the listeners for a phase."""
    global _entered
    if not LISTENERS:
        return
    assert name in PHASES, name
    _entered += 1
    for listener in tuple(LISTENERS):
        listener(Phase(name, path, rank, _entered))
