"""The routing table for people: equal layers share one row, doubtful rows come first."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from muon_dist.routing.table import Algorithm, Route, RoutingTable, shape_text


@dataclass(frozen=True)
class FoldedRow:
    """Parameters whose names differ only in numbers.

    pattern: the name, with `{0-79}` or `{0-2,5}` for the numbers. shape: the shape of each. count: number of
    parameters. algorithm: "muon" or "adamw". role, reason: their role and the reason for the algorithm. doubt: a
    sentence about the doubt, with the line that removes it, or "". frozen: they are not trained. aliases: patterns of
    tied names.
    """

    pattern: str
    shape: tuple[int, ...]
    algorithm: Algorithm
    role: str
    reason: str
    doubt: str = ""
    count: int = 1
    frozen: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoldedTable:
    """The rows, with doubtful rows first, then in the order of the model. `str()` returns a readable table."""

    rows: tuple[FoldedRow, ...]
    summary: str = ""

    @property
    def doubts(self) -> tuple[FoldedRow, ...]:
        """The rows with a doubt."""
        return tuple(r for r in self.rows if r.doubt)

    def __iter__(self) -> Iterator[FoldedRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "shape", "algorithm", "role", "reason")]
        for r in self.rows:
            shape = shape_text(r.shape) if r.count == 1 else f"{r.count} x {shape_text(r.shape)}"
            reason = r.reason if not r.aliases else f"{r.reason}; tied with {', '.join(r.aliases)}"
            cells.append((r.pattern, shape, "frozen" if r.frozen else r.algorithm, r.role, reason))
        widths = [max(len(c[i]) for c in cells) for i in range(4)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in cells]
        for place, row in reversed([(i, r) for i, r in enumerate(self.rows, 1) if r.doubt]):
            lines.insert(place + 1, f"  DOUBT: {row.doubt}")
        return "\n".join([*lines, self.summary] if self.summary else lines)


@dataclass(frozen=True)
class _Kind:
    """The properties that parameters of one row share."""

    shape: tuple[int, ...]
    algorithm: Algorithm
    role: str
    reason: str
    doubt: str
    frozen: bool
    aliases: tuple[str, ...]


def fold(table: RoutingTable) -> FoldedTable:
    """The rows of a routing table, folded over the numbers in the names."""
    groups: dict[tuple[_Kind, tuple[str, ...]], list[tuple[int, Route]]] = defaultdict(list)
    for place, r in enumerate(table.routes):
        reason = r.reason if r.group is None else f"{r.reason}; {r.group}"
        kind = _Kind(r.shape, r.algorithm, r.role, reason, r.doubt, r.frozen, tuple(_blank(a) for a in r.aliases))
        groups[kind, tuple(_blank(r.fqn).split("."))].append((place, r))
    rows: list[tuple[bool, int, FoldedRow]] = []
    for (kind, _), members in groups.items():
        first = members[0][0]
        for names in _products([tuple(r.fqn.split(".")) for _, r in members]):
            pattern = ".".join(_range(numbers) for numbers in names)
            count = 1
            for numbers in names:
                count *= len(numbers)
            doubt = f"{kind.doubt}. {_line(names, kind.algorithm)}" if kind.doubt else ""
            row = FoldedRow(
                pattern, kind.shape, kind.algorithm, kind.role, kind.reason, doubt, count, kind.frozen, kind.aliases
            )
            rows.append((not kind.doubt, first, row))
    rows.sort(key=lambda entry: entry[:2])
    summary = table.render().splitlines()[1 + len(table.routes) :]
    return FoldedTable(tuple(row for _, _, row in rows), "\n".join(summary))


def _blank(name: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in name.split("."))


def _products(names: Sequence[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Names of one form as products of sets of parts, such as `layers.{0-3}.experts.{0-7}`; exactly these names."""
    found: list[tuple[tuple[str, ...], ...]] = [tuple((part,) for part in name) for name in names]
    for place in reversed(range(len(names[0]))):
        joined: dict[tuple[tuple[str, ...], ...], list[str]] = {}
        for product in found:
            joined.setdefault((*product[:place], *product[place + 1 :]), []).extend(product[place])
        found = [(*rest[:place], tuple(parts), *rest[place:]) for rest, parts in joined.items()]
    return found


def _range(parts: tuple[str, ...]) -> str:
    """Text for a set of parts: `{0-79}` or `{0-2,5}` for numbers; a single part is returned unchanged."""
    if len(parts) == 1:
        return parts[0]
    numbers = sorted(int(p) for p in parts)
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _line(names: tuple[tuple[str, ...], ...], algorithm: Algorithm) -> str:
    """The lines that remove a doubt: an override for the other algorithm, and for this one."""
    parts = [re.escape(n[0]) if len(n) == 1 else r"\d+" for n in names]
    pattern = r"\.".join(parts).removesuffix(r"\.weight")
    other = "adamw" if algorithm == "muon" else "muon"
    return f"It goes to {algorithm}; if that is wrong, write overrides=[Override(r'{pattern}', '{other}')]"
