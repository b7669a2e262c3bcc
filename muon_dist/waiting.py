"""Notes during long waits: for another process, a compiler, or a framework that starts."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

AFTER = 10.0
"""Seconds of silence before the first line."""
AGAIN = 60.0
"""Seconds between two lines."""


@contextlib.contextmanager
def told(what: str | Callable[[], str], after: float = AFTER, again: float = AGAIN) -> Iterator[None]:
    """Context that prints `what` to standard error after `after` seconds, and again every `again` seconds.

    Only one process per machine prints (LOCAL_RANK 0). what: text such as "torch.compile builds Newton-Schulz", or a
    function that returns it. The function is called before each line, so the text can name the reason for the wait.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    done, began = threading.Event(), time.monotonic()

    def speak() -> None:
        pause = after
        while not done.wait(pause):
            text = what() if callable(what) else what
            print(f"note: {text}: {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)
            pause = again

    speaker = threading.Thread(target=speak, name="muon_dist told", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        done.set()
        speaker.join()


def extensions_folder(variables: Mapping[str, str] = os.environ) -> Path:
    """The folder in which torch stores compiled extensions."""
    if variables.get("TORCH_EXTENSIONS_DIR"):
        return Path(variables["TORCH_EXTENSIONS_DIR"])
    cache = variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME", "~")).expanduser() / ".cache"
    return Path(cache) / "torch_extensions"


def build_locks(folder: Path | None = None) -> list[Path]:
    """The build locks in torch's folder of extensions. A killed build leaves one, and later builds wait for it."""
    folder = extensions_folder() if folder is None else folder
    return sorted(folder.rglob("lock")) if folder.is_dir() else []


def starting(framework: str) -> str:
    """The text for a framework that prepares a model; names a build lock for which it may be waiting."""
    locks = build_locks()
    if not locks:
        return f"{framework} prepares the model"
    return (
        f"{framework} prepares the model, and may wait for the build lock {locks[0]} (`muon-dist doctor` says whether "
        "a process still builds there)"
    )
