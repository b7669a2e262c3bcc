"""Reads and writes JSON: strict, files written atomically, logs with one object per line.

JSON has no NaN and no infinity, and most readers refuse a file with one: such a number is written as null.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Object = dict[str, Any]


def strict(value: Any) -> Any:
    """`value` with None instead of NaN and infinity, and with lists instead of tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def one_line(value: Any, sort_keys: bool = False) -> str:
    """`value` as one line of JSON in ASCII, without the line end; no character in it looks like a line end."""
    return json.dumps(strict(value), sort_keys=sort_keys, allow_nan=False)


def indented(value: Any, sort_keys: bool = False) -> str:
    """`value` as indented JSON for people, without the last line end."""
    return json.dumps(strict(value), indent=2, sort_keys=sort_keys, ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> bytes:
    """`value` as bytes for digests: equal values give equal bytes, for any order of keys.

    Raises:
        ValueError: a number is NaN or infinite. With null instead, different values would have the same digest.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write a file atomically, and make its folder: a reader finds the old file or the new one."""
    # A lone surrogate (from a file name that is not UTF-8) becomes its JSON escape.
    _replace(path, (indented(value, sort_keys) + "\n").encode("utf-8", "backslashreplace"))


def append_line(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Append an object to a JSON-lines file, and make its folder.

    If a killed run left an incomplete line at the end, it stays a separate line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.tell()
        file.seek(max(end - 1, 0))
        half = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(half + one_line(value, sort_keys).encode() + b"\n")


def write_lines(path: Path, values: Sequence[Any]) -> None:
    """Write a JSON-lines file atomically."""
    _replace(path, "".join(one_line(value) + "\n" for value in values).encode())


def keep_lines(path: Path, keep: Callable[[Object], bool]) -> None:
    """Keep the lines of a JSON-lines file whose object `keep` accepts; delete damaged lines. The file may be missing.
    Killed runs leave damaged lines: the end of the last line is missing.
    """
    if path.exists():
        write_lines(path, [value for _, value in read_lines(path) if value is not None and keep(value)])


def read_object(path: Path) -> Object:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read; FileNotFoundError if it is missing.
        ValueError: the file is not JSON, or its value is not an object.
    """
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, Object | None]]:
    """(line number from 1, object) of each line of a JSON-lines file; None for a line without an object.

    Raises:
        OSError: the file cannot be read.
    """
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        yield number, value if isinstance(value, dict) else None


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A unique name, because two processes may write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
