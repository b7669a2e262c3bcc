"""Keeps commands running if standard output or error fails: closed readers, full disks, narrow encodings."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


def make_safe() -> None:
    """Make the standard streams safe; call it before a command runs.

    A closed stream is opened on the null device, so that none of our files gets its number. A character that the
    stream's encoding lacks (LANG=C) is shown as an escape, instead of a UnicodeEncodeError.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


class Lasting:
    """A text stream that ignores failed writes, so that a run continues after its reader has ended (`| head`)."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        """Discard the buffer and everything that is written from now on."""
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
        if self._stream is not sys.__stderr__:
            print(f"warning: standard output cannot be written ({error.strerror}); the run continues without it",
                  file=sys.stderr, flush=True)  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """After this call a failed write to standard output or standard error does not end the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, Lasting(stream))
