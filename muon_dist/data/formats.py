"""Formats of files: how one is recognised by its content, and how it becomes documents.

A new format is one subclass of ``Format``, entered in ``FORMATS``.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from muon_dist.data.document import Item, missing_field, row_document
from muon_dist.data.storage import HEAD_BYTES, DataFile
from muon_dist.data.text import read_separated, read_text
from muon_dist.data.token_files import read_datatrove, read_megatron
from muon_dist.errors import DataError
from muon_dist.failures import one_line

_CHUNK = 1 << 20
_LONGEST_VALUE = 1 << 30  # characters of one value of a JSON file


@dataclass(frozen=True)
class Options:
    """The settings of a source that a reader needs; see ``Source``."""

    text_field: str = "text"
    document_bytes: int = 16384
    separator: str | None = None


@dataclass(frozen=True)
class Head:
    """The beginning of a file, by which its format is recognised."""

    file: DataFile
    data: bytes

    @cached_property
    def text(self) -> str:
        """The beginning as text; what is not UTF-8 is replaced."""
        return codecs.getincrementaldecoder("utf-8-sig")("replace").decode(self.data)

    @property
    def whole(self) -> bool:
        """Whether this is all of the file."""
        return len(self.data) < HEAD_BYTES

    @cached_property
    def lines(self) -> list[str]:
        """The complete lines with anything on them."""
        lines = self.text.splitlines()
        return [line for line in (lines if self.whole else lines[:-1]) if line.strip()]


class Format(ABC):
    """A file format: how a file becomes documents.

    ``suffixes`` are names that promise this format where the content says nothing else. ``records``: the file is a
    list of records, so plain text beside it in a folder is no data.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = ()
    records: ClassVar[bool] = True

    @abstractmethod
    def matches(self, head: Head, options: Options) -> bool:
        """Whether the content is of this format."""

    @abstractmethod
    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        """The documents of the file in order, and an error in the place of each bad record."""


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
    column = field if field in names else field.split(".")[0]
    if column not in names:
        raise missing_field(file.path, field, names, "column")
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
                if line.strip():
                    yield _json_line(line, f"{file.path}:{number}", start, file.path, options.text_field)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_line(line: bytes, origin: str, start: int, path: str, field: str) -> Item:
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8) if start == 0 else line)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}"
        return DataError(f"{path}: not UTF-8 at byte offset {start + error.start} ({byte}: {error.reason}).")
    except json.JSONDecodeError as error:
        return DataError(f"{origin}: not a JSON object ({error.msg}, column {error.colno}).")
    except (ValueError, RecursionError) as error:  # a number of 10,000 digits, 100,000 brackets
        return DataError(f"{origin}: a JSON object that cannot be read ({error}).")
    return row_document(record, field, origin)


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
            _, end = json.JSONDecoder().raw_decode(text, start)
        except json.JSONDecodeError as error:
            return (not head.whole and error.pos >= len(text) - 1) or error.msg.startswith("Unterminated")
        except RecursionError:
            return False
        return text[end:].lstrip()[:1] in (",", "]", "")

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        for number, value in enumerate(_json_values(file)):
            origin = f"{file.path} record {number}"
            if isinstance(value, str):
                value = {options.text_field: value}
            yield row_document(value, options.text_field, origin)


def _json_values(file: DataFile) -> Iterator[Any]:
    """The values of a JSON file, those of an array one by one; holds little more than one value."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    buffer, position, in_array, count, taken, need = "", 0, False, 0, 0, 1
    with file.decompressed() as stream:
        ended = False
        while True:
            while not ended and len(buffer) - position < need:
                block = stream.read(max(_CHUNK, need))
                ended = not block
                buffer = buffer[position:] + _decoded(utf8, block, taken, file)
                taken, position = taken + len(block), 0
            skipped = re.compile(r"[\s,]*" if in_array else r"\s*").match(buffer, position)
            position = skipped.end() if skipped else position
            mark = buffer[position : position + 1]
            if not mark and not ended:
                need = 1
            elif not mark and in_array:
                raise DataError(f"{file.path}: the JSON array does not end: the file is cut off.")
            elif not mark:
                return
            elif mark == "[" and not in_array:
                in_array, position = True, position + 1
            elif mark == "]" and in_array:
                in_array, position = False, position + 1
            else:
                try:
                    value, end = decoder.raw_decode(buffer, position)
                except (ValueError, RecursionError) as error:
                    need = 2 * max(len(buffer) - position, _CHUNK)
                    if ended or need > _LONGEST_VALUE:
                        raise DataError(f"{file.path} record {count}: not JSON ({one_line(error)}).") from None
                    continue
                if end == len(buffer) and not ended:  # a number may continue in the next block
                    need = 2 * (len(buffer) - position)
                    continue
                position, count, need = end, count + 1, 1
                yield value


def _decoded(utf8: Any, block: bytes, start: int, file: DataFile) -> str:
    try:
        return str(utf8.decode(block, final=not block))
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: not UTF-8 near byte offset {start + error.start} ({error.reason}).") from None


class Csv(Format):
    """Comma-separated values with a header; semicolons, tabs and bars between columns are found by the header."""

    name = "csv"
    suffixes: ClassVar[tuple[str, ...]] = (".csv",)
    delimiters: ClassVar[str] = ",;\t|"

    def matches(self, head: Head, options: Options) -> bool:
        # prose has commas too: only a header that names the field is certain
        return len(head.lines) > 1 and self._delimiter(head.lines[0], options.text_field) is not None

    def _delimiter(self, header: str, field: str) -> str | None:
        for mark in self.delimiters:
            names = next(csv.reader([header], delimiter=mark), [])
            if len(names) > 1 and field in (name.strip() for name in names) and all(map(_is_name, names)):
                return mark
        return None

    def read(self, file: DataFile, options: Options) -> Iterator[Item]:
        csv.field_size_limit((1 << 31) - 1)
        with file.decompressed() as stream:
            header = stream.readline().decode("utf-8-sig", "surrogateescape")
            mark = self._delimiter(header.rstrip("\r\n"), options.text_field) or self.delimiters[0]
            names = [name.strip() for name in next(csv.reader([header], delimiter=mark), [])]
            if options.text_field not in names:
                raise missing_field(file.path, options.text_field, names, "column")
            rows = csv.reader((line.decode("utf-8", "surrogateescape") for line in stream), delimiter=mark)
            try:
                for row in rows:
                    if row:
                        origin = f"{file.path}:{rows.line_num + 1}"
                        yield _csv_row(row, names, options.text_field, origin)
            except csv.Error as error:
                raise DataError(f"{file.path}:{rows.line_num + 1}: not {self.name} ({error}).") from None


def _is_name(text: str) -> bool:
    return len(text) < 100 and not re.search(r"[.!?]\s", text)


def _csv_row(row: list[str], names: list[str], field: str, origin: str) -> Item:
    if len(row) != len(names):
        return DataError(f"{origin}: {len(row)} columns, and the header has {len(names)}.")
    text = row[names.index(field)]
    if any("\udc80" <= letter <= "\udcff" for letter in text):
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


# In the order in which they are asked.
FORMATS: tuple[Format, ...] = (Parquet(), Arrow(), Megatron(), Datatrove(), JsonLines(), Json(), Csv(), Tsv(), Text())
NAMES = ("auto", *(one.name for one in FORMATS))
