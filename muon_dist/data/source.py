"""A source of documents: the settings by which it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muon_dist.data.formats import NAMES
from muon_dist.defaults import DOCUMENT_BYTES, MAX_BAD_RECORDS, TEXT_FIELD
from muon_dist.errors import DataError

BUILTINS = ("stdlib",)


@dataclass(frozen=True)
class Source:
    """One source of documents; exactly one of ``builtin``, ``path`` and ``dataset`` is set.

    ``path`` is a file, a folder (walked in sorted order, hidden names left out), a glob, a URL that fsspec opens, or
    several of these. ``text_field`` may lead into records: ``a.b``. Text files longer than about ``document_bytes``
    are cut into documents at blank lines; with ``separator`` at each one. ``dataset`` is what
    ``datasets.load_dataset`` takes (``config``, ``split``, ``revision``, ``streaming`` are passed on).
    ``max_documents`` ends any source early. ``on_bad_record``: stop at a record that cannot be read, or skip it, at
    most ``max_bad_records`` of them. ``weight`` affects only the tokenizer's sample and the sampling, never the
    shards.

    Raises DataError if the settings contradict each other, or a name is unknown.
    """

    builtin: str | None = None
    path: str | Path | Sequence[str | Path] | None = None
    dataset: str | None = None
    format: str = "auto"
    text_field: str = TEXT_FIELD
    config: str | None = None
    split: str = "train"
    streaming: bool = True
    revision: str | None = None
    max_documents: int | None = None
    weight: float = 1.0
    document_bytes: int = DOCUMENT_BYTES
    separator: str | None = None
    on_bad_record: str = "stop"
    max_bad_records: int = MAX_BAD_RECORDS

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.builtin, self.path, self.dataset)) != 1:
            raise DataError("A data source needs exactly one of builtin, path and dataset.")
        if self.builtin is not None and self.builtin not in BUILTINS:
            raise DataError(f"builtin: {self.builtin!r} is not a built-in corpus; there is: {', '.join(BUILTINS)}.")
        if self.path is not None and not self.paths:
            raise DataError("path: an empty list names no file.")
        if self.format not in NAMES:
            raise DataError(f"format: {self.format!r} is not one of {', '.join(NAMES)}.")
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
        """The paths as a tuple; empty for a source without paths."""
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, (str, Path)) else tuple(self.path)

    @property
    def label(self) -> str:
        """The name of this source in messages."""
        if self.paths:
            more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
            return f"{self.paths[0]}{more}"
        return str(self.builtin or self.dataset)

    def folder(self, position: int) -> str:
        """Name of this source's shard folder, unique through its position in the mixture."""
        stem = Path(self.paths[0]).name if self.paths else self.label
        return f"{position:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', stem).strip('-.') or 'source'}"
