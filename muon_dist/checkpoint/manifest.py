"""manifest.json: the tensors of a checkpoint and their positions in files, and the files' sizes and hashes.

The first line is the SHA-256 of all following bytes, so that a damaged manifest is detected too.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from muon_dist.checkpoint.files import DTYPES, FileRecord, write_bytes
from muon_dist.errors import CheckpointError
from muon_dist.layout.block import Block

NAME = "manifest.json"
MODEL_FOLDER = "hf"
"""Folder in a checkpoint with the other files that transformers needs: configuration and tokenizer."""
FORMAT = "muon_dist checkpoint"
VERSION = 1
_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)?")


@dataclass(frozen=True, slots=True)
class Stored:
    """A part of a logical tensor in a safetensors file: 1-D for a run, (rows, cols) for a block."""

    file: str
    key: str
    kind: str
    name: str
    block: Block


@dataclass(frozen=True)
class Tensor:
    """A logical tensor: its shape, its saved dtype ("F32"), and all its parts."""

    shape: tuple[int, ...]
    dtype: str
    parts: list[Stored] = field(default_factory=list, compare=False)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint's manifest.

    Attributes:
        step: number of finished optimizer steps.
        world_size, layout: those of the saving run; a run with any others can load it.
        tensors: logical tensors by (kind, name).
        files: file records by name within the folder.
        info: position in the data, configuration, versions; plain JSON.
        state: named small states, encoded by `state.encode`.
    """

    step: int
    world_size: int
    layout: str
    tensors: dict[tuple[str, str], Tensor]
    files: dict[str, FileRecord]
    info: dict[str, Any]
    state: dict[str, Any]

    def kinds(self) -> list[str]:
        """The kinds of its tensors."""
        return sorted({kind for kind, _ in self.tensors})

    def nbytes(self) -> int:
        """Bytes of all files except the manifest."""
        return sum(record.size for record in self.files.values())


def rank_file(rank: int, suffix: str) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.{suffix}"


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a committed checkpoint. Its data files are not read."""
    return (folder / NAME).is_file()


def model_folder(folder: Path) -> Path:
    """The folder with configuration and tokenizer of `folder`, which is one of our checkpoints or a model folder."""
    return folder / MODEL_FOLDER if is_checkpoint(folder) else folder


def write_manifest(folder: Path, manifest: Manifest, rank: int) -> None:
    """Write the manifest into `folder` and sync it."""
    tensors: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {
        name: {"size": r.size, "sha256": r.sha256} for name, r in sorted(manifest.files.items())
    }
    for (kind, name), tensor in sorted(manifest.tensors.items()):
        tensors.setdefault(kind, {})[name] = {"shape": list(tensor.shape), "dtype": tensor.dtype}
        for part in tensor.parts:
            e = part.block
            row = [part.key, kind, name, e.start, e.rows, e.cols, e.stride]
            files[part.file].setdefault("tensors", []).append(row)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "info": manifest.info,
        "state": manifest.state,
        "tensors": tensors,
        "files": files,
    }
    text = json.dumps(body, separators=(",", ":"))[1:].encode() + b"\n"
    line = b'{"sha256": "' + hashlib.sha256(text).hexdigest().encode() + b'",\n'
    write_bytes(folder / NAME, line + text, rank)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint; other files are not read.

    Raises:
        CheckpointError: the manifest is missing, damaged, in another format, or names a file outside the folder.
    """
    path = folder / NAME
    if folder.is_symlink() or path.is_symlink():
        raise CheckpointError(f"{path if path.is_symlink() else folder} is a link: name the checkpoint itself")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} is not a checkpoint: {NAME} cannot be read ({error.strerror})") from error
    first = _FIRST_LINE.match(data)
    if first is None or hashlib.sha256(data[first.end() :]).hexdigest().encode() != first[1]:
        raise CheckpointError(f"{path} is damaged: its bytes do not have the SHA-256 of its first line")
    try:
        body = json.loads(data)
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise CheckpointError(
                f"{path} is {body['format']!r} version {body['version']!r}; this package reads {FORMAT!r} version "
                f"{VERSION}"
            )
        return _parsed(path, body)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest: {type(error).__name__}: {error}") from error


def _parsed(path: Path, body: Mapping[str, Any]) -> Manifest:
    tensors = {
        (kind, name): Tensor(tuple(_number(n) for n in t["shape"]), _known(DTYPES, t["dtype"]))
        for kind, named in body["tensors"].items()
        for name, t in named.items()
    }
    files: dict[str, FileRecord] = {}
    for name, record in body["files"].items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{path} names the file {name!r}: only names within the checkpoint are read")
        files[name] = FileRecord(_number(record["size"]), str(record["sha256"]))
        for key, kind, tensor, offset, rows, cols, stride in record.get("tensors", ()):
            block = Block(_number(offset), _number(rows), _number(cols), _number(stride))
            part = Stored(name, str(key), kind, tensor, block)
            _check_part(path, part, tensors[kind, tensor])
            tensors[kind, tensor].parts.append(part)
    for (kind, name), tensor in tensors.items():
        held = sum(part.block.numel for part in tensor.parts)
        if held != tensor.numel:
            raise CheckpointError(
                f"{path}: only {held} of the {tensor.numel} elements of {name} ({kind}) are in its files"
            )
    return Manifest(
        step=_number(body["step"]),
        world_size=_number(body["world_size"]),
        layout=str(body["layout"]),
        tensors=tensors,
        files=files,
        info=dict(body["info"]),
        state=dict(body["state"]),
    )


def _check_part(path: Path, part: Stored, tensor: Tensor) -> None:
    e = part.block
    if e.rows < 1 or e.cols < 1 or e.stop > tensor.numel or (e.rows > 1 and e.stride < e.cols):
        raise CheckpointError(f"{path}: {part.name} ({part.kind}) of shape {tensor.shape} has no part {e}")


def _known(names: Mapping[str, Any], value: Any) -> str:
    if value not in names:
        raise ValueError(f"{value!r} is not one of {', '.join(names)}")
    return str(value)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
