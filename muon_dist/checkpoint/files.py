"""Files of a checkpoint: written and hashed in one pass, synced, and fully verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from muon_dist.checkpoint.phases import enter
from muon_dist.errors import CheckpointError

CHUNK = 16 * 2**20
"""Number of bytes that are copied, hashed and written at a time."""

# names of the safetensors format, https://github.com/huggingface/safetensors#format
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class FileRecord:
    """A file's entry in the manifest: size in bytes and SHA-256."""

    size: int
    sha256: str


class _Hashed:
    """A new file that is hashed while it is written, and synced before it is closed."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self._hash, self._size = hashlib.sha256(), 0
        self._file = open(path, "xb", buffering=0)

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)
        while len(view):  # an unbuffered write may write only a part
            view = view[self._file.write(view) :]

    def close(self) -> FileRecord:
        enter("fsync", self.path, self.rank)
        os.fsync(self._file.fileno())
        self._file.close()
        enter("written", self.path, self.rank)
        return FileRecord(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        self._file.close()


def write_bytes(path: Path, data: bytes, rank: int) -> FileRecord:
    """Write a new file and sync it."""
    file = _Hashed(path, rank)
    try:
        enter("write", path, rank)
        file.write(data)
        return file.close()
    finally:
        file.abandon()


def write_state(path: Path, value: Any, rank: int) -> FileRecord:
    """Write small state into a new JSON file and sync it. Keeps NaN and infinity, because a resumed run needs them."""
    return write_bytes(path, (json.dumps(value, indent=1) + "\n").encode(), rank)


def write_tensors(path: Path, items: Sequence[tuple[str, torch.Tensor]], rank: int) -> FileRecord:
    """Write a new safetensors file tensor by tensor and sync it. Needs at most CHUNK bytes of extra host memory.

    items: unique keys, and tensors on any device with a contiguous last axis.
    """
    header: dict[str, Any] = {}
    at = 0
    for key, tensor in items:
        size = tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file = _Hashed(path, rank)
    try:
        enter("write", path, rank)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in items:
            enter("write", path, rank)
            for chunk in _chunks(tensor.detach()):
                file.write(chunk.contiguous().cpu().view(torch.uint8).numpy())
        return file.close()
    finally:
        file.abandon()


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Flat parts in row-major order, of about CHUNK bytes."""
    rows = tensor if tensor.dim() > 1 and not tensor.is_contiguous() else tensor.reshape(-1)
    width = rows.element_size() * (rows[0].numel() if rows.dim() > 1 and len(rows) else 1)
    step = max(1, CHUNK // max(width, 1))
    for first in range(0, len(rows), step):
        yield rows[first : first + step].reshape(-1)


def sync_folder(path: Path, rank: int) -> None:
    """Sync a folder, so that the names of its files survive a crash."""
    enter("sync_folder", path, rank)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_size(path: Path, record: FileRecord) -> None:
    """Raise CheckpointError unless `path` is a regular file (not a link) with the recorded size."""
    try:
        found = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path} is missing: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file (a link or a folder): it is not read")
    if found.st_size != record.size:
        raise CheckpointError(f"{path} has {found.st_size} bytes, but the manifest says {record.size}: it is damaged")


def check_bytes(path: Path, record: FileRecord) -> None:
    """Read a whole file; raise CheckpointError if a byte has changed since it was written."""
    check_size(path, record)
    total = hashlib.sha256()
    buffer = bytearray(CHUNK)
    try:
        with open(path, "rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total.update(memoryview(buffer)[:n])
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if total.hexdigest() != record.sha256:
        raise CheckpointError(f"{path} is damaged: its bytes do not have the SHA-256 of the manifest")
