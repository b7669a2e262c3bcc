"""The phase of a save: called at each boundary, for the fault injector, for messages and for measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "start",  # every rank: the state is about to be copied or written; path is the future folder
    "copied",  # every rank: background saves only, the state lies in host memory and training may continue
    "make",  # first rank: the temporary folder is about to be made
    "write",  # before each tensor and small file is written
    "fsync",  # before a file is synced
    "written",  # after a file was synced and closed
    "gather",  # every rank: its files are on disk; the ranks are about to agree
    "manifest",  # first rank: the manifest is about to be written
    "sync_folder",  # first rank: before a folder is synced
    "set_aside",  # first rank: an older commit of the same step is about to be renamed
    "rename",  # first rank: the temporary folder is about to become the checkpoint
    "renamed",  # first rank: it has
    "committed",  # every rank: the save is over
    "delete",  # first rank: an old folder is about to be renamed and removed
    "load",  # every rank: a verified checkpoint is about to be copied into the model
)


@dataclass(frozen=True)
class Phase:
    """A boundary that a save or load has reached.

    Attributes:
        name: one of PHASES.
        path: the file or folder that it is about.
        rank: of the process.
        number: counts the phases of this process, from 1.
    """

    name: str
    path: Path
    rank: int
    number: int


Listener = Callable[[Phase], None]
LISTENERS: list[Listener] = []
"""Called in turn at every phase, in the thread that saves. What they raise fails the save as an error of the disk
would; an empty list costs nothing."""

_entered = 0


def enter(name: str, path: Path, rank: int) -> None:
    """Say that a phase begins."""
    global _entered
    if not LISTENERS:
        return
    assert name in PHASES, name
    _entered += 1
    for listener in tuple(LISTENERS):
        listener(Phase(name, path, rank, _entered))
