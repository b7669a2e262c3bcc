"""Plain text files: where one document ends and the next begins."""

from __future__ import annotations

from collections.abc import Iterator

from muon_dist.data.document import Document, Item
from muon_dist.data.storage import DataFile
from muon_dist.errors import DataError

_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


def _checked(data: bytes, path: str, start: int) -> Item:
    """The text as a document, or an error with the place of a zero byte or of a byte that is not UTF-8."""
    # A crash leaves zero bytes where data were not written; some programs write them too.
    if (zero := data.find(b"\0")) >= 0:
        return DataError(
            f"{path}: a zero byte at byte offset {start + zero}: the file is damaged or binary. Repair it, or leave "
            "it out."
        )
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return DataError(
            f"{path}: not UTF-8 at byte offset {start + error.start} "
            f"(byte 0x{data[error.start]:02x}: {error.reason}). Convert the file to UTF-8."
        )
    return Document(data.removeprefix(_BOM) if start == 0 else data, f"{path} at byte {start}")


def read_text(file: DataFile, document_bytes: int) -> Iterator[Item]:
    """A text file, cut at the first blank line after ``document_bytes`` (else at a line end, else at a character,
    before twice as many). The documents joined are the file, byte for byte, less a UTF-8 byte order mark.
    """
    with file.decompressed() as stream:
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
            yield _checked(buffer[position:end], file.path, offset)
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


def read_separated(file: DataFile, separator: str) -> Iterator[Item]:
    """A text file with ``separator`` between its documents; the separator is part of no document. A newline: one
    document per line, for any kind of line end.

    Raises DataError if a file with several lines does not contain the separator.
    """
    mark = separator.encode("utf-8")
    with file.decompressed() as stream:
        buffer, start, offset, found = b"", 0, 0, False
        while block := stream.read(_BLOCK):
            searched = max(start, len(buffer) - len(mark) + 1)
            buffer, searched, start = buffer[start:] + block, searched - start, 0
            while (end := buffer.find(mark, searched)) >= 0:
                found = True
                yield _checked(_line(buffer[start:end], mark), file.path, offset)
                offset += end + len(mark) - start
                start = searched = end + len(mark)
        rest = buffer[start:]
        if not found and mark != b"\n" and rest.strip().count(b"\n"):
            raise DataError(
                f"{file.path}: the separator {separator!r} is nowhere in it: correct the source's separator, or leave "
                "it out to cut at blank lines."
            )
        if rest:
            yield _checked(_line(rest, mark), file.path, offset)


def _line(data: bytes, mark: bytes) -> bytes:
    return data.removesuffix(b"\r") if mark == b"\n" else data
