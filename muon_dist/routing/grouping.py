"""From a routing table to parameter groups: parameters of one algorithm that share their options."""

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
        name: "muon", "adamw" or "adamw_no_decay" (biases and norms); for an entry of `groups` with its pattern behind.
        routes: in the order of the model.
        options: of the entry; empty for the three groups without one.
        decay: whether the weight decay of the algorithm holds where `options` has none.
    """

    name: str
    algorithm: Algorithm
    routes: tuple[Route, ...]
    options: Mapping[str, Any]
    decay: bool


def routed_groups(table: RoutingTable) -> tuple[RoutedGroup, ...]:
    """The groups of a table that are not empty: the three without an entry first, then by their first parameter.

    A `weight_decay` of an entry holds for all its parameters, biases and norms too.
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
