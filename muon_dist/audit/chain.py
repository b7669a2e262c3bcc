"""`audit.jsonl`: one line per audited matrix, each with a digest of itself and of all previous lines."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muon_dist.json_files import append_line, one_line

BEGINNING = "0" * 64
"""The digest before the first line."""
FILE = "audit.jsonl"
_AUDIT = ("step", "matrix", "algorithm", "owner", "auditor", "errors", "tolerance", "alarms")
_NEEDED = {"start": ("previous", "step"), "audit": _AUDIT}


def digest_of(previous: str, record: Mapping[str, Any]) -> str:
    """SHA-256 of the previous digest and of the record as JSON with sorted keys, in hexadecimal."""
    # In the same JSON form as in the file: lines of earlier versions may contain NaN.
    text = json.dumps({k: v for k, v in record.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(f"{previous}{text}".encode()).hexdigest()


class Chain:
    """Appends lines. Every rank keeps the head; one rank writes the file.

    Attributes:
        head: digest of the newest line.
        lines: number of lines since the beginning of the run, including those before a resume.
    """

    def __init__(self, path: Path | None = None, writes: bool = False) -> None:
        self.head = BEGINNING
        self.lines = 0
        self._path = path if writes else None

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write a record; return it with its digest, as written."""
        # Convert to JSON and back, so that the digest is over the values that a reader gets.
        self.lines += 1
        plain = json.loads(one_line({"line": self.lines, **record}))
        plain["digest"] = self.head = digest_of(self.head, plain)
        if self._path is not None:
            try:
                append_line(self._path, plain, sort_keys=True)
            except OSError as error:
                # If only this rank raised, the others would wait forever in a collective.
                print(f"audit: cannot write {self._path}: {error}; the audit continues without it", file=sys.stderr)
                self._path = None
        return dict(plain)

    def start(self, record: Mapping[str, Any], head: str = BEGINNING, lines: int = 0) -> None:
        """Begin a chain, or continue after line number `lines` with digest `head`. Writes a line about the start.

        Later lines in the file belong to an abandoned branch of the run, or to an older run, and are kept.
        """
        self.head, self.lines = head, lines
        if self._path is not None and self._path.is_file():
            whole, end, rest = self._path.read_bytes().rpartition(b"\n")
            if rest:  # a killed process may leave half of its last line
                self._path.write_bytes(whole + end)
        self.append({"kind": "start", "previous": head, **record})


@dataclass
class Read:
    """A chain, read from its file.

    Attributes:
        records: records of all readable lines, with their line numbers.
        problems: texts such as "line 12: ...", about damaged, changed or missing lines.
        abandoned: numbers of lines in abandoned branches or older runs: no later start continues from them.
        digests: digests of all lines.
        head: digest of the last line.
    """

    records: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    abandoned: set[int] = field(default_factory=set)
    digests: dict[str, int] = field(default_factory=dict)
    head: str = BEGINNING

    @property
    def audits(self) -> list[dict[str, Any]]:
        """The records of audited matrices on the current branch of the run, oldest first."""
        return [r for n, r in self.records if r.get("kind") == "audit" and n not in self.abandoned]


def read_chain(path: Path) -> Read:
    """Read and check a file; see `Read`. A problem is reported once: the check continues from the line that has it."""
    found = Read()
    text = path.read_bytes()
    if not text.strip():
        found.problems.append("the file is empty")
        return found
    lines = text.split(b"\n")
    ends = lines.pop() == b""
    if not ends:
        lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not ends:
            found.problems.append(f"line {number}: cut off: it has no end")
        try:
            record = json.loads(line)
            claimed = str(record["digest"])
            if any(key not in record for key in _NEEDED[record["kind"]]):
                raise KeyError
        except (ValueError, KeyError, TypeError):
            found.problems.append(f"line {number}: not a record with a digest")
            found.head = ""
            continue
        _link(found, number, record, claimed)
    return found


def _link(found: Read, number: int, record: dict[str, Any], claimed: str) -> None:
    previous = found.head
    if record.get("kind") == "start":
        previous = str(record.get("previous"))
        if previous not in {BEGINNING, *found.digests}:
            where = (
                "which is missing" if found.records else "which is in another file: put that file's lines before it"
            )
            found.problems.append(f"line {number}: continues from line {int(record.get('line', 0)) - 1}, {where}")
        kept = found.digests.get(previous, 0)
        found.abandoned |= {n for n, _ in found.records if n > kept}
    if previous and digest_of(previous, record) != claimed:
        found.problems.append(_broken(found, number, record))
    found.records.append((number, record))
    found.digests[claimed] = number
    found.head = claimed


def _broken(found: Read, number: int, record: dict[str, Any]) -> str:
    """Text of the problem with a line: a repeated line, wrong order, missing lines before it, or a changed line."""
    numbers = [r.get("line", 0) for n, r in found.records if n not in found.abandoned]
    own, last = record.get("line", 0), numbers[-1] if numbers else 0
    if str(record["digest"]) in found.digests:
        return f"line {number}: is line {found.digests[str(record['digest'])]} once more"
    if numbers and own <= last:
        return f"line {number}: out of order, it was written as line {own} and comes after line {last}"
    missing = own - max(numbers, default=0) - 1
    if missing > 0:
        return f"line {number}: {missing} line{'s' if missing > 1 else ''} missing before it"
    return f"line {number}: changed, or the digest of the line before it was"
