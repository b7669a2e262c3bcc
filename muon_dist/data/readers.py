"""Readers: a file, a ``datasets`` name or the standard library in, documents out, in a fixed order."""

from __future__ import annotations

import ast
import functools
import gc
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muon_dist.errors import DataError

_BLOCK = 1 << 20
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"})


class Document(NamedTuple):
    """A document: its text as UTF-8 bytes, and where it came from, for messages."""

    data: bytes
    origin: str


def _utf8(text: object, origin: str, field: str) -> bytes:
    if not isinstance(text, str):
        raise DataError(f"{origin}: field {field!r} is {type(text).__name__}, not text.")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair, which no UTF-8 text can hold
        raise DataError(
            f"{origin}: field {field!r} is not Unicode text (a lone surrogate at character {error.start})."
        ) from None


def _check_utf8(data: bytes, path: Path, start: int) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte offset {start + error.start} "
            f"(byte 0x{data[error.start]:02x}: {error.reason}). Convert the file to UTF-8."
        ) from None


def read_text(path: Path, document_bytes: int) -> Iterator[Document]:
    """A text file, cut at the first blank line after ``document_bytes`` (else at a line end, else at a character,
    before twice as many). The documents joined are the file, byte for byte, less a UTF-8 byte order mark.
    """
    with path.open("rb") as stream:
        buffer, position, offset = b"", 0, 0
        ended = False
        while True:
            while not ended and len(buffer) - position < 2 * document_bytes + 4:
                block = stream.read(max(_BLOCK, document_bytes))
                ended = not block
                buffer, position = buffer[position:] + block, 0
            if position == len(buffer):
                return
            end = _cut(buffer, position, document_bytes)
            data = buffer[position:end]
            _check_utf8(data, path, offset)
            yield Document(data.removeprefix(b"\xef\xbb\xbf") if offset == 0 else data, f"{path} at byte {offset}")
            offset += end - position
            position = end


def _cut(buffer: bytes, start: int, size: int) -> int:
    """End of the document that begins at ``start``."""
    limit = min(start + 2 * size, len(buffer))
    if len(buffer) - start <= size:
        return len(buffer)
    for mark in (b"\n\n", b"\n"):
        found = buffer.find(mark, start + size - 1, limit)
        if found >= 0:
            return found + len(mark)
    end = limit
    while start < end < len(buffer) and buffer[end] & 0xC0 == 0x80 and limit - end < 4:
        end -= 1
    return end


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    """JSON lines, one document each, its text under ``field``. Blank lines are passed over."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            _check_utf8(line, path, offset)
            offset += len(line)
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{origin}: not a JSON object ({error.msg}, column {error.colno}).") from None
            except (ValueError, RecursionError) as error:  # a number of 10,000 digits, 100,000 brackets
                raise DataError(f"{origin}: a JSON object that cannot be read ({error}).") from None
            if not isinstance(record, dict):
                raise DataError(f"{origin}: a JSON object is needed, this is {type(record).__name__}.")
            if field not in record:
                raise DataError(f"{origin}: field {field!r} is missing; there is: {_names(record)}. Set text_field.")
            yield Document(_utf8(record[field], origin, field), origin)


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """The text column of a parquet file, one row a document, read in small batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                names = _names(file.schema_arrow.names)
                raise DataError(f"{path}: column {field!r} is missing; there is: {names}. Set text_field.")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    yield Document(_utf8(value.as_py(), f"{path} row {row}", field), f"{path} row {row}")
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}).") from None


def read_dataset(
    name: str, config: str | None, split: str, streaming: bool, revision: str | None, field: str
) -> Iterator[Document]:
    """A ``datasets`` name (of the hub, or a local folder), streaming or downloaded. Code of a dataset is never run:
    ``trust_remote_code`` is not passed, and datasets >= 4 has no loading scripts.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision)
    except Exception as error:  # datasets raises its own, fsspec's, the hub's and the network's errors here
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    for number, record in enumerate(_rows(rows, name, split)):
        origin = f"dataset {name!r} row {number}"
        if not isinstance(record, dict):
            raise DataError(f"{origin}: is {type(record).__name__}, and a split holds rows: set split.")
        if field not in record:
            raise DataError(f"{origin}: field {field!r} is missing; there is: {_names(record)}. Set text_field.")
        yield Document(_utf8(record[field], origin, field), origin)


def _rows(rows: Any, name: str, split: str) -> Iterator[Any]:
    """The rows; what `datasets` raises between two of them (it reads lazily) as a DataError that says where."""
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # as in `read_dataset`; what our reader raises does not come through here
        cause = error.__cause__ or error  # its own messages say little: "An error occurred while generating"
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be read after row {number - 1}: "
            f"{type(cause).__name__}: {cause}"
        ) from error


def stdlib_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[Path]:
    """The standard library's Python files without tests and installed packages, sorted."""
    root = stdlib_root()
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIP]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"builtin stdlib: {root} holds no Python source files; use another source.")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


@functools.lru_cache(maxsize=1)
def read_stdlib() -> tuple[Document, ...]:
    """English text of the Python standard library: the language reference of ``pydoc_data.topics`` (a document a
    topic) and every module's docstrings (a document a module). Sources are parsed, never imported or run.
    Kept in memory (about 2 MB) because parsing them takes seconds.
    """
    root = stdlib_root()
    found: list[Document] = []
    collecting = gc.isenabled()
    gc.disable()  # trees hold no circles, and looking for some takes as long as parsing
    try:
        for path in stdlib_files():
            name = path.relative_to(root).as_posix()
            found += [Document(text.encode("utf-8"), f"stdlib {name}") for text in _english(path, name)]
    finally:
        if collecting:
            gc.enable()
    return tuple(found)


def _english(path: Path, name: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and Python 2 samples that some builds ship
            return []
    texts = _topics(tree) if name == "pydoc_data/topics.py" else [_docstrings(tree)]
    return [text for text in texts if text and _encodable(text)]


def _docstrings(tree: ast.Module) -> str:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    return "\n\n".join(text for node in _documented(tree) if (text := ast.get_docstring(node)))


def _documented(node: ast.AST) -> Iterator[_Documented]:
    # through statements alone: expressions hold no definitions, and are most of a tree
    if isinstance(node, _Documented):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            for child in children:
                yield from _documented(child)


def _topics(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []


def _encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)
