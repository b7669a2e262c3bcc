"""Sources of text: their documents, and the records by which a later run detects changes.

The document is the unit throughout: the train/validation split, the end-of-sequence token and the sizes by which bits
per byte are computed all follow documents. A document is UTF-8 bytes, non-empty, kept exactly as found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from muon_dist.data.document import Document, SourceGoneError, say
from muon_dist.data.formats import NAMES
from muon_dist.data.origins import origin
from muon_dist.data.source import Source
from muon_dist.errors import DataError

FORMATS = NAMES
# Settings of a source that decide, with the content, which documents it gives.
_DESCRIPTION = (
    *("builtin", "dataset", "format", "text_field", "config", "split", "revision", "max_documents", "document_bytes"),
    *("separator", "on_bad_record"),
)


__all__ = ["FORMATS", "Document", "Source", "documents", "same_source", "size_hint", "source_record"]


def documents(source: Source) -> Iterator[Document]:
    """The documents of a source in their fixed order, empty ones left out.

    Raises DataError, naming file and byte offset (or line, or row), on data that is not UTF-8 or not as described.
    """
    kept = (document for document in _good(source) if document.tokens or document.data.strip())
    return itertools.islice(kept, source.max_documents)


def _good(source: Source) -> Iterator[Document]:
    """The documents. ``on_bad_record`` says whether a bad record ends the iteration or is skipped and counted."""
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
                "data.max_bad_records if so many are expected."
            )
        if bad == 1:
            say(f"{source.label}: a bad record is skipped: {item}")
    if bad:
        say(f"{source.label}: {bad} bad record{'s' if bad > 1 else ''} skipped")


def size_hint(source: Source) -> int | None:
    """Bytes of the source (an upper bound of its text), or None if unknown."""
    return None if source.max_documents is not None else origin(source).size()


def source_record(source: Source, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A source's record in the manifest: its description, and data to detect a change of its content.

    ``known`` is the record of an earlier run: a file of unchanged size and times is not read again (as git does), and
    if the source no longer exists but has the same description, ``known`` is used.
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
        say(f"{error} The tokens that were prepared from it before are used.")
        return dict(known)


def same_source(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two records of ``source_record`` describe the same bytes, read in the same way; paths do not matter."""

    def plain(record: Mapping[str, Any]) -> Any:
        files = [(entry["path"], entry["size"], entry["sha256"]) for entry in record.get("files", [])]
        return record.get("description"), files, record.get("commit")

    return bool(plain(first) == plain(second))
