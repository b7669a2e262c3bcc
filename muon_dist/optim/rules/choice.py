"""The choice of a parameter group's rule, and the rule's options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Set
from typing import Any

from muon_dist.errors import ConfigError
from muon_dist.optim.rules import PARTS, RULES, with_parts
from muon_dist.optim.rules.muon import Group, MuonRule


class DefaultText(str):
    """The default of a text argument; distinguishes it from an equal value that the user passed."""

    __slots__ = ()


class DefaultNumber(float):
    """`DefaultText` for a number."""

    __slots__ = ()


class DefaultFlag(int):
    """`DefaultText` for True or False."""

    def __repr__(self) -> str:
        return repr(bool(self))


_PLAIN: Mapping[type, type] = {DefaultText: str, DefaultNumber: float, DefaultFlag: bool}


def choose_rule(group: Group, given: Set[str], where: str, default: Mapping[str, Any]) -> MuonRule | None:
    """The rule of a group; None for AdamW. Fills in the group's missing options.

    Options that the user left out get the rule's defaults. If the group has the optimizer's rule, options passed to
    the optimizer also count as set by the user.

    Args:
        group: changed in place: gets `rule` and all `rule_options`. A group with the rule "muon" gets neither key, so
            that torch.distributed.checkpoint still loads old checkpoints: it requires all keys of a group.
        given: names of the options that the user set in the group.
        where: name of the group in messages.
        default: the optimizer's `rule` and `rule_options`.

    Raises:
        ConfigError: an unknown rule or option, or an option that the rule does not have; names it.
    """
    by_default = {key for key, value in group.items() if type(value) in _PLAIN}
    group.update({key: _PLAIN[type(group[key])](group[key]) for key in by_default})
    if group["algorithm"] != "muon":
        return None
    for key, value in default.items():
        group.setdefault(key, value)
    try:
        rule = _chosen(group, given - {"rule"} if group["rule"] == default["rule"] else given, by_default)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if rule is RULES["muon"]:
        del group["rule"], group["rule_options"]
    return rule


def check_options(options: Group) -> MuonRule:
    """The rule of a group whose options are all set by the user. Raises ConfigError as `choose_rule` does."""
    return _chosen(dict(options), set(options), set())


def _chosen(group: Group, given: Set[str], by_default: Set[str]) -> MuonRule:
    rule = RULES.get(group["rule"])
    if rule is None:
        close = _did_you_mean(group["rule"], RULES)
        raise ConfigError(f"rule '{group['rule']}' is unknown{close}: use {', '.join(RULES)}")
    meant = {key for key in group if key in given or (key not in by_default and "rule" not in given)}
    for key, value in {"scale": rule.scale, **rule.defaults}.items():
        if key not in meant:
            group[key] = value
        elif key in rule.refused and group[key] != value:
            raise ConfigError(
                f"{key} is {group[key]!r}, but rule '{rule.name}' has no {key}: {rule.refused[key]}. Leave {key} out"
            )
    group["rule_options"] = _options(rule, group["rule_options"] if "rule_options" in meant else {})
    problem = rule.problem(group)
    if problem is not None:
        raise ConfigError(f"rule_options of rule '{rule.name}': {problem}")
    return with_parts(rule, tuple(name for name in PARTS if name in group["rule_options"]))


def _options(rule: MuonRule, given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"rule_options is {given!r}: it must be a dict from option to number")
    for name, value in given.items():
        if name in rule.elsewhere:
            meant = rule.elsewhere[name]
            raise ConfigError(
                f"rule_options of rule '{rule.name}': '{name}' is called {meant} here and is an option of the group: "
                "set it in the group"
            )
        if name in PARTS:
            _check_part(rule, name, value)
            continue
        if name not in rule.options:
            has = f"it has {', '.join(rule.options)}" if rule.options else "it has none"
            close = _did_you_mean(name, [*rule.options, *PARTS])
            raise ConfigError(
                f"rule '{rule.name}' has no option '{name}'{close}: {has}, and every rule has the parts "
                f"{', '.join(part for part in PARTS if part not in rule.refused)}"
            )
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} of rule '{rule.name}' is {value!r}: it must be a number")
    chosen = {name: bool(value) if _is_switch(name) else float(value) for name, value in given.items()}
    return {**rule.options, **{name: value for name, value in chosen.items() if value is not False}}


def _is_switch(name: str) -> bool:
    return name in PARTS and PARTS[name].switch


def _check_part(rule: MuonRule, name: str, value: Any) -> None:
    if name in rule.refused:
        raise ConfigError(f"rule '{rule.name}' has no {name}: {rule.refused[name]}. Leave {name} out")
    part = PARTS[name]
    if part.switch and not isinstance(value, bool):
        raise ConfigError(f"{name} of rule '{rule.name}' is {value!r}: it must be True or False")
    if not part.switch and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ConfigError(f"{name} of rule '{rule.name}' is {value!r}: it must be a number")
    misfit = part.misfit(rule)
    if misfit is not None and value is not False:
        raise ConfigError(f"rule '{rule.name}' has no {name}: {misfit}. Leave {name} out")
    wrong = part.wrong(float(value))
    if wrong is not None:
        raise ConfigError(f"{name} of rule '{rule.name}' is {value!r}: {wrong}")


def closest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is closest to `name`, for messages; None if none is close."""
    return next(iter(difflib.get_close_matches(str(name), sorted(known), n=1)), None)


def _did_you_mean(name: object, known: Iterable[str]) -> str:
    close = closest(name, known)
    return f" (did you mean {close}?)" if close else ""
