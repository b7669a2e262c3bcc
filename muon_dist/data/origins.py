"""Origins of documents: the standard library, files, or rows of ``datasets``.

A new kind of source is one subclass of ``Origin``, added to ``ORIGINS``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from muon_dist.data import readers
from muon_dist.data.document import Item, SourceGoneError, say
from muon_dist.data.formats import FORMATS, Format, Head, Options, Text
from muon_dist.data.source import Source
from muon_dist.data.storage import DataFile, find_files
from muon_dist.errors import DataError

# Content that is not text: first bytes -> (description, what to do).
_FOREIGN = (
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"PK\x03\x04", "a zip archive (or an office document)", "unpack it, or extract its text first"),
    (b"{\\rtf", "an RTF document", "extract its text first"),
    (b"\xff\xfe\0\0", "UTF-32", "convert it to UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32", "convert it to UTF-8"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8"),
    (b"\x1f\x8b", "compressed twice (gzip)", "decompress it once"),
    (b"\x28\xb5\x2f\xfd", "compressed twice (zstd)", "decompress it once"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "decompress it, or use gzip, zstd, bzip2 or xz"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch the file with git lfs pull"),
)
_MARKUP = re.compile(r"\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|\?xml|head|body)\b", re.IGNORECASE | re.DOTALL)
_NO_DATA = re.compile(
    r"(?:readme|license|licence|notice|copying|citation)\b|.*\.(?:sha256|md5)$"
    r"|_(?:success|metadata|common_metadata)$"  # Spark, Dask and pyarrow write these next to parquet files
    r"|.*~$|#.*#$|(?:thumbs\.db|desktop\.ini)$",  # files that editors and Windows leave in a folder
    re.IGNORECASE,
)
_ABOUT_DATASETS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SIBLINGS = ((".idx", ".bin"), (".ds", ".ds.index"), (".ds", ".ds.metadata"), (".ds", ".ds.loss"))


class Origin(ABC):
    """One kind of source: its documents, and how a change of its content is detected."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @staticmethod
    @abstractmethod
    def takes(source: Source) -> bool:
        """Whether a source is of this kind."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """The documents in their fixed order, with an error in place of each bad record."""

    @abstractmethod
    def state(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The state by which a change is detected: ``files`` with their SHA-256, or ``commit``.

        known: the state of an earlier run. Raises SourceGoneError if the source does not exist.
        """

    def size(self) -> int | None:
        """Bytes of the source (an upper bound of its text), or None if unknown."""
        return None


class Stdlib(Origin):
    """The English text of the running Python's standard library."""

    @staticmethod
    def takes(source: Source) -> bool:
        return source.builtin is not None

    def items(self) -> Iterator[Item]:
        yield from readers.read_stdlib()

    def state(self, known: Mapping[str, Any]) -> dict[str, Any]:
        root = readers.stdlib_root()
        return _files_state(
            [DataFile(str(path), path.relative_to(root).as_posix()) for path in readers.stdlib_files()], known
        )

    def size(self) -> int | None:
        return sum(len(document.data) for document in readers.read_stdlib())


def _files_state(files: Sequence[DataFile], known: Mapping[str, Any]) -> dict[str, Any]:
    earlier = {entry["path"]: entry for entry in known.get("files", [])}
    return {"files": [file.record(earlier.get(file.name)) for file in files]}


class Rows(Origin):
    """Rows of ``datasets``: a name of the hub, a local folder, or a folder that ``save_to_disk`` wrote."""

    @staticmethod
    def takes(source: Source) -> bool:
        return source.dataset is not None or any(readers.is_saved(path) for path in source.paths)

    @property
    def _name(self) -> str:
        return self.source.dataset if self.source.dataset is not None else str(self.source.paths[0])

    def items(self) -> Iterator[Item]:
        source = self.source
        if len(source.paths) > 1:
            raise DataError(f"{source.label}: a folder that datasets saved is a source of its own: list it alone.")
        return readers.read_dataset(
            self._name, source.config, source.split, source.streaming, source.revision, source.text_field
        )

    def state(self, known: Mapping[str, Any]) -> dict[str, Any]:
        name = self._name
        if Path(name).exists():
            files = find_files([name])
            if readers.is_saved(name):  # state.json has a random number that changes with each save
                files = [file for file in files if file.suffix == ".arrow"]
            return _files_state(files, known)
        if self.source.dataset is None or name.startswith((".", "/", "~")):
            raise SourceGoneError(f"{name}: no such folder.")
        return {"commit": readers.hub_commit(name, self.source.split, self.source.revision)}


