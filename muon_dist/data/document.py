"""The unit of a corpus, and how a record becomes a document."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from muon_dist.errors import DataError


class Document(NamedTuple):
    """A document and its origin (for messages).

    ``data`` is its text as UTF-8 bytes; with ``tokens`` it is token ids, little-endian int32, without the
    end-of-sequence token.
    """

    data: bytes
    origin: str
    tokens: bool = False

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """The token ids of a document of tokens, (tokens,)."""
        return np.frombuffer(self.data, dtype="<i4")


class SourceGoneError(DataError):
    """A source does not exist or cannot be reached. If its tokens were prepared before, they can still be used."""


# A reader yields documents; for a bad record it yields the error, and can continue after it.
Item = Document | DataError


@functools.lru_cache(maxsize=1024)
def say(text: str) -> None:
    """One line on standard error, once per process, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def utf8(text: object, origin: str, field: str) -> bytes:
    """The UTF-8 bytes of a field. Raises DataError if it is not text."""
    if isinstance(text, bytes):  # some writers of parquet store text as bytes
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{origin}: field {field!r} is not UTF-8 (byte 0x{text[error.start]:02x}).") from None
        return text
    if not isinstance(text, str):
        raise DataError(f"{origin}: field {field!r} is {type(text).__name__}, not text.")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which no UTF-8 text can hold
        raise DataError(
            f"{origin}: field {field!r} is not Unicode text (a lone surrogate at character {error.start})."
        ) from None


def row_document(record: Any, field: str, origin: str) -> Item:
    """The document under ``field`` of a record, or the error that says what is wrong with the record.

    ``field`` may lead into mappings and lists: ``a.b``, ``messages.0.content``. A field with dots in its own name is
    tried first.
    """
    try:
        return Document(utf8(_pick(record, field, origin), origin, field), origin)
    except DataError as error:
        return error


def _pick(record: Any, field: str, origin: str) -> Any:
    if isinstance(record, DataError):  # a reader yields this instead of an ambiguous object
        raise DataError(f"{origin}: {record}")
    if not isinstance(record, dict):
        raise DataError(f"{origin}: a JSON object is needed, this is {type(record).__name__}.")
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, (list, tuple)) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, DataError):
            raise DataError(f"{origin}: {value}")
        else:
            raise missing_field(origin, field, record)
    return value


def missing_field(origin: str, field: str, names: Any, kind: str = "field") -> DataError:
    """The error of a record or table without ``field``; ``names`` are its fields."""
    there = ", ".join(map(repr, names)) or "nothing"
    return DataError(f"{origin}: {kind} {field!r} is missing; there is: {there}. Set text_field.")
