"""JSON records: one line each, an array of them, or objects one after the other."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from muon_dist.data.document import Item, row_document
from muon_dist.data.storage import DataFile
from muon_dist.errors import DataError
from muon_dist.failures import one_line

_CHUNK = 1 << 20
_LONGEST_VALUE = 1 << 30  # most characters of one value of a JSON file


def json_line(line: bytes, origin: str, start: int, path: str, field: str) -> Item:
    """The document of a line that holds a JSON object. start: byte offset of the line in the file."""
    line = line.removeprefix(codecs.BOM_UTF8) if start == 0 else line
    # the decoder that looks for repeated names is slower, so it is used only if a part of the field appears twice
    twice = any(line.count(f'"{part}"'.encode()) > 1 for part in field.split("."))
    try:
        try:
            record = json.loads(line, object_pairs_hook=_names_once(field) if twice else None)
        except ValueError as error:
            if not _is_long_number(error):
                raise
            record = json.loads(line, parse_int=_whole_number, object_pairs_hook=_names_once(field))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x}"
        return DataError(f"{path}: not UTF-8 at byte offset {start + error.start} ({byte}: {error.reason}).")
    except json.JSONDecodeError as error:
        return DataError(f"{origin}: not a JSON object ({error.msg}, column {error.colno}).")
    except (ValueError, RecursionError) as error:  # 100,000 brackets
        return DataError(f"{origin}: a JSON object that cannot be read ({error}).")
    return row_document(record, field, origin)


def _names_once(field: str) -> Callable[[list[tuple[str, Any]]], Any]:
    """The object, or an error if a name that leads to `field` appears twice in it: readers differ in which value they
    take."""
    parts = {field, *field.split(".")}

    def make(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            for name in parts:
                if [key for key, _ in pairs].count(name) > 1:
                    return DataError(f"the name {name!r} appears twice in one JSON object.")
        return found

    return make


def _is_long_number(error: ValueError) -> bool:
    return not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) and "digits" in str(error)


def _whole_number(digits: str) -> int | float:
    """Like `int`, which refuses more than 4,300 digits; a number that long may be an id, and is never text."""
    return int(digits) if len(digits) < 4000 else float(digits)


def json_values(file: DataFile, field: str) -> Iterator[Any]:
    """The values of a JSON file, the items of an array one by one; holds little more than one value in memory."""
    decoder = json.JSONDecoder(parse_int=_whole_number, object_pairs_hook=_names_once(field))
    utf8 = codecs.getincrementaldecoder("utf-8-sig")()
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
