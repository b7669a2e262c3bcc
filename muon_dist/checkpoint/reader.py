"""Loading: every byte is verified before use, and each rank reads only its own part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from muon_dist.checkpoint import files, folder
from muon_dist.checkpoint.manifest import Manifest, Stored, Tensor, rank_file, read_manifest
from muon_dist.checkpoint.phases import enter
from muon_dist.checkpoint.piece import BUFFER, OPTIONAL, WEIGHT, Holding, Piece
from muon_dist.checkpoint.ranks import Ranks
from muon_dist.checkpoint.state import decode
from muon_dist.errors import CheckpointError
from muon_dist.layout.block import Block

_READ = 16 * 2**20
"""Number of elements that are read at a time."""


class Checkpoint:
    """A committed checkpoint.

    `open_checkpoint` makes it and verifies every byte. `Checkpoint.look` makes it and reads only the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._open: dict[str, Any] = {}

    @classmethod
    def look(cls, path: str | Path) -> Checkpoint:
        """A checkpoint from its manifest; checks only that all files exist and have the recorded sizes."""
        manifest = read_manifest(Path(path))
        for name, record in manifest.files.items():
            if (Path(path) / name).parent.is_symlink():
                raise CheckpointError(f"{(Path(path) / name).parent} is a link: it is not followed")
            files.check_size(Path(path) / name, record)
        return cls(Path(path), manifest)

    def verify(self, only: Sequence[str] | None = None) -> None:
        """Check the hashes of the files `only`, or of all. Raises CheckpointError that names a damaged file."""
        for name in self.manifest.files if only is None else only:
            files.check_bytes(self.path / name, self.manifest.files[name])

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def weights_only(self) -> bool:
        """Whether it has no optimizer state: it was made by `convert`, or with `save_only_model`."""
        return not set(self.manifest.kinds()) - {WEIGHT, BUFFER}

    @property
    def beginning(self) -> bool:
        """Whether a run starts from it at step 0, because it has no position in the data."""
        return self.weights_only or "position" not in self.manifest.info

    def state(self) -> dict[str, Any]:
        """The named small states that are equal on all ranks."""
        return dict(decode(self.manifest.state, _Tensors(self, rank_file(0, "safetensors"))))

    def rank_state(self, rank: int) -> dict[str, Any] | None:
        """The small state of one rank of the saving run; None if that run did not have this rank."""
        name = rank_file(rank, "json")
        if name not in self.manifest.files:
            return None
        text = (self.path / name).read_text(encoding="utf-8")
        return dict(decode(json.loads(text), _Tensors(self, rank_file(rank, "safetensors"))))

    @cached_property
    def states(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer state of each parameter: name -> kind -> tensor."""
        found: dict[str, dict[str, Tensor]] = {}
        for (kind, name), tensor in self.manifest.tensors.items():
            if kind not in (WEIGHT, BUFFER):
                found.setdefault(name, {})[kind] = tensor
        return found

    # ---- tensors

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raise CheckpointError if a piece cannot be filled. Reads and changes nothing."""
        for piece in pieces:
            tensor = self.manifest.tensors.get((piece.kind, piece.name))
            if tensor is None:
                if piece.kind in OPTIONAL:
                    continue
                if piece.kind in (WEIGHT, BUFFER) or (WEIGHT, piece.name) not in self.manifest.tensors:
                    raise CheckpointError(f"{self.path} does not hold {piece.name}: it belongs to another model")
                if piece.name in self.states:
                    raise CheckpointError(
                        f"{self.path} holds {', '.join(sorted(self.states[piece.name]))} of {piece.name} and no "
                        f"{piece.kind}: it was trained by another algorithm or rule; use that one, or start a new run"
                    )
                continue
            if tensor.shape != piece.shape:
                raise CheckpointError(
                    f"{piece.name} ({piece.kind}) has shape {tensor.shape} in {self.path}, but {piece.shape} in this "
                    "model: resume with the model settings of the saved run"
                )
            found = sum(p.numel for part in tensor.parts for p in piece.block.common(part.block))
            if found != piece.block.numel:
                raise CheckpointError(
                    f"{self.path} holds only {found} of {piece.block.numel} elements of {piece.name} ({piece.kind})"
                )

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy into `pieces`. State missing from the checkpoint is set to zero, its value when it was saved.

        Needs little extra host memory, because it reads a limited number of elements at a time.
        """
        for piece in pieces:
            tensor = self.manifest.tensors.get((piece.kind, piece.name))
            if tensor is None:
                piece.tensor.zero_()
                continue
            for stored in tensor.parts:
                for part in piece.block.common(stored.block):
                    for block, values in self._read(stored, part):
                        target = piece.part(block)
                        target.copy_(values.view(target.shape))

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """One whole logical tensor, in its saved dtype."""
        found = self.manifest.tensors[kind, name]
        whole = torch.empty(found.shape, dtype=files.DTYPES[found.dtype])
        if found.numel:
            self.fill([Piece(name, kind, found.shape, Block.run(0, found.numel), whole.view(-1))])
        return whole

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._open.clear()

    def _slice(self, file: str, key: str) -> Any:
        try:
            if file not in self._open:
                if len(self._open) >= 8:
                    self._open.clear()
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_slice(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path / file} has no tensor {key}: {error}") from error

    def _read(self, stored: Stored, part: Block) -> Iterator[tuple[Block, torch.Tensor]]:
        """`part` of a stored block in small parts: (block of elements, their values)."""
        source = self._slice(stored.file, stored.key)
        held = stored.block
        expected = [held.cols] if held.rows == 1 else [held.rows, held.cols]
        if source.get_shape() != expected:
            raise CheckpointError(f"{self.path / stored.file}: {stored.key} has shape {source.get_shape()}")
        row, column = held.place(part)
        width = part.cols if held.rows > 1 or part.rows == 1 else part.stride
        step = max(1, _READ // width)
        for first in range(0, part.rows, step):
            rows = min(step, part.rows - first)
            block = Block.of(part.start + first * part.stride, rows, part.cols, part.stride)
            if held.rows > 1:
                yield block, source[row + first : row + first + rows, column : column + part.cols]
            elif rows == 1:
                at = column + first * part.stride
                for start in range(0, part.cols, _READ):
                    n = min(_READ, part.cols - start)
                    yield Block.run(block.start + start, n), source[at + start : at + start + n]
            else:
                at = column + first * part.stride
                flat = source[at : at + (rows - 1) * part.stride + part.cols]
                yield block, flat.as_strided((rows, part.cols), (part.stride, 1))


class _Tensors(dict[str, torch.Tensor]):
    """The tensors of a rank's small state, read on first access."""

    def __init__(self, checkpoint: Checkpoint, file: str) -> None:
        super().__init__()
        self._checkpoint, self._file = checkpoint, file

    def __missing__(self, key: str) -> torch.Tensor:
        value: torch.Tensor = self._checkpoint._slice(self._file, key)[...]
        return value.clone()


def open_checkpoint(path: str | Path, ranks: Ranks | None = None) -> Checkpoint:
    """Open and verify a checkpoint; each rank reads a share of its bytes. A collective.

    Raises:
        CheckpointError: on every rank, if a byte is wrong or a file is missing; names the file.
    """
    ranks = ranks or Ranks()
    folder_path = Path(path)

    def verified() -> Checkpoint:
        checkpoint = Checkpoint.look(folder_path)
        shares: list[list[str]] = [[] for _ in range(ranks.size)]
        loads = [0] * ranks.size
        for name, record in sorted(checkpoint.manifest.files.items(), key=lambda item: (-item[1].size, item[0])):
            least = loads.index(min(loads))
            shares[least].append(name)
            loads[least] += record.size
        checkpoint.verify(shares[ranks.rank])
        return checkpoint

    kept: list[Checkpoint] = []
    ranks.everywhere(lambda: kept.append(verified()))
    return kept[0]


def newest_good(
    root: str | Path, ranks: Ranks | None = None, warn: Callable[[str], None] = print
) -> Checkpoint | None:
    """The newest undamaged checkpoint under `root`; None without any checkpoint. A collective.

    Warns of each newer checkpoint that is damaged.

    Raises:
        CheckpointError: all checkpoints are damaged; names the damage of the newest.
    """
    ranks = ranks or Ranks()
    first: CheckpointError | None = None
    for path in reversed(ranks.first(lambda: folder.commits(root))):
        try:
            return open_checkpoint(path, ranks)
        except CheckpointError as error:
            first = first or error
            if ranks.rank == 0:
                warn(f"{error}; trying the previous checkpoint")
    if first is not None:
        raise first
    return None


def load(checkpoint: Checkpoint, holding: Holding, ranks: Ranks | None = None) -> None:
    """Load this rank's part from a verified checkpoint of any layout and world size; a collective.

    Raises:
        CheckpointError: the checkpoint belongs to another model or lacks a part; raised on every rank, before a tensor
            changes.
    """
    ranks = ranks or Ranks()
    enter("load", checkpoint.path, ranks.rank)

    def fits() -> set[tuple[str, str]]:
        checkpoint.check(holding.pieces)
        return {(piece.kind, piece.name) for piece in holding.pieces}

    _check_nothing_is_left(checkpoint, set().union(*ranks.gather(ranks.everywhere(fits))))
    ranks.everywhere(lambda: checkpoint.fill(holding.pieces))
    holding.finish()


def _check_nothing_is_left(checkpoint: Checkpoint, held: set[tuple[str, str]]) -> None:
    """Raise CheckpointError if the checkpoint has a weight, or a kind of state, that no rank would load."""
    tensors = checkpoint.manifest.tensors
    unknown = {name for kind, name in tensors if kind == WEIGHT and (WEIGHT, name) not in held}
    if unknown:
        raise CheckpointError(f"{checkpoint.path} holds {min(unknown)}, which this model does not have")
    stepped = {name for kind, name in held if kind not in (WEIGHT, BUFFER)}
    left = [key for key in tensors if key[1] in stepped and key not in held and key[0] not in (WEIGHT, BUFFER)]
    if left:
        kind, name = min(left, key=lambda key: key[::-1])
        raise CheckpointError(
            f"{checkpoint.path} holds {kind} of {name}, which this run does not keep: it was trained by another "
            "algorithm or rule; use that one, or start a new run"
        )
