"""Formats of files: how a format is detected from the content, and how a file becomes documents.

A new format is one subclass of ``Format``, added to ``FORMATS``.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from muon_dist.data.document import Item, missing_field, row_document
from muon_dist.data.json_files import json_line, json_values
from muon_dist.data.storage import HEAD_BYTES, DataFile
from muon_dist.data.text import read_separated, read_text
from muon_dist.data.token_files import read_datatrove, read_megatron
from muon_dist.defaults import DOCUMENT_BYTES, TEXT_FIELD
from muon_dist.errors import DataError
from muon_dist.failures import one_line


@dataclass(frozen=True)
class Options:
    """The settings of a source that a reader needs; see ``Source``."""

    text_field: str = TEXT_FIELD
    document_bytes: int = DOCUMENT_BYTES
    separator: str | None = None


@dataclass(frozen=True)
class Head:
    """The beginning of a file, from which its format is detected."""

    file: DataFile
    data: bytes

    @cached_property
    def text(self) -> str:
        """The beginning as text; bytes that are not UTF-8 are replaced."""
        return codecs.getincrementaldecoder("utf-8-sig")("replace").decode(self.data)

    @property
    def whole(self) -> bool:
        """Whether this is the whole file."""
        return len(self.data) < HEAD_BYTES

    @cached_property
    def lines(self) -> list[str]:
        """The complete lines that are not empty."""
        lines = self.text.splitlines()
        return [line for line in (lines if self.whole else lines[:-1]) if line.strip()]


class Format(ABC):
    """A file format: how a file becomes documents.

    ``suffixes`` are file suffixes that mean this format if the content does not decide. ``records``: the file is a
    list of records, so plain text in the same folder is not data.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    records: ClassVar[bool] = True

    @abstractmethod
    def matches(self, head: Head, options: Options) -> bool:
        """Whether the content is of this format."""

    @abstractmethod
    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        """The documents of the file in order, with an error in place of each bad record."""


class Parquet(Format):
    """Parquet, one document per row; a column inside a struct by its dotted name."""

    name = "parquet"
    suffixes = (".parquet", ".pq")

    def matches(self, head: Head, options: Options) -> bool:
        return head.data.startswith(b"PAR1")

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        import pyarrow
        import pyarrow.parquet

        with file.open() as stream:
            try:
                table = pyarrow.parquet.ParquetFile(stream)
                column = _column(file, table.schema_arrow.names, options.text_field)
                row = 0
                for batch in table.iter_batches(batch_size=256, columns=[column]):
                    for record in batch.to_pylist():
                        yield row_document(record, options.text_field, f"{file.path} row {row}")
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file.path}: not a readable parquet file ({one_line(error)}).") from None


def _column(file: DataFile, names: list[str], field: str) -> str:
    """The name of the column with `field`. Raises DataError if there is none, or more than one."""
    column = field if field in names else field.split(".")[0]
    if column not in names:
        raise missing_field(file.path, field, names, "column")
    if names.count(column) > 1:
        raise DataError(f"{file.path}: has {names.count(column)} columns named {column!r}: rename all but one.")
    return column


class Arrow(Format):
    """Arrow streams and files, as ``datasets`` caches and saves them, one document per row."""

    name = "arrow"
    suffixes = (".arrow",)

    def matches(self, head: Head, options: Options) -> bool:
        return head.data.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff"))

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        import pyarrow

        with file.open() as stream:
            try:
                start = stream.read(6)
                stream.seek(0)
                if start == b"ARROW1":
                    reader = pyarrow.ipc.open_file(stream)
                    batches = (reader.get_batch(k) for k in range(reader.num_record_batches))
                else:
                    reader = batches = pyarrow.ipc.open_stream(stream)
                column = _column(file, reader.schema.names, options.text_field)
                row = 0
                for batch in batches:
                    for record in batch.select([column]).to_pylist():
                        yield row_document(record, options.text_field, f"{file.path} row {row}")
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                raise DataError(f"{file.path}: not a readable arrow file ({one_line(error)}).") from None


class Megatron(Format):
    """Megatron's ``.idx`` with its ``.bin``: tokens, one document per entry of the document index."""

    name = "megatron"
    suffixes = (".idx",)

    def matches(self, head: Head, options: Options) -> bool:
        return head.data.startswith(b"MMIDIDX\0\0")

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        return read_megatron(file)


class Datatrove(Format):
    """Token files of datatrove, which nanotron trains on: ``.ds`` with ``.ds.index``."""

    name = "datatrove"
    suffixes = (".ds",)

    def matches(self, head: Head, options: Options) -> bool:
        return head.file.suffix == ".ds" and head.file.sibling(".index").exists()

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        return read_datatrove(file)


