"""Files that exist completely or not at all: hashes, durable JSON, folders committed by rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from muon_dist.errors import DataError
from muon_dist.json_files import canonical, read_object
from muon_dist.waiting import told

BLOCK_BYTES = 1 << 20  # unit in which damage is located


def sha256_stream(stream: BinaryIO) -> str:
    """SHA-256 of the rest of a stream, read in blocks."""
    digest = hashlib.sha256()
    while block := stream.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with path.open("rb") as stream:
        return sha256_stream(stream)


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(canonical(value)).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; DataError names the file if it is missing or damaged."""
    try:
        return read_object(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except ValueError as error:
        raise DataError(f"{path}: damaged, not a JSON object ({error}).") from None


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def folder_lock(out: Path) -> Iterator[None]:
    """Hold the lock for building ``out``; a second process waits. Files left by a killed builder are removed.

    If the place is read-only and ``out`` exists, there is no lock, and ``out`` is used unchanged.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = (out.parent / f".{out.name}.lock").open("w")
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or not out.is_dir():
            raise
        yield
        return
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with told(f"{out}: another process builds it; this one waits", after=1.0):
                fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in (*out.parent.glob(f".{out.name}.tmp-*"), *out.parent.glob(f".{out.name}.old-*")):
            shutil.rmtree(stale)
        yield


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder next to ``out``. It becomes ``out`` if the block ends without an error, else it is removed.

    Call it under ``folder_lock``. Every file is synced before the rename, the parent after it, so a kill or a power
    cut leaves the old folder, the new one or none, never a part of one.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes private folders
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
        retired = None
        if out.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
            os.rename(out, retired)
        os.rename(temporary, out)
        fsync(out.parent)
        if retired is not None:
            shutil.rmtree(retired)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
