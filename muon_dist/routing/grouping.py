"""Divides a routing table into parameter groups: parameters with the same algorithm and options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from muon_dist.routing.rules import MUON_OPTIONS
from muon_dist.routing.table import Algorithm, Route, RoutingTable

_DEFAULTS = ("muon", "adamw", "adamw_no_decay")


@dataclass(frozen=True)
class RoutedGroup:
    """The trained parameters of one parameter group.

    Attributes:
        name: "muon", "adamw" or "adamw_no_decay" (biases and norms); for an entry of `groups` followed by its pattern.
        routes: its parameters, in the order of the model.
        options: options of the entry; empty for the three groups without an entry.
        decay: whether the algorithm's weight decay applies if `options` has none.
    """

    name: str
    algorithm: Algorithm
    routes: tuple[Route, ...]
    options: Mapping[str, Any]
    decay: bool


def routed_groups(table: RoutingTable) -> tuple[RoutedGroup, ...]:
    """The non-empty groups of a table: the three without an entry, then the others in order of their first parameter.

    A `weight_decay` in an entry applies to all its parameters, also to biases and norms.
    """
    members: dict[str, list[Route]] = {name: [] for name in _DEFAULTS}
    options: dict[str, Mapping[str, Any]] = {name: {} for name in _DEFAULTS}
    for r in table.routes:
        if r.frozen:
            continue
        own = {} if r.group is None else dict(r.group.options)
        if r.algorithm != "muon":
            own = {key: value for key, value in own.items() if key not in MUON_OPTIONS}
        exempt = r.algorithm == "adamw" and not r.decay and "weight_decay" not in own
        name: str = "adamw_no_decay" if exempt else r.algorithm
        if own and r.group is not None:
            name = f"{name} {r.group.pattern}"
        members.setdefault(name, []).append(r)
        options.setdefault(name, own)
    return tuple(
        RoutedGroup(name, routes[0].algorithm, tuple(routes), options[name], not name.startswith("adamw_no_decay"))
        for name, routes in members.items()
        if routes
    )
