"""Two-phase commit: all ranks write and sync files in a temporary folder, then one rename makes the folder visible."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from muon_dist.checkpoint import files, folder
from muon_dist.checkpoint.files import DTYPES, FileRecord
from muon_dist.checkpoint.host_memory import HostMemory
from muon_dist.checkpoint.manifest import Manifest, Stored, Tensor, rank_file, write_manifest
from muon_dist.checkpoint.phases import enter
from muon_dist.checkpoint.piece import Piece, to_write
from muon_dist.checkpoint.ranks import Ranks
from muon_dist.checkpoint.state import encode
from muon_dist.errors import CheckpointError
from muon_dist.layout.block import Block

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Index = list[tuple[str, str, str, tuple[int, ...], str, Block]]
"""(key, kind, name, shape of the whole tensor, dtype, block in the tensor) of each written tensor."""


@dataclass
class Snapshot:
    """The tensors that this rank will write: live tensors, or copies that training does not change."""

    items: list[tuple[str, torch.Tensor]]
    index: Index
    rank_state: dict[str, Any]


@dataclass
class Contents:
    """The data of a checkpoint besides tensors; the first rank's values are written.

    Attributes:
        step: number of finished optimizer steps.
        layout: name of the layout, for the manifest.
        info: plain JSON: position in the data, configuration, versions.
        state: named small states, equal on all ranks, encoded by `state.encode`.
        documents: further files by name, at most one folder deep, such as "trainer_state.json".
        name: name of the folder; None: checkpoint-STEP.
    """

    step: int
    layout: str
    info: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    documents: Mapping[str, bytes] = field(default_factory=dict)
    name: str | None = None


def take(
    pieces: Sequence[Piece],
    rank: int,
    rank_state: Mapping[str, Any],
    *,
    state: Mapping[str, Any] | None = None,
    host: HostMemory | None = None,
) -> tuple[Snapshot, dict[str, Any]]:
    """(the snapshot that `rank` writes, the encoded `state`).

    rank_state: state of this rank. state: state that is equal on all ranks; the first rank writes it. host: memory for
    copies of the tensors; None: the snapshot has live tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    own = encode(dict(rank_state), tensors, f"rank{rank}")
    shared = encode(dict(state or {}), tensors if rank == 0 else {}, "all")
    items: list[tuple[str, torch.Tensor]] = []
    index: Index = []
    for piece in to_write(pieces, rank):
        e = piece.block
        key = f"{piece.kind}/{piece.name}/{e.start}"
        if piece.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{piece.name} ({piece.kind}) is of {piece.dtype}, which safetensors does not have")
        items.append((key, piece.tensor if host is None else host.copy(key, piece.tensor)))
        index.append((key, piece.kind, piece.name, piece.shape, _DTYPE_NAMES[piece.dtype], e))
    return Snapshot([*items, *tensors.items()], index, own), shared


def commit(root: Path, ranks: Ranks, snapshot: Snapshot, contents: Contents) -> Path:
    """Write and commit a checkpoint; return its folder. A collective of `ranks`.

    Raises:
        CheckpointError: on every rank if one rank failed. Then the temporary folder is removed, and older checkpoints
            have not changed.
    """
    rank = ranks.rank
    final = root / (contents.name or folder.checkpoint_name(contents.step))
    temporary: Path | None = None
    try:
        temporary = ranks.first(lambda: _make(root, contents.step))
        target = temporary
        written = ranks.gather(ranks.everywhere(lambda: _write_own(target, rank, snapshot)))
        ranks.first(lambda: _finish(target, final, written, contents, ranks.size))
    except BaseException as error:
        if temporary is not None and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raised = CheckpointError(f"{final} could not be saved: {error}")
            raised.reported_elsewhere = error.reported_elsewhere
            raise raised from error
        raise
    enter("committed", final, rank)
    return final


def _make(root: Path, step: int) -> Path:
    temporary = root / folder.temporary_name(step)
    enter("make", temporary, 0)
    root.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    return temporary


def _write_own(target: Path, rank: int, snapshot: Snapshot) -> tuple[dict[str, FileRecord], Index]:
    tensors, state = rank_file(rank, "safetensors"), rank_file(rank, "json")
    if not target.is_dir():
        raise CheckpointError(
            f"{target} does not exist on this rank: all ranks need the same folder on a shared file system"
        )
    records = {
        tensors: files.write_tensors(target / tensors, snapshot.items, rank),
        state: files.write_state(target / state, snapshot.rank_state, rank),
    }
    enter("gather", target, rank)
    return records, snapshot.index


def _finish(
    target: Path,
    final: Path,
    written: Sequence[tuple[dict[str, FileRecord], Index]],
    contents: Contents,
    world_size: int,
) -> None:
    """Write the other files and the manifest on the first rank, and rename the folder."""
    records: dict[str, FileRecord] = {}
    tensors: dict[tuple[str, str], Tensor] = {}
    for rank, (own, index) in enumerate(written):
        records.update(own)
        for name, record in own.items():
            files.check_size(target / name, record)  # check that this rank sees the files of all ranks
        for key, kind, name, shape, dtype, block in index:
            tensor = tensors.setdefault((kind, name), Tensor(shape, dtype))
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise CheckpointError(
                    f"{name} ({kind}) is {tensor.dtype} {tensor.shape} on one rank and {dtype} {shape} on rank {rank}"
                )
            tensor.parts.append(Stored(rank_file(rank, "safetensors"), key, kind, name, block))
    for (kind, name), tensor in tensors.items():
        held = sum(part.block.numel for part in tensor.parts)
        if held != tensor.numel:
            raise CheckpointError(f"the ranks hold only {held} of the {tensor.numel} elements of {name} ({kind})")
    for name, data in contents.documents.items():
        (target / name).parent.mkdir(exist_ok=True)
        records[name] = files.write_bytes(target / name, data, 0)
    for inner in sorted({(target / name).parent for name in records} - {target}):
        files.sync_folder(inner, 0)
    manifest = Manifest(
        step=contents.step,
        world_size=world_size,
        layout=contents.layout,
        tensors=tensors,
        files=records,
        info=dict(contents.info),
        state=dict(contents.state),
    )
    enter("manifest", target, 0)
    write_manifest(target, manifest, 0)
    files.sync_folder(target, 0)
    folder.publish(target, final)