class JsonLines(Format):
    """One JSON object per line."""

    name = "jsonl"
    suffixes = (".jsonl", ".ndjson", ".json")

    def matches(self, head: Head, options: Options) -> bool:
        if "\r" in head.text and "\n" not in head.text:
            return False  # lines end in \\r only: objects one after the other
        if head.lines and _is_object(head.lines[0]):
            return True
        if head.lines and head.file.suffix not in (".jsonl", ".ndjson"):
            return False
        # a first line that is longer than the head, or damaged
        return re.match(r'\s*\{\s*"[^"\\\n]*"\s*:', head.text) is not None

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        offset = 0
        with file.decompressed() as stream:
            for number, line in enumerate(stream, start=1):
                start, offset = offset, offset + len(line)
                if line.strip() not in (b"", codecs.BOM_UTF8):
                    yield json_line(line, f"{file.path}:{number}", start, file.path, options.text_field)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line, parse_int=float), dict)
    except (ValueError, RecursionError):
        return False


class Json(Format):
    """A JSON array of objects or texts, or objects one after the other over several lines each."""

    name = "json"
    suffixes = (".json",)

    def matches(self, head: Head, options: Options) -> bool:
        text = head.text.lstrip()
        if re.match(r'\{\s*"(?:[^"\\]|\\.)*"\s*:', text):
            return True
        if not re.match(r'\[\s*[{"]', text):
            return False
        start = len(text) - len(text[1:].lstrip())
        try:
            _, end = json.JSONDecoder(parse_int=float).raw_decode(text, start)  # `int` refuses long ones
        except json.JSONDecodeError as error:
            return (not head.whole and error.pos >= len(text) - 1) or error.msg.startswith("Unterminated")
        except RecursionError:
            return False
        return text[end:].lstrip()[:1] in (",", "]", "")

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        for number, value in enumerate(json_values(file, options.text_field)):
            origin = f"{file.path} record {number}"
            if isinstance(value, str):
                value = {options.text_field: value}
            yield row_document(value, options.text_field, origin)


class Csv(Format):
    """Comma-separated values with a header; semicolons, tabs and bars between columns are found by the header."""

    name = "csv"
    suffixes: ClassVar[tuple[str, ...]] = (".csv",)
    delimiters: ClassVar[str] = ",;\t|"

    def matches(self, head: Head, options: Options) -> bool:
        # prose has commas too: only a header with the field's name is certain
        return len(head.lines) > 1 and self._delimiter(head, options.text_field) is not None

    def _delimiter(self, head: Head, field: str) -> str | None:
        for mark in self.delimiters:
            try:
                names = next(csv.reader(io.StringIO(head.text, newline=""), delimiter=mark), [])
            except csv.Error:
                continue
            if len(names) > 1 and field in (name.strip() for name in names) and all(map(_is_name, names)):
                return mark
        return None

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        csv.field_size_limit((1 << 31) - 1)
        mark = self._delimiter(Head(file, file.head()), options.text_field) or self.delimiters[0]
        with file.decompressed() as stream:
            text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.reader(text, delimiter=mark, strict=True)
            begun = 1
            try:
                names = [name.strip() for name in next(rows, [])]
                _column(file, names, options.text_field)
                begun = rows.line_num + 1
                for row in rows:
                    if row:
                        yield _csv_row(row, names, options.text_field, f"{file.path}:{rows.line_num}")
                    begun = rows.line_num + 1
            except csv.Error as error:
                raise DataError(_broken_row(f"{file.path}:{begun}", self.name, error)) from None
            finally:
                text.detach()  # else it closes the stream, which the caller owns


def _broken_row(origin: str, name: str, error: csv.Error) -> str:
    if "unexpected end" in str(error) or "expected after" in str(error):
        return (
            f"{origin}: a quotation mark that begins a column of this row is not closed at the column's end: write "
            'marks inside a quoted column twice (""), and quote a column that begins with one.'
        )
    return f"{origin}: not {name} ({error})."


def _is_name(text: str) -> bool:
    return len(text) < 100 and not re.search(r"[.!?]\s", text)


def _csv_row(row: list[str], names: list[str], field: str, origin: str) -> Item:
    if len(row) != len(names):
        return DataError(f"{origin}: {len(row)} columns, and the header has {len(names)}.")
    text = row[names.index(field)]
    if "\0" in text:
        return DataError(f"{origin}: column {field!r} holds a zero byte: the file is damaged or binary.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # `surrogateescape` put a lone surrogate where a byte is not UTF-8
        return DataError(f"{origin}: column {field!r} is not UTF-8. Convert the file to UTF-8.")
    return row_document({field: text}, field, origin)


class Tsv(Csv):
    """Tab-separated values with a header."""

    name = "tsv"
    suffixes = (".tsv", ".tab")
    delimiters = "\t,;|"

    def matches(self, head: Head, options: Options) -> bool:
        return False  # by content it is Csv's


class Text(Format):
    """Plain text: a document per separator, or cut at blank lines."""

    name = "text"
    records = False

    def matches(self, head: Head, options: Options) -> bool:
        return True

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        if options.separator is not None:
            return read_separated(file, options.separator)
        return read_text(file, options.document_bytes)


# In the order in which they are tried.
FORMATS: tuple[Format, ...] = (Parquet(), Arrow(), Megatron(), Datatrove(), JsonLines(), Json(), Csv(), Tsv(), Text())
NAMES = ("auto", *(one.name for one in FORMATS))
