"""What a user says about routing: overrides and splits, by patterns that must match something."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from muon_dist.errors import RoutingError
from muon_dist.routing.table import Algorithm, Route, Split, logical_matrix, shape_text


@dataclass(frozen=True)
class Override:
    """Send every parameter whose name matches `pattern` to `algorithm`.

    The pattern is a regular expression that must match the whole FQN, or the whole FQN without its `.weight`.
    When several overrides match, the last one decides.
    """

    pattern: str
    algorithm: Algorithm


@dataclass(frozen=True)
class SplitRule:
    """Cut every Muon parameter whose name matches `pattern` (as in `Override`) into `heads` blocks or into `sizes`.

    When several rules match, the last one decides.
    """

    pattern: str
    heads: int | None = None
    sizes: tuple[int, ...] | None = None


class Rules:
    """Compiled patterns that remember which of them matched something."""

    def __init__(self, what: str, rules: Sequence[Any]) -> None:
        self.what = what
        self.rules = rules
        self.patterns: list[re.Pattern[str]] = []
        self.matched = [False] * len(rules)
        for rule in rules:
            try:
                self.patterns.append(re.compile(rule.pattern))
            except re.error as error:
                raise RoutingError(f"{what} {rule.pattern!r} is not a valid regular expression: {error}") from None

    def _hit(self, index: int, names: Sequence[str]) -> bool:
        fullmatch = self.patterns[index].fullmatch
        return any(fullmatch(n) or fullmatch(n.removesuffix(".weight")) for n in names)

    def last(self, names: Sequence[str]) -> Any | None:
        """The last rule that matches one of the names of a parameter; all that match count as used."""
        found = None
        for index, rule in enumerate(self.rules):
            if self._hit(index, names):
                self.matched[index], found = True, rule
        return found

    def check_all_used(self, routes: Sequence[Route]) -> None:
        """Raise RoutingError for the first rule that matched nothing it can act on."""
        names = [n for r in routes for n in (r.fqn, *r.aliases)]
        for index, rule in enumerate(self.rules):
            if self.matched[index]:
                continue
            idle = ", ".join([n for n in names if self._hit(index, [n])][:3])
            if idle:
                raise RoutingError(f"{self.what} {rule.pattern!r} matches only parameters that go to AdamW: {idle}")
            raise RoutingError(
                f"{self.what} {rule.pattern!r} matches no parameter (the whole name must match, with or without "
                f"'.weight'); the closest name is {_closest(rule.pattern, names)}"
            )


def _closest(pattern: str, names: Sequence[str]) -> str:
    """The name of which an end part (`q_proj`, `self_attn.q_proj`, ...) is most like the pattern."""
    plain = re.sub(r"\\(.)|[.^$*+?()]+", r"\1", pattern)

    def likeness(name: str) -> float:
        parts = name.removesuffix(".weight").split(".")
        ends = ("".join(parts[start:]) for start in range(len(parts)))
        return max(difflib.SequenceMatcher(None, end, plain).ratio() for end in ends)

    return max(names, key=likeness, default="none: the model has no parameters")


def make_split(rule: SplitRule, fqn: str, shape: tuple[int, ...], transposed: bool) -> Split:
    outputs = logical_matrix(shape, transposed)[1]
    axis = f"the output axis of {fqn} {shape_text(shape)}, which has {outputs} rows"
    if rule.heads is not None and outputs % rule.heads:
        raise RoutingError(f"split {rule.pattern!r}: heads = {rule.heads} does not divide {axis}")
    if rule.sizes is not None and sum(rule.sizes) != outputs:
        raise RoutingError(f"split {rule.pattern!r}: the sizes add up to {sum(rule.sizes)}, unlike {axis}")
    return Split(rule.heads, None if rule.sizes is None else tuple(rule.sizes))


def check_rules(overrides: Sequence[Override], splits: Sequence[SplitRule]) -> None:
    for override in overrides:
        if override.algorithm not in ("muon", "adamw"):
            raise RoutingError(f"override {override.pattern!r}: algorithm {override.algorithm!r} is not muon or adamw")
    for rule in splits:
        if (rule.heads is None) == (rule.sizes is None):
            raise RoutingError(f"split {rule.pattern!r} needs exactly one of heads and sizes")
        numbers = [rule.heads] if rule.heads is not None else list(rule.sizes or ())
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise RoutingError(f"split {rule.pattern!r}: heads and sizes are whole numbers of at least 1")
