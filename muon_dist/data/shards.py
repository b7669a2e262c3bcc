"""Token shards on disk, and the records that describe them.

A prepared folder::

    manifest.json                          inputs, totals, SHA-256 of every index; its own digest
    00-stdlib/train/index.json             shards, token and byte counts, vocabulary, SHA-256 whole and by block
    00-stdlib/train/00000.bin ...          token ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    00-stdlib/train/documents.bin          little-endian int64 (documents, 2): end in tokens, end in UTF-8 bytes
    00-stdlib/validation/...

The shards of a split are one stream; documents follow each other, each closed by the end-of-sequence token, and may
run on from one shard into the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from muon_dist.data.files import BLOCK_BYTES, read_json, sha256_file, sha256_json
from muon_dist.errors import DataError
from muon_dist.json_files import write_json

VERSION = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.bin"
SPLITS = ("train", "validation")


def token_dtype(vocab_size: int) -> str:
    """uint16 if it holds every id, else uint32."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


@dataclass(frozen=True)
class ShardRecord:
    """One ``.bin`` file. ``blocks`` are the SHA-256 of its successive BLOCK_BYTES; they locate damage."""

    file: str
    tokens: int
    max_token_id: int
    sha256: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class SplitIndex:
    """The contents of ``index.json`` for one split of one source."""

    version: int
    dtype: str
    vocab_size: int
    eos_id: int
    tokens: int
    documents: int
    bytes: int
    documents_sha256: str
    shards: tuple[ShardRecord, ...]

    def to_json(self) -> dict[str, Any]:
        """The index as JSON."""
        return asdict(self)

    @classmethod
    def load(cls, folder: Path) -> SplitIndex:
        """Read ``folder/index.json``; DataError names the file when it is missing, damaged or of another version."""
        path = folder / INDEX_FILE
        value = read_json(path)
        try:
            shards = tuple(ShardRecord(**{**s, "blocks": tuple(s["blocks"])}) for s in value.pop("shards"))
            index = cls(shards=shards, **value)
        except (KeyError, TypeError):
            raise DataError(f"{path}: damaged, not a shard index.") from None
        if index.version != VERSION:
            raise DataError(f"{path}: version {index.version}, this program reads version {VERSION}.")
        return index


@dataclass(frozen=True)
class SplitTotals:
    """Totals of a split. ``bytes`` are those of the documents' UTF-8 text; ``tokens`` count the end-of-sequence
    tokens."""

    tokens: int
    documents: int
    bytes: int
    index_sha256: str


@dataclass(frozen=True)
class PreparedSource:
    """One source's shard set: its folder in the prepared folder, its inputs, its splits."""

    folder: str
    record: dict[str, Any]
    content_sha256: str
    splits: dict[str, SplitTotals]


@dataclass(frozen=True)
class Manifest:
    """The contents of a prepared folder, and its inputs."""

    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    settings: dict[str, Any]
    sources: tuple[PreparedSource, ...]
    bos_ids: tuple[int, ...] = ()
    """Token ids with which each document begins."""

    def totals(self, split: str) -> tuple[int, int]:
        """(tokens, UTF-8 bytes) of a split over all sources."""
        chosen = [source.splits[split] for source in self.sources]
        return sum(one.tokens for one in chosen), sum(one.bytes for one in chosen)

    def bytes_per_token(self, split: str = "validation") -> float:
        """UTF-8 bytes per token of a split, exactly counted, to convert a loss to bits per byte:
        ``mean loss per token / ln 2 / bytes_per_token``. End-of-sequence tokens count as tokens of no bytes.
        DataError when the split is empty."""
        tokens, size = self.totals(split)
        if tokens == 0:
            raise DataError(f"The {split} split is empty, so bits per byte are not defined; set validation_fraction.")
        return size / tokens

    def write(self, folder: Path) -> None:
        """Write ``folder/manifest.json`` with a digest of itself."""
        value = {"version": VERSION, **asdict(self)}
        write_json(folder / MANIFEST_FILE, {**value, "digest": sha256_json(value)})

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read ``folder/manifest.json``; DataError when it is missing, damaged or of another version."""
        path = Path(folder) / MANIFEST_FILE
        value = read_json(path)
        if value.pop("digest", None) != sha256_json(value):
            raise DataError(f"{path}: damaged, its digest does not match its content. Prepare the data again.")
        if value.pop("version") != VERSION:
            raise DataError(f"{path}: written by another version of this program. Prepare the data again.")
        sources = tuple(
            PreparedSource(**{**s, "splits": {name: SplitTotals(**totals) for name, totals in s["splits"].items()}})
            for s in value.pop("sources")
        )
        return cls(sources=sources, bos_ids=tuple(value.pop("bos_ids", ())), **value)

    def find(self, folder: str | Path, split: str, source: str | None) -> tuple[Path, SplitIndex]:
        """The folder and index of one source's split. ``source`` may be left out when there is only one.
        Raises DataError for an unknown name, and for an index whose hash differs from the manifest's."""
        names = [one.folder for one in self.sources]
        if split not in SPLITS:
            raise DataError(f"split: {split!r} is not one of {', '.join(SPLITS)}.")
        if source is None and len(names) > 1:
            raise DataError(f"{folder}: name one of its sources: {', '.join(names)}.")
        if source is not None and source not in names:
            raise DataError(f"{folder}: there is no source {source!r}; there is: {', '.join(names)}.")
        chosen = self.sources[0 if source is None else names.index(source)]
        place = Path(folder) / chosen.folder / split
        if not (place / INDEX_FILE).is_file():
            raise DataError(f"{place / INDEX_FILE}: no such file.")
        if sha256_file(place / INDEX_FILE) != chosen.splits[split].index_sha256:
            raise DataError(f"{place / INDEX_FILE}: damaged, its SHA-256 is not the one in {MANIFEST_FILE}.")
        return place, SplitIndex.load(place)


