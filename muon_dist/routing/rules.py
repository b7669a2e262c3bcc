"""A user's rules for parameters by name: groups, and their short forms, overrides and splits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from muon_dist.errors import RoutingError
from muon_dist.routing.table import Algorithm, Axis, Route, Split, logical_matrix, shape_text

_BY_HAND = "Set the split by pattern: split {heads: N}, with axis: inputs for an output projection, or {sizes: [...]}"
MUON_OPTIONS = ("rule", "rule_options", "scale")
"""Options of a group that apply only to Muon's parameters."""


@dataclass(frozen=True)
class GroupRule:
    """An entry of `groups`: the options of every parameter whose name matches `pattern`.

    The pattern is a regular expression that must match the whole FQN, or the whole FQN without its `.weight`. The
    first entry of `groups` that matches a parameter decides; options that it leaves out keep their normal values.

    Attributes:
        algorithm: None: the routing chooses.
        split: the split of Muon's parameters among the matches; AdamW's are never split.
        options: `lr`, `weight_decay`, `rule`, `rule_options` and `scale`, as far as the user set them.
        kind: "group", "override" or "split", for messages.
    """

    pattern: str
    algorithm: Algorithm | None = None
    split: Split | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "group"

    @property
    def asks_model(self) -> bool:
        """Whether its split is "heads", so that the model determines the blocks."""
        return self.split is not None and self.split.from_model

    @property
    def needs_muon(self) -> bool:
        """Whether the entry has options that apply only to Muon's parameters."""
        return self.split is not None or any(key in self.options for key in MUON_OPTIONS)

    def __str__(self) -> str:
        return f"{self.kind} {self.pattern!r}"


@dataclass(frozen=True)
class Override:
    """Short form of a `GroupRule` with only an algorithm.

    If several overrides match, the last one decides. An entry of `groups` with an algorithm has priority.
    """

    pattern: str
    algorithm: Algorithm

    def rule(self) -> GroupRule:
        """The full entry of this short form."""
        return GroupRule(self.pattern, self.algorithm, kind="override")


@dataclass(frozen=True)
class SplitRule:
    """Short form of a `GroupRule` with only a split; see `Split`.

    If several split rules match, the last one decides. An entry of `groups` with a split has priority.
    """

    pattern: str
    heads: int | None = None
    sizes: tuple[int, ...] | None = None
    axis: Axis = "outputs"
    from_model: bool = False

    def rule(self) -> GroupRule:
        """The full entry of this short form."""
        return GroupRule(self.pattern, split=Split(self.heads, self.sizes, self.axis, self.from_model), kind="split")


@dataclass(frozen=True)
class Choice:
    """The entries that decide algorithm, split and options of one parameter; None where no entry decides."""

    sender: GroupRule | None
    cutter: GroupRule | None
    group: GroupRule | None


class Rules:
    """Groups, overrides and splits as three lists of rules; in each list the first match decides.

    For algorithm and split separately, an earlier list has priority. The object records which rules matched.

    Raises:
        RoutingError: a pattern is not a regular expression, or an algorithm or a split is invalid.
    """

    def __init__(
        self, groups: Sequence[GroupRule], overrides: Sequence[Override], splits: Sequence[SplitRule]
    ) -> None:
        short = [[r.rule() for r in reversed(overrides)], [r.rule() for r in reversed(splits)]]
        self._lists = [[(r, compiled(r)) for r in rules] for rules in (groups, *short)]
        for rules in self._lists:
            for r, _ in rules:
                check_rule(r)

    def choose(self, names: Sequence[str]) -> Choice:
        """The entries that decide for a parameter with these names (a tied parameter has several)."""
        found = [next((r for r, p in rules if _hit(p, names)), None) for rules in self._lists]
        matching = [r for r in found if r is not None]
        sender = next((r for r in matching if r.algorithm is not None), None)
        cutter = next((r for r in matching if r.split is not None), None)
        return Choice(sender, cutter, found[0] if found[0] is not None and found[0].options else None)

    @property
    def asks_model(self) -> bool:
        """Whether an entry has the split "heads"."""
        return any(rule.asks_model for rules in self._lists for rule, _ in rules)

    def check_all_used(self, routes: Sequence[Route]) -> None:
        """Raise RoutingError for the first entry that applies to no parameter."""
        names = [n for r in routes for n in (r.fqn, *r.aliases)]
        for rules in self._lists:
            for index, (rule, pattern) in enumerate(rules):
                matching = [r for r in routes if _hit(pattern, (r.fqn, *r.aliases))]
                if not matching:
                    raise RoutingError(_unmatched(rule, pattern, names))
                earlier = rules[:index] if rule.kind == "group" else ()
                taken = [next((e for e, p in earlier if _hit(p, (r.fqn, *r.aliases))), None) for r in matching]
                left = [r for r, other in zip(matching, taken, strict=True) if other is None]
                if not left:
                    raise RoutingError(
                        f"{rule} decides about no parameter: the first match wins, and the earlier {taken[0]} "
                        f"takes {_some(matching)}. Put the narrower pattern first"
                    )
                if rule.asks_model and all(r.split is None for r in left):
                    raise RoutingError(
                        f"{rule}: {_some(left)} belong to no known attention, so their heads are unknown. {_BY_HAND}"
                    )
                if rule.needs_muon and all(r.algorithm != "muon" for r in left):
                    raise RoutingError(f"{rule} matches only parameters that go to AdamW: {_some(left)}")


