"""Sources of text: what a corpus is, which documents it holds, and how it is recognised again.

The document is the unit throughout: the train/validation split, the end-of-sequence token and the sizes by which bits
per byte are computed all follow documents. A document is UTF-8 bytes, non-empty, kept exactly as found.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muon_dist.data import formats
from muon_dist.data.document import Document, SourceGoneError, say
from muon_dist.data.origins import origin
from muon_dist.errors import DataError

FORMATS = formats.NAMES
BUILTINS = ("stdlib",)
# Of a source, what decides which documents come out, beside the content itself.
_DESCRIPTION = (
    *("builtin", "dataset", "format", "text_field", "config", "split", "revision", "max_documents", "document_bytes"),
    *("separator", "on_bad_record"),
)


@dataclass(frozen=True)
class Source:
    """One source of documents; exactly one of ``builtin``, ``path`` and ``dataset`` is set.

    ``path`` is a file, a folder (walked in sorted order, hidden names left out), a glob, a URL that fsspec opens, or
    several of these. ``text_field`` may lead into records: ``a.b``. Text files longer than about ``document_bytes``
    are cut into documents at blank lines, or at each ``separator``. ``dataset`` is what ``datasets.load_dataset``
    takes (``config``, ``split``, ``revision``, ``streaming`` are passed on). ``max_documents`` ends any source early.
    ``on_bad_record``: stop at a record that cannot be read, or skip it, at most ``max_bad_records`` of them.
    ``weight`` plays a part only in the tokenizer's sample and in sampling, never in the shards.

    Raises DataError on a source that is contradictory or unknown.
    """

    builtin: str | None = None
    path: str | Path | Sequence[str | Path] | None = None
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
    separator: str | None = None
    on_bad_record: str = "stop"
    max_bad_records: int = 1000

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.builtin, self.path, self.dataset)) != 1:
            raise DataError("A data source needs exactly one of builtin, path and dataset.")
        if self.builtin is not None and self.builtin not in BUILTINS:
            raise DataError(f"builtin: {self.builtin!r} is not a built-in corpus; there is: {', '.join(BUILTINS)}.")
        if self.path is not None and not self.paths:
            raise DataError("path: an empty list names no file.")
        if self.format not in FORMATS:
            raise DataError(f"format: {self.format!r} is not one of {', '.join(FORMATS)}.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise DataError(f"weight: {self.weight} of source {self.label} is not a positive number.")
        if self.max_documents is not None and self.max_documents < 1:
            raise DataError(f"max_documents: {self.max_documents} of source {self.label} is less than 1.")
        if self.document_bytes < 64:
            raise DataError(f"document_bytes: {self.document_bytes} of source {self.label} is less than 64.")
        if self.separator == "":
            raise DataError(f"separator: of source {self.label} is empty; leave it out to cut at blank lines.")
        if self.on_bad_record not in ("stop", "skip"):
            raise DataError(f"on_bad_record: {self.on_bad_record!r} is not one of stop, skip.")

    @property
    def paths(self) -> tuple[str | Path, ...]:
        """The paths as a tuple; empty for a source without."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, (str, Path)) else tuple(self.path)

    @property
    def label(self) -> str:
        """The name by which messages call this source."""
        if self.paths:
            more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
            return f"{self.paths[0]}{more}"
        return str(self.builtin or self.dataset)

    def folder(self, position: int) -> str:
        """Name of this source's shard folder, unique through its position in the mixture."""
        stem = Path(self.paths[0]).name if self.paths else self.label
        return f"{position:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('-.') or 'source'}"


def documents(source: Source) -> Iterator[Document]:
    """The documents of a source in their fixed order, empty ones left out.

    Raises DataError, naming file and byte offset (or line, or row), on data that is not UTF-8 or not as described.
    """
    kept = (document for document in _good(source) if document.tokens or document.data.strip())
    return itertools.islice(kept, source.max_documents)


def _good(source: Source) -> Iterator[Document]:
    """The documents without bad records, which end it or are counted, as ``on_bad_record`` says."""
    bad = 0
    for item in origin(source).items():
        if not isinstance(item, DataError):
            yield item
            continue
        if source.on_bad_record == "stop":
            raise item
        bad += 1
        if bad > source.max_bad_records:
            raise DataError(
                f"{source.label}: more than {source.max_bad_records} bad records, the last one: {item} Raise "
                "data.max_bad_records if that is as it should be."
            )
        if bad == 1:
            say(f"{source.label}: a bad record is skipped: {item}")
    if bad:
        say(f"{source.label}: {bad} bad record{'s' if bad > 1 else ''} skipped")


def size_hint(source: Source) -> int | None:
    """Bytes of the source (an upper bound of its text), or None where that cannot be known."""
    return None if source.max_documents is not None else origin(source).size()


def source_record(source: Source, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a manifest keeps to recognise the source: its description, and by what a change of its content is noticed.

    ``known`` is the record of an earlier run: a file of unchanged size and times is not read again (as git does), and
    where the source is not there any more, but described as it was, ``known`` stands.
    """
    about = {
        "label": source.label,
        "description": {name: getattr(source, name) for name in _DESCRIPTION},
        "names": [Path(path).name for path in source.paths],
    }
    try:
        return about | origin(source).state(known or {})
    except SourceGoneError as error:
        if known is None or any(known.get(key) != about[key] for key in ("description", "names")):
            raise
        say(f"{error} The tokens that were prepared from it are used.")
        return dict(known)


def same_source(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two records of ``source_record`` stand for the same bytes, read in the same way, wherever they lie."""

    def plain(record: Mapping[str, Any]) -> Any:
        files = [(entry["path"], entry["size"], entry["sha256"]) for entry in record.get("files", [])]
        return record.get("description"), files, record.get("commit")

    return bool(plain(first) == plain(second))
