"""The configuration's rules for parameters by name, as arguments of `routing.route`."""

from __future__ import annotations

from typing import Any

from muon_dist.config.schema import OptimizerConfig
from muon_dist.optim.rules.entries import group_rules
from muon_dist.routing import Override, SplitRule


def routing_rules(optimizer: OptimizerConfig) -> dict[str, Any]:
    """`overrides`, `splits` and `groups` of `routing.route`, from `optimizer.routing` and `optimizer.groups`.

    Raises:
        ConfigError: an entry sets options that its rule does not know.
    """
    routing = optimizer.routing
    entries = [entry.model_dump(exclude_none=True) for entry in optimizer.groups]
    return {
        "overrides": [Override(r.pattern, r.algorithm) for r in routing.overrides],
        "splits": [SplitRule(r.pattern, r.heads, r.sizes, r.axis, r.from_model) for r in routing.split],
        "groups": group_rules(entries, optimizer.muon.rule, where="optimizer.groups"),
    }
