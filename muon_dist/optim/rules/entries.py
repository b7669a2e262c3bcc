"""Checks entries of `groups`, `overrides` and `splits` that users write, and converts them to routing rules."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Literal

import torch

from muon_dist.errors import ConfigError
from muon_dist.layout import cut_parameter
from muon_dist.optim.rules import PARTS
from muon_dist.optim.rules.choice import check_options, closest
from muon_dist.optim.rules.scale import update_scale
from muon_dist.routing import GroupRule, Override, Split, SplitRule
from muon_dist.routing.rules import MUON_OPTIONS, check_rule, compiled

ALGORITHMS = ("muon", "adamw")
Splits = Literal["heads"] | Sequence[SplitRule | Mapping[str, Any]]
HEADS = "heads"
"""Value of `split`: the blocks of the model's attention, and of its fused gate and up projections."""
KEYS = ("pattern", "algorithm", "lr", "weight_decay", "rule", "rule_options", "scale", "split")
"""Keys of an entry. Only `pattern` is required; None is the same as a missing key."""
# Keys of other libraries, and what to write instead.
FOREIGN = {
    "use_muon": 'write algorithm: "muon" or "adamw"',
    "num_heads": "write split: {heads: N}",
    "heads": "write split: {heads: N}",
    "sizes": "write split: {sizes: [...]}",
    "split_sizes": "write split: {sizes: [...]}",
    "adjust_lr": 'write scale: "match_rms_adamw", "spectral", "unit_rms" or "none"',
    "adjust_lr_fn": 'write scale: "match_rms_adamw" for "match_rms_adamw", and "spectral" for "original"',
    "rms_scale": 'write scale: "match_rms_adamw"',
    "wd": "write weight_decay",
    "params": "write pattern, a regular expression for the whole name",
    "name": "write pattern, a regular expression for the whole name",
    "params_name": "write pattern, a regular expression for the whole name",
    "lr_mult": "write lr, which is absolute: schedulers multiply each group's own",
    "lr_scale": "write lr, which is absolute: schedulers multiply each group's own",
    "decay_mult": "write weight_decay, which is absolute",
    **{part: f"write rule_options: {{{part}: ...}}" for part in PARTS},
}


def group_rules(groups: Any, rule: str | None = None, where: str = "groups") -> tuple[GroupRule, ...]:
    """The routing rules of the entries of `groups`, in order.

    Args:
        groups: dicts with keys of `KEYS`, or `GroupRule` objects.
        rule: the optimizer's rule, if known: then `rule_options` and `scale` of entries without a rule are checked.
        where: text at the beginning of messages.

    Raises:
        ConfigError: an unknown key, an invalid value, or an option that the rule does not have.
        RoutingError: a pattern is not a regular expression.
    """
    entries = _each(groups, where, '{"pattern": ".*q_proj", "lr": 0.01}')
    return tuple(
        e if isinstance(e, GroupRule) else check_entry(e, rule, _located(e, f"{where}[{i}]")) for i, e in entries
    )


def override_rules(overrides: Any, where: str = "overrides") -> tuple[Override, ...]:
    """Overrides from dicts or `Override` objects. Raises ConfigError, as `group_rules` does."""
    entries = _each(overrides, where, '{"pattern": "lm_head", "algorithm": "muon"}')
    return tuple(
        e if isinstance(e, Override) else Override(**_short(e, Override, f"{where}[{i}]")) for i, e in entries
    )


def split_rules(splits: Any, where: str = "splits") -> tuple[SplitRule, ...]:
    """Split rules from dicts or `SplitRule` objects; "heads" splits the model's attention heads.

    Raises ConfigError, as `group_rules` does.
    """
    if splits == HEADS:
        return (SplitRule(".*", from_model=True),)
    entries = _each(splits, where, '{"pattern": ".*q_proj", "heads": 8}')
    return tuple(
        e if isinstance(e, SplitRule) else SplitRule(**_short(e, SplitRule, f"{where}[{i}]")) for i, e in entries
    )


def refuse_unknown(
    given: Mapping[str, Any],
    known: Iterable[str],
    where: str,
    foreign: Mapping[str, str],
    foreign_is: str = "is not a key of an entry",
    silent: Set[str] = frozenset(),
) -> None:
    """Raise ConfigError for a key that is neither `known` nor `silent`.

    Args:
        foreign: keys of other libraries, and what to write instead.
        foreign_is: text for these keys in the message.
        silent: further known keys, which messages do not list.
    """
    listed = sorted(known)
    for key in given:
        if key in silent or key in listed:
            continue
        if key in foreign:
            raise ConfigError(f"{where}: '{key}' {foreign_is}: {foreign[key]}")
        close = closest(key, {*listed, *silent})
        meant = f"did you mean '{close}'?" if close else f"use one of {', '.join(listed)}"
        raise ConfigError(f"{where}: '{key}' is unknown: {meant}")