class Files(Origin):
    """Files, folders, globs and URLs, each file in its own format."""

    @staticmethod
    def takes(source: Source) -> bool:
        return source.path is not None

    def items(self) -> Iterator[Item]:
        source = self.source
        options = Options(source.text_field, source.document_bytes, source.separator)
        for file, kind in self._chosen(options):
            yield from kind.read(file, options)

    def state(self, known: Mapping[str, Any]) -> dict[str, Any]:
        return _files_state(find_files(self.source.paths), known)

    def size(self) -> int | None:
        return sum(file.size() for file in find_files(self.source.paths))

    def _chosen(self, options: Options) -> list[tuple[DataFile, Format]]:
        """The files that are read, each with its format. Warns of files that are left out or look like another
        format."""
        files = find_files(self.source.paths)
        names = {file.name for file in files}
        several = len(files) > 1
        found: list[tuple[DataFile, Format]] = []
        left_out: list[str] = []
        for file in files:
            name = Path(file.name).name
            about = name.lower() in _ABOUT_DATASETS or _NO_DATA.match(name)
            if any(file.name.endswith(b) and file.name.removesuffix(b) + a in names for a, b in _SIBLINGS):
                continue  # read with its index
            if several and (about and file.path not in map(str, self.source.paths)):
                left_out.append(file.name)
            elif file.size():
                found.append((file, self._format(file, options)))
        records = [kind for _, kind in found if kind.records]
        if records and self.source.format == "auto":
            named = set(map(str, self.source.paths))
            left_out += [file.name for file, kind in found if not kind.records and file.path not in named]
            found = [(file, kind) for file, kind in found if kind.records or file.path in named]
        if not found:
            raise DataError(f"{self.source.label}: holds no data, only {', '.join(left_out[:5]) or 'empty files'}.")
        if left_out or (self.source.format == "auto" and not all(map(_as_named, *zip(*found, strict=True)))):
            self._tell(Counter(kind.name for _, kind in found), left_out)
        return found

    def _tell(self, kinds: Mapping[str, int], left_out: Sequence[str]) -> None:
        read = ", ".join(f"{count} file{'s' if count > 1 else ''} as {name}" for name, count in kinds.items())
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        out = f"; left out because they are not data: {', '.join(left_out[:3])}{more} (name a file itself to read it)"
        say(f"{self.source.label}: {read}{out if left_out else ''}")

    def _format(self, file: DataFile, options: Options) -> Format:
        head = Head(file, file.head())
        wanted = self.source.format
        by_content = next(one for one in FORMATS if one.matches(head, options))
        if wanted != "auto":
            chosen = next(one for one in FORMATS if one.name == wanted)
            if by_content.name not in (wanted, "text") and (by_content.name, wanted) != ("csv", "tsv"):
                say(f"{file.path}: looks like {by_content.name}, and is read as {wanted} because format says so")
            elif isinstance(chosen, Text) and _MARKUP.match(head.text):
                say(f"{file.path}: is HTML or XML, and its markup is read as text because format says so")
            return chosen
        if not isinstance(by_content, Text):
            return by_content
        promised = next((one for one in FORMATS if file.suffix in one.suffixes), None)
        _refuse_foreign(head)
        if promised is not None:
            return promised
        if (other := _looks_like(head)) is not None:
            say(f"{file.path}: looks like {other}")
        return by_content


def _as_named(file: DataFile, kind: Format) -> bool:
    """Whether a file's format agrees with its name."""
    if any(file.suffix in one.suffixes for one in FORMATS if isinstance(one, type(kind))):  # Csv reads .tsv too
        return True
    return isinstance(kind, Text) and not any(file.suffix in one.suffixes for one in FORMATS)


def _refuse_foreign(head: Head) -> None:
    """Raises DataError if the content is not text, or is text for programs only."""
    for magic, what, advice in _FOREIGN:
        if head.data.startswith(magic):
            raise DataError(f"{head.file.path}: is {what}: {advice}.")
    if head.data[257:262] == b"ustar":
        raise DataError(f"{head.file.path}: is a tar archive: unpack it.")
    if b"\0" in head.data:
        raise DataError(
            f"{head.file.path}: is binary, not text (a zero byte at byte offset {head.data.index(0)}): leave it out, "
            "or set format to its format."
        )
    if _MARKUP.match(head.text):
        raise DataError(
            f"{head.file.path}: is HTML or XML, not plain text: extract its text first, or set format to text to "
            "train on the markup."
        )


def _looks_like(head: Head) -> str | None:
    """The format that plain text seems to have, and what to do then; None for ordinary text."""
    columns = _columns(head)
    if columns > 1:
        return (
            f"a table of {columns} columns and is read as plain text; for a table set format to csv or tsv, and "
            "text_field to the column with the text"
        )
    if re.match(r"\s*\{\s*'[^'\n]*'\s*:", head.text):
        return "Python dictionaries, which are not JSON, and is read as plain text; write JSON lines (json.dumps)"
    if re.match(r"\s*<(\w+)[^<>]*>", head.text) and len(re.findall(r"</\w+>", head.text)) > 1:
        return "HTML or XML and is read as plain text, its markup too; extract its text first to avoid this"
    return None


def _columns(head: Head) -> int:
    """Number of columns if the text looks like a table (three or more on each of ten lines, the same number); else
    0."""
    if len(head.lines) < 10:
        return 0
    for mark in (",", "\t", ";"):
        counts = {line.count(mark) for line in head.lines[:50]}
        if len(counts) == 1 and (count := counts.pop()) >= (1 if mark == "\t" else 2):
            return count + 1
    return 0


# In the order in which they are asked.
ORIGINS: tuple[type[Origin], ...] = (Stdlib, Rows, Files)


def origin(source: Source) -> Origin:
    """The origin of a source's documents."""
    return next(kind for kind in ORIGINS if kind.takes(source))(source)
