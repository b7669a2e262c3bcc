"""One run at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from muon_dist.errors import ConfigError

NAME = ".lock"
PATIENCE = 10.0
"""Seconds in which the processes of a launch that was killed can end, before its restart is refused."""
_CANNOT_LOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLock:
    """The right of this process to write to a run folder.

    It is a POSIX record lock: it ends with the process, also after SIGKILL, and forked workers do not keep it.

    Args:
        folder: the run folder; `take` makes it.

    Attributes:
        made: the folders that `take` made, the innermost first.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._file: IO[str] | None = None
        self.made: list[Path] = []

    def take(self) -> None:
        """Make the folder and take the lock.

        Raises ConfigError if the folder or a file in it cannot be made; and, with the process that has the lock, if
        another run trains in the folder. If the file system has no locks, this is printed and the run goes on.
        """
        folder = self._path.parent.absolute()
        try:
            self.made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()  # permissions do not tell: /proc allows root to write, but refuses every file
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"run_dir: cannot make the run folder {str(self._path.parent)[:200]}: {reason}"
            ) from error
        until = time.monotonic() + PATIENCE
        while not self._taken():
            if time.monotonic() > until:
                raise ConfigError(
                    f"{self._path.parent}: another run trains in this folder ({self._holder()}). Wait for it, "
                    "stop it, or choose another name=..."
                )
            time.sleep(0.2)

    def release(self) -> None:
        """Give the lock back, if this process has it, and remove its file."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _taken(self) -> bool:
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno not in _CANNOT_LOCK:
                return False
            print(f"warning: {self._path} cannot be locked ({error.strerror}): start no other run here", flush=True)
            return True
        if not self._is_current(file):
            file.close()
            return False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return True

    def _is_current(self, file: IO[str]) -> bool:
        """False if the run that had the lock removed the file after this process opened it."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8") or "not known"
        except OSError:
            return "not known"