def check_entry(entry: Mapping[str, Any], rule: str | None = None, where: str = "entry") -> GroupRule:
    """The routing rule of one entry of `groups`. Arguments and errors: see `group_rules`."""
    refuse_unknown(entry, KEYS, where, FOREIGN)
    entry = {key: value for key, value in entry.items() if value is not None}
    _check_pattern(entry, where)
    algorithm = entry.get("algorithm")
    if algorithm not in (None, *ALGORITHMS):
        close = closest(algorithm, ALGORITHMS)
        meant = f"did you mean '{close}'?" if close else f"use one of {ALGORITHMS}"
        raise ConfigError(f"{where}: algorithm '{algorithm}' is unknown: {meant}")
    options: dict[str, Any] = {
        key: check_not_negative(entry, key, where) for key in ("lr", "weight_decay") if key in entry
    }
    of_muon = {key: entry[key] for key in MUON_OPTIONS if key in entry}
    strange = [key for key in (*of_muon, "split") if key in entry]
    if algorithm == "adamw" and strange:
        raise ConfigError(
            f"{where}: '{strange[0]}' is an option of Muon, but algorithm is 'adamw': remove one of them"
        )
    _check_muon(of_muon, options, rule, where)
    made = GroupRule(entry["pattern"], algorithm, _split(entry, where), {**options, **of_muon})
    compiled(made)
    check_rule(made)
    return made


def check_number(values: Mapping[str, Any], key: str, where: str) -> float:
    """`values[key]` as a float. Raises ConfigError unless it is a finite number or a tensor of one number."""
    value = values[key]
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real and not (isinstance(value, torch.Tensor) and value.numel() == 1):
        raise ConfigError(f"{where}: {key} is {value!r}: it must be a number")
    number = float(value)
    if math.isinf(number):
        raise ConfigError(f"{where}: {key} is {value}: it must be finite")
    return number


def check_not_negative(values: Mapping[str, Any], key: str, where: str) -> float:
    """`values[key]`; raises ConfigError unless it is a number of at least 0."""
    number = check_number(values, key, where)
    if not number >= 0:
        raise ConfigError(f"{where}: {key} is {values[key]}: it must be at least 0")
    return number


def check_flag(values: Mapping[str, Any], key: str, where: str) -> None:
    """Raise ConfigError unless a value is True, False, 1 or 0. A text such as "no" would count as True."""
    if values[key] not in (0, 1):
        raise ConfigError(f"{where}: {key} is {values[key]!r}: it must be True or False")


def _check_muon(of_muon: dict[str, Any], options: Mapping[str, float], rule: str | None, where: str) -> None:
    if "scale" in of_muon:
        _prefixed(where, update_scale, of_muon["scale"], cut_parameter("", (1, 1))[0])
    if of_muon and (rule is not None or "rule" in of_muon):
        decay = {key: options[key] for key in ("weight_decay",) if key in options}
        _prefixed(where, check_options, {"rule": rule, "rule_options": {}, **decay, **of_muon})
    elif not isinstance(of_muon.get("rule_options", {}), Mapping):
        raise ConfigError(
            f"{where}: rule_options is {of_muon['rule_options']!r}: it must be a dict from option to number"
        )


def _prefixed(where: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _split(entry: Mapping[str, Any], where: str) -> Split | None:
    given = entry.get("split")
    if given is None or isinstance(given, Split):
        return given
    if given == HEADS:
        return Split(from_model=True)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f'{where}: split is {given!r}: give {{"heads": N}}, {{"sizes": [...]}}, or "heads" for the model\'s'
        )
    refuse_unknown(
        given,
        ("heads", "sizes", "axis"),
        f"{where}: split",
        {"num_heads": "write heads", "split_sizes": "write sizes"},
        silent={"from_model"},
    )
    sizes = given.get("sizes")
    if sizes is not None and (isinstance(sizes, str) or not isinstance(sizes, Sequence)):
        raise ConfigError(f"{where}: sizes of split is {sizes!r}: give a list of whole numbers")
    own = given.get("from_model") or False
    return Split(given.get("heads"), None if sizes is None else tuple(sizes), given.get("axis") or "outputs", own)


def _short(entry: Any, form: Any, where: str) -> dict[str, Any]:
    """The checked arguments of an override or split rule, from a dict."""
    where, known = _located(entry, where), form.__dataclass_fields__
    refuse_unknown(entry, known, where, {k: v for k, v in FOREIGN.items() if k not in known})
    _check_pattern(entry, where)
    if "algorithm" in known and "algorithm" not in entry:
        raise ConfigError(f'{where}: algorithm is missing: write algorithm: "muon" or "adamw"')
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


def _each(entries: Any, where: str, example: str) -> Iterable[tuple[int, Any]]:
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Iterable):
        raise ConfigError(f"{where} is {entries!r}: give a list of dicts such as {example}")
    return enumerate(entries)


def _located(entry: Any, where: str) -> str:
    """`where`, followed by the pattern of the entry."""
    if not isinstance(entry, Mapping):
        raise ConfigError(
            f'{where} is {entry!r}: give a dict with "pattern" and the options for the parameters that it matches'
        )
    return f"{where} ({entry['pattern']!r})" if isinstance(entry.get("pattern"), str) else where


def _check_pattern(entry: Mapping[str, Any], where: str) -> None:
    pattern = entry.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        found = f"is {pattern!r}" if "pattern" in entry else "is missing"
        raise ConfigError(f"{where}: pattern {found}: write a regular expression for whole names, such as '.*q_proj'")