class SplitWriter:
    """Writes the shards of one split as documents arrive; holds at most one block of tokens in memory."""

    def __init__(self, folder: Path, vocab_size: int, eos_id: int, shard_tokens: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.dtype = token_dtype(vocab_size)
        self.vocab_size, self.eos_id, self.shard_tokens = vocab_size, eos_id, shard_tokens
        self.tokens = self.documents = self.bytes = 0
        self._shards: list[ShardRecord] = []
        self._shard: _ShardFile | None = None
        self._ends = (folder / DOCUMENTS_FILE).open("wb")

    def add(self, ids: npt.NDArray[np.integer[Any]], text_bytes: int) -> None:
        """Append a document: ids (tokens,) with the end-of-sequence token, and the size of its text in bytes."""
        self.tokens += len(ids)
        self.documents += 1
        self.bytes += text_bytes
        self._ends.write(np.array([self.tokens, self.bytes], dtype="<i8").tobytes())
        while len(ids):
            if self._shard is None:
                self._shard = _ShardFile(self.folder / f"{len(self._shards):05d}.bin", self.dtype)
            room = self.shard_tokens - self._shard.tokens
            self._shard.write(ids[:room])
            ids = ids[room:]
            if self._shard.tokens == self.shard_tokens:
                self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shards.append(self._shard.close())
            self._shard = None

    def finish(self) -> SplitTotals:
        """Close the files and write the index."""
        self._end_shard()
        self._ends.close()
        index = SplitIndex(
            version=VERSION,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            tokens=self.tokens,
            documents=self.documents,
            bytes=self.bytes,
            documents_sha256=sha256_file(self.folder / DOCUMENTS_FILE),
            shards=tuple(self._shards),
        )
        write_json(self.folder / INDEX_FILE, index.to_json())
        return SplitTotals(self.tokens, self.documents, self.bytes, sha256_file(self.folder / INDEX_FILE))


class _ShardFile:
    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self.tokens, self.max_token_id = path, dtype, 0, -1
        self._stream = path.open("wb")
        self._pending = bytearray()
        self._whole = hashlib.sha256()
        self._blocks: list[str] = []

    def write(self, ids: npt.NDArray[np.integer[Any]]) -> None:
        self.tokens += len(ids)
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        self._pending += ids.astype(self.dtype).tobytes()
        while len(self._pending) >= BLOCK_BYTES:
            self._block(BLOCK_BYTES)

    def _block(self, size: int) -> None:
        block = bytes(self._pending[:size])
        del self._pending[:size]
        self._stream.write(block)
        self._whole.update(block)
        self._blocks.append(hashlib.sha256(block).hexdigest())

    def close(self) -> ShardRecord:
        if self._pending:
            self._block(len(self._pending))
        self._stream.close()
        return ShardRecord(
            self.path.name, self.tokens, self.max_token_id, self._whole.hexdigest(), tuple(self._blocks)
        )


def damages(folder: Path, index: SplitIndex, hashes: bool) -> Iterator[str]:
    """Damage of a split's files, with file and byte offset. Sizes are checked always, SHA-256 if ``hashes``."""
    width = np.dtype(index.dtype).itemsize
    for shard in index.shards:
        path = folder / shard.file
        size, expected = path.stat().st_size if path.is_file() else -1, shard.tokens * width
        if size < 0:
            yield f"{path}: the shard is missing."
        elif size != expected:
            yield f"{path}: damaged from byte offset {min(size, expected)}: {size} bytes instead of {expected}."
        elif hashes:
            with path.open("rb") as stream:
                for number, digest in enumerate(shard.blocks):
                    block = stream.read(BLOCK_BYTES)
                    if hashlib.sha256(block).hexdigest() != digest:
                        start = number * BLOCK_BYTES
                        yield f"{path}: damaged between byte offsets {start} and {start + len(block) - 1} (SHA-256)."
    path = folder / DOCUMENTS_FILE
    if not path.is_file() or path.stat().st_size != 16 * index.documents:
        yield f"{path}: missing or not {16 * index.documents} bytes long."
    elif hashes and sha256_file(path) != index.documents_sha256:
        yield f"{path}: damaged (SHA-256)."


def check_folder(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """DataError with the first damage of a prepared folder."""
    for source in manifest.sources:
        for split in SPLITS:
            for damage in damages(*manifest.find(folder, split, source.folder), hashes):
                raise DataError(damage)
