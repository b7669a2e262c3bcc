"""Sources of text: what a corpus is, which documents it holds, and how it is recognised again.

The document is the unit throughout: the train/validation split, the end-of-sequence token and the sizes by which bits
per byte are computed all follow documents. A document is UTF-8 bytes, non-empty, kept exactly as found.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.data import readers
from muon_dist.data.files import file_record
from muon_dist.data.readers import Document
from muon_dist.errors import DataError

FORMATS = ("auto", "text", "jsonl", "parquet")
BUILTINS = ("stdlib",)
_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}


@dataclass(frozen=True)
class Source:
    """One source of documents; exactly one of ``builtin``, ``path`` and ``dataset`` is set.

    ``path`` is a file or a folder (walked in sorted order, hidden names left out). Text files longer than about
    ``document_bytes`` are cut into documents at blank lines. ``dataset`` is whatever ``datasets.load_dataset`` takes
    (``config``, ``split``, ``revision``, ``streaming`` are passed on). ``max_documents`` ends any source early.
    ``weight`` plays a part only in the tokenizer's sample and in sampling, never in the shards.

    Raises DataError on a source that is contradictory or unknown.
    """

    builtin: str | None = None
    path: str | Path | None = None
    dataset: str | None = None
    format: str = "auto"
    text_field: str = "text"
    config: str | None = None
    split: str = "train"
    streaming: bool = True
    revision: str | None = None
    max_documents: int | None = None
    weight: float = 1.0
    document_bytes: int = 16384

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.builtin, self.path, self.dataset)) != 1:
            raise DataError("A data source needs exactly one of builtin, path and dataset.")
        if self.builtin is not None and self.builtin not in BUILTINS:
            raise DataError(f"builtin: {self.builtin!r} is not a built-in corpus; there is: {', '.join(BUILTINS)}.")
        if self.format not in FORMATS:
            raise DataError(f"format: {self.format!r} is not one of {', '.join(FORMATS)}.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight: {self.weight} of source {self.label} is not a positive number.")
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(f"max_documents: {self.max_documents} of source {self.label} is less than 1.")
        if self.document_bytes < 64:
            raise DataError(f"document_bytes: {self.document_bytes} of source {self.label} is less than 64.")

    @property
    def label(self) -> str:
        """The name by which messages call this source."""
        return str(self.builtin or self.path or self.dataset)

    def folder(self, position: int) -> str:
        """Name of this source's shard folder, unique through its position in the mixture."""
        stem = Path(self.label).name if self.path is not None else self.label
        return f"{position:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('-.') or 'source'}"


def documents(source: Source) -> Iterator[Document]:
    """The documents of a source in their fixed order, empty ones left out.

    Raises DataError, naming file and byte offset (or line, or row), on data that is not UTF-8 or not as described.
    """
    kept = (document for document in _read(source) if document.data.strip())
    return itertools.islice(kept, source.max_documents)


def _read(source: Source) -> Iterator[Document]:
    if source.builtin is not None:
        yield from readers.read_stdlib()
    elif source.dataset is not None:
        yield from readers.read_dataset(
            source.dataset, source.config, source.split, source.streaming, source.revision, source.text_field
        )
    else:
        for file in source_files(source):
            yield from _reader(source, file)(file)


def _reader(source: Source, file: Path) -> Callable[[Path], Iterator[Document]]:
    kind = _SUFFIXES.get(file.suffix.lower(), "text") if source.format == "auto" else source.format
    if kind == "jsonl":
        return lambda path: readers.read_jsonl(path, source.text_field)
    if kind == "parquet":
        return lambda path: readers.read_parquet(path, source.text_field)
    return lambda path: readers.read_text(path, source.document_bytes)


def source_files(source: Source) -> list[Path]:
    """The files of a path or built-in source, sorted; empty for a ``datasets`` name.

    A link inside a folder may point only to a place inside that folder: a corpus is what its folder holds.
    Linked folders are not walked (they may be circles). Raises DataError on a missing path, an empty file or folder,
    and a link that is broken or leads out.
    """
    if source.builtin is not None:
        return readers.stdlib_files()
    if source.path is None:
        return []
    root = Path(source.path)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder (a data source's path).")
    if root.is_file():
        if root.stat().st_size == 0:
            raise DataError(f"{root}: the file is empty (0 bytes at byte offset 0).")
        return [root]
    if not root.is_dir():
        raise DataError(f"{root}: neither a file nor a folder (a device, pipe or socket): name a file or a folder.")
    found = sorted(_walk(root, root.resolve()), key=lambda path: path.relative_to(root).as_posix())
    if not any(path.stat().st_size for path in found):
        raise DataError(f"{root}: the folder holds no non-empty file.")
    return found


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            if not entry.exists():
                raise DataError(f"{entry}: the link is broken.")
            if not entry.resolve().is_relative_to(root):
                raise DataError(f"{entry}: the link leads out of the corpus folder; name its target as a source.")
            if entry.is_dir():
                continue
        if entry.is_dir():
            yield from _walk(entry, root)
        elif entry.is_file():
            yield entry


def size_hint(source: Source) -> int | None:
    """Bytes of the source's files (an upper bound of its text for JSONL), or None where that cannot be known."""
    if source.dataset is not None or source.max_documents is not None:
        return None
    if source.builtin is not None:
        return sum(len(document.data) for document in readers.read_stdlib())
    return sum(file.stat().st_size for file in source_files(source))


def source_record(source: Source, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a manifest keeps to recognise the source: its description and, of files, size and SHA-256.

    ``known`` is the record of an earlier run: a file of unchanged size and modification time is not read again (as
    git does). A ``datasets`` name has no files here; its revision is what was asked for.
    """
    record: dict[str, Any] = {"label": source.label, "max_documents": source.max_documents}
    if source.dataset is not None:
        return record | {
            key: getattr(source, key) for key in ("config", "split", "revision", "streaming", "text_field")
        }
    files = source_files(source)
    if source.path is None:
        root = readers.stdlib_root()
    else:
        record |= {key: getattr(source, key) for key in ("format", "text_field", "document_bytes")}
        root = Path(source.path) if Path(source.path).is_dir() else Path(source.path).parent
    earlier = {entry["path"]: entry for entry in (known or {}).get("files", [])}
    names = [file.relative_to(root).as_posix() for file in files]
    return record | {"files": [file_record(f, name, earlier.get(name)) for f, name in zip(files, names, strict=True)]}


def same_source(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two records of ``source_record`` stand for the same bytes (modification times do not count)."""

    def plain(record: Mapping[str, Any]) -> dict[str, Any]:
        files = [{k: v for k, v in entry.items() if k != "mtime_ns"} for entry in record.get("files", [])]
        return dict(record) | {"files": files}

    return plain(first) == plain(second)
