"""Converts errors of other libraries to one message and an exit code for the command line.

Does not import torch, because `muon-dist --help` imports this module.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

from muon_dist.errors import FileError, MuonDistError, PeerError, ResourceError, UnexpectedError

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "free some of the quota, or choose another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "the links lead in a circle: remove one of them",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EEXIST: "it is in the way: remove it, or choose another folder",
    errno.ENOENT: "check the path",
    errno.EISDIR: "it is a folder: name a file",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ESTALE: "the network file system has lost it: mount it again",
    errno.EIO: "the disk or the mount fails: check it, then start the same command again with --resume auto",
}
# Texts of system and memory errors in libraries written in Rust or C++: safetensors and tokenizers, torch's
# allocators, gloo and NCCL.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = re.compile(r"can't allocate memory|CUDA out of memory|std::bad_alloc|Cannot allocate memory")
_PEERS = re.compile(r"gloo/|NCCL error|ncclInternalError|ncclSystemError|ncclRemoteError|Socket Timeout")


def known(error: BaseException) -> MuonDistError | None:
    """`error` itself if it is one of our errors; our error for a file, memory or other-rank error; else None."""
    if isinstance(error, MuonDistError):
        return error
    text = one_line(error)
    rust = _RUST_ERROR.search(text)
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ADVICE):
        return FileError(_file_message(error))
    if rust is not None:
        return FileError(f"{text}: {_ADVICE.get(int(rust[1]), 'check the disk and the path')}")
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names or _NO_MEMORY.search(text):
        return ResourceError(
            f"no memory is left ({text}): lower trainer.per_device_train_batch_size (or --batch-size), "
            "data.sequence_length or the model's size; `muon-dist plan` shows the memory that a run needs"
        )
    if "DistError" in names or (isinstance(error, RuntimeError) and _PEERS.search(text)):
        return PeerError(
            f"another rank is gone or cannot be reached: {text}. The message of the rank that failed first says why"
        )
    return None


def as_error(error: BaseException) -> MuonDistError:
    """The error that the command line prints for `error`. The traceback of an unknown kind goes into a file."""
    found = known(error)
    return found if found is not None else UnexpectedError(_unexpected(error))


def say(text: str) -> None:
    """Print the message of an error. launch/torchrun.sh repeats the first one below torchrun's table of exit codes."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    path = os.environ.get("MUON_DIST_FIRST_ERROR")
    if path:
        # Added by one write: torchrun may end this process at any time, and another process may add its error.
        with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
            file.write(text.encode(errors="backslashreplace") + b"\0")


def _file_message(error: OSError) -> str:
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "check the path and the file system")
    if error.filename is None:
        return f"a file cannot be read or written: {reason}; {advice}"
    names = " and ".join(_shortened(n) for n in (error.filename, error.filename2) if n is not None)
    return f"{names}: {reason}; {advice}"


def _shortened(name: object) -> str:
    text = os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]} ({len(text)} characters)"


def _unexpected(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}muon_dist{os.sep}" in f.filename]
    where = f", raised in {_place(frames[-1])}" if frames else ""
    if ours and ours[-1] is not frames[-1]:
        where += f", called from {_place(ours[-1])}"
    said = f"unexpected {type(error).__name__}: {_shortened(one_line(error))}{where}. "
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    path = _kept(text)
    if path is None:
        return f"{said}The traceback could not be written to a file, so here it is:\n{text}"
    return f"{said}The traceback is in {path}: please report the error with that file"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{os.sep.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


def _kept(text: str) -> Path | None:
    """A new file with `text`, in the folder for temporary files or else in the current folder; None if both fail."""
    name = f"muon-dist-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (tempfile.gettempdir, os.getcwd):
        with contextlib.suppress(OSError):
            path = Path(folder(), name)
            path.write_text(f"command: {sys.argv[0]}\n{text}", encoding="utf-8", errors="backslashreplace")
            return path
    return None


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
