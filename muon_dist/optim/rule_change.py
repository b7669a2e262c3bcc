"""Change of the update rule, or of its settings, between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muon_dist.errors import ConfigError
from muon_dist.optim.checks import kind_of
from muon_dist.optim.muon import Muon
from muon_dist.optim.rules import MuonRule
from muon_dist.optim.state import change_rules

_SETTINGS = ("momentum", "nesterov", "ns_steps", "ns_schedule", "ns_dtype", "scale", "weight_decay")
_OF_RULE = ("rule", "rule_options")  # keys that a group with the rule "muon" does not have


@dataclass(frozen=True)
class RuleSettings:
    """The update rules of an optimizer's Muon groups, and their options except the learning rate.

    groups: options of each parameter group; None for AdamW. rules: the rule of each group; None for AdamW.
    """

    groups: tuple[Mapping[str, Any] | None, ...]
    rules: tuple[MuonRule | None, ...]

    def names(self) -> dict[str, str]:
        """Group -> name of its rule, for Muon's groups."""
        return {
            str(group["name"]): rule.name
            for group, rule in zip(self.groups, self.rules, strict=True)
            if group is not None and rule is not None
        }


def rule_settings(optimizer: Muon) -> RuleSettings:
    """The current rule settings of an optimizer."""
    groups = [
        {key: group[key] for key in (*_SETTINGS, *_OF_RULE) if key in group} | {"name": group.get("name", index)}
        if algorithm == "muon"
        else None
        for index, (group, algorithm) in enumerate(zip(optimizer._groups, optimizer.algorithms, strict=True))
    ]
    return RuleSettings(tuple(groups), tuple(optimizer._rules))


def check_change(before: RuleSettings, after: RuleSettings) -> None:
    """Raises ConfigError if a run cannot change between the settings: the groups or `momentum_at_owner` differ."""
    if [g is None for g in after.groups] != [g is None for g in before.groups]:
        raise ConfigError("the rule of other parameter groups cannot be used here: make both from the same model")
    for group, old, new in zip(after.groups, before.rules, after.rules, strict=True):
        if (
            group is not None
            and old is not None
            and new is not None
            and old.momentum_at_owner != new.momentum_at_owner
        ):
            raise ConfigError(
                f"group {group['name']}: rule_options.momentum_at_owner decides which ranks store the momentum, and "
                "must be the same in all parts of a run"
            )


def change_rule(optimizer: Muon, settings: RuleSettings) -> None:
    """Let an optimizer use `settings`, taken from another optimizer with the same groups, from now on.

    Momentum and learning rates stay. A group that keeps its rule also keeps the rule's memory. Otherwise the old
    rule's memory is deleted and the new rule's memory starts at zero. Local, and equal under every layout: all ranks
    call it between the same two steps.

    Raises:
        ConfigError: as `check_change`.
    """
    now = rule_settings(optimizer)
    if settings == now:
        return
    check_change(now, settings)
    for group, new in zip(optimizer._groups, settings.groups, strict=True):
        if new is not None:
            for key in _OF_RULE:
                group.pop(key, None)
            group.update({key: value for key, value in new.items() if key != "name"})
    optimizer._rules = list(settings.rules)
    optimizer._kinds = [kind_of(group) for group in optimizer._groups]
    if optimizer.audit is not None:
        optimizer.audit.forget()
    if optimizer.runtime is not None:
        rules = {index: rule for index, rule in enumerate(settings.rules) if rule is not None}
        change_rules(optimizer.runtime, optimizer.state, rules)