def compiled(rule: GroupRule) -> re.Pattern[str]:
    """The pattern of an entry. Raises RoutingError if it is not a regular expression."""
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        glob = re.fullmatch(r"[\w.*?]+", rule.pattern)  # a glob such as "*.q_proj"
        meant = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in rule.pattern)
        hint = f". If it is meant as a glob, write {meant!r}" if glob else ""
        raise RoutingError(f"{rule} is not a valid regular expression: {error}{hint}") from None


def check_rule(rule: GroupRule) -> None:
    """Raise RoutingError for an invalid algorithm or split."""
    if rule.algorithm not in ("muon", "adamw") and (rule.algorithm is not None or rule.kind == "override"):
        raise RoutingError(f"{rule}: algorithm {rule.algorithm!r} is not muon or adamw")
    if rule.split is None:
        return
    heads, sizes = rule.split.heads, rule.split.sizes
    if (heads is not None) + (sizes is not None) + rule.split.from_model != 1:
        raise RoutingError(f"{rule} needs exactly one of heads and sizes, or split 'heads' for the model's heads")
    if rule.split.axis not in ("outputs", "inputs"):
        raise RoutingError(f"{rule}: axis is {rule.split.axis!r}: use outputs or inputs")
    if rule.split.from_model:
        return
    numbers = [heads] if heads is not None else list(sizes or ())
    if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise RoutingError(f"{rule}: heads and sizes must be whole numbers of at least 1")


def make_split(
    rule: GroupRule, fqn: str, shape: tuple[int, ...], transposed: bool, own: Split | str | None
) -> Split | None:
    """The split of `rule` for one parameter; None if it is not split.

    Args:
        own: the model's split; None if the parameter is one block, a sentence if the model does not show it.

    Raises:
        RoutingError: the split does not fit the axis, or the model does not show the split.
    """
    assert rule.split is not None
    if rule.split.from_model and isinstance(own, str):
        raise RoutingError(f"{rule}: {own}. {_BY_HAND}, for {fqn} {shape_text(shape)} and its module's other weights")
    split = rule.split if not rule.split.from_model or isinstance(own, str) else own
    if split is None:
        return None
    _, outputs, inputs = logical_matrix(shape, transposed)
    word, length = ("output", outputs) if split.axis == "outputs" else ("input", inputs)
    axis = f"the {word} axis of {fqn} {shape_text(shape)}, which has {length} rows"
    if split.heads is not None and length % split.heads:
        raise RoutingError(f"{rule}: heads = {split.heads} does not divide {axis}")
    if split.sizes is not None and sum(split.sizes) != length:
        raise RoutingError(f"{rule}: the sizes add up to {sum(split.sizes)}, which does not fit {axis}")
    return Split(split.heads, None if split.sizes is None else tuple(split.sizes), split.axis)


def _hit(pattern: re.Pattern[str], names: Sequence[str]) -> bool:
    return any(pattern.fullmatch(n) or pattern.fullmatch(n.removesuffix(".weight")) for n in names)


def _some(routes: Sequence[Route]) -> str:
    rest = len(routes) - 3
    return ", ".join(r.fqn for r in routes[:3]) + (f" and {rest} more" if rest > 0 else "")


def _unmatched(rule: GroupRule, pattern: re.Pattern[str], names: Sequence[str]) -> str:
    part = next((n for n in names if pattern.search(n)), None)
    found = f"it is a part of {part}: write '.*{rule.pattern}.*'" if part else None
    return (
        f"{rule} matches no parameter (the whole name must match, with or without '.weight'); "
        f"{found or 'the closest name is ' + _closest(rule.pattern, names)}"
    )


def _closest(pattern: str, names: Sequence[str]) -> str:
    """The name with an end part (`q_proj`, `self_attn.q_proj`, ...) that is most similar to the pattern."""
    plain = re.sub(r"\\(.)|[.^$*+?()]+", r"\1", pattern)

    def likeness(name: str) -> float:
        parts = name.removesuffix(".weight").split(".")
        ends = ("".join(parts[start:]) for start in range(len(parts)))
        return max(difflib.SequenceMatcher(None, end, plain).ratio() for end in ends)

    return max(names, key=likeness, default="none: the model has no parameters")
