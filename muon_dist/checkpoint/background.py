"""Saves checkpoints, in the background or not, and applies the policy for errors and old checkpoints."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from muon_dist.checkpoint import folder
from muon_dist.checkpoint.host_memory import HostMemory
from muon_dist.checkpoint.phases import enter
from muon_dist.checkpoint.piece import Piece
from muon_dist.checkpoint.ranks import Ranks
from muon_dist.checkpoint.writer import Contents, Snapshot, commit, take
from muon_dist.errors import CheckpointError


def warn_on_stderr(text: str) -> None:
    """Print a warning to stderr; the default for failed saves."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Saver:
    """Commits checkpoints under `root`.

    Args:
        root: folder of the checkpoints.
        ranks: all ranks that save together, with a separate process group, because a save in the background runs
            during training.
        background: block the caller only for a copy to host memory, and write in a thread; at most one save at a time.
            The copies stay allocated; they are as large as this rank's part of a checkpoint.
        on_error: if a save fails, "stop" raises and "continue" warns. An error in the background is raised on all
            ranks by the next `save` or `wait`; the first rank warns at once.
        keep_last, keep_every: see `folder.retire`.

    Attributes:
        last: the newest commit by this process.
    """

    def __init__(
        self,
        root: str | Path,
        ranks: Ranks | None = None,
        *,
        background: bool = False,
        on_error: str = "stop",
        keep_last: int | None = None,
        keep_every: int | None = None,
        warn: Callable[[str], None] = warn_on_stderr,
    ) -> None:
        if on_error not in ("stop", "continue"):
            raise ValueError(f"on_error is {on_error!r}: use stop or continue")
        self.root = Path(root)
        self.ranks = ranks or Ranks()
        self.background = background
        self.on_error = on_error
        self.keep_last, self.keep_every = keep_last, keep_every
        self.warn = warn
        self.last: Path | None = None
        self._host = HostMemory() if background else None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(
        self,
        pieces: Sequence[Piece],
        contents: Contents,
        *,
        state: Mapping[str, Any] | None = None,
        rank_state: Mapping[str, Any] | None = None,
        protected: Collection[Path] = (),
    ) -> None:
        """Save a checkpoint; a collective. See `take` and `Contents`. `protected` checkpoints are never removed.

        Raises:
            CheckpointError: this save, or the previous save in the background, failed and the policy is "stop".
        """
        self.wait()
        final = self.root / folder.checkpoint_name(contents.step)
        taken: list[tuple[Snapshot, dict[str, Any]]] = []

        def copy() -> None:
            enter("start", final, self.ranks.rank)
            taken.append(take(pieces, self.ranks.rank, rank_state or {}, state=state, host=self._host))
            enter("copied", final, self.ranks.rank)

        try:
            self.ranks.everywhere(copy)
        except CheckpointError as error:
            self._problem = error
            self._raise_problem()
            return
        snapshot, shared = taken[0]
        contents = replace(contents, state=shared)
        if self.background:
            # Not a daemon, so that a process that ends normally waits for its commit.
            self._thread = threading.Thread(
                target=self._commit, args=(snapshot, contents, protected), name="checkpoint", daemon=False
            )
            self._thread.start()
            return
        self._commit(snapshot, contents, protected)
        self._raise_problem()

    def wait(self) -> Path | None:
        """Wait for the save in the background, if any; return the newest commit. Raises as `save` does."""
        self.settle()
        self._raise_problem()
        return self.last

    def settle(self) -> None:
        """Wait for the save in the background. The next `save` or `wait` still reports its outcome."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, None
        if problem is None:
            return
        if not isinstance(problem, CheckpointError):  # a lost rank or a bug: no policy covers it
            raise problem
        if self.on_error == "stop":
            raise problem

    def _commit(self, snapshot: Snapshot, contents: Contents, protected: Collection[Path]) -> None:
        try:
            self.last = commit(self.root, self.ranks, snapshot, contents)
        except BaseException as error:
            self._problem = error
            if self.ranks.rank == 0:
                later = "" if self.on_error == "stop" else "; the run continues without it (checkpoint.on_error)"
                self.warn(f"{error}{later}")
            return
        if self.ranks.rank == 0:
            try:
                folder.retire(
                    self.root,
                    self.last,
                    keep_last=self.keep_last,
                    keep_every=self.keep_every,
                    protected=protected,
                )
            except OSError as error:
                self.warn(f"{self.root}: an old checkpoint could not be removed: {error}")
