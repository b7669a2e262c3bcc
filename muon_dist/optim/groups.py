"""Parameter groups from a routing table."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from muon_dist.errors import ConfigError
from muon_dist.layout import cut_parameter
from muon_dist.optim.calls import called_as
from muon_dist.optim.frameworks import loaded_checks
from muon_dist.optim.other_names import arguments_of, refuse_arguments
from muon_dist.optim.rules import RULES
from muon_dist.optim.rules.entries import Splits, group_rules, override_rules, split_rules
from muon_dist.ownership.partition_order import partition_order
from muon_dist.routing import (
    FoldedTable,
    GroupRule,
    Override,
    Route,
    RoutedGroup,
    RoutingTable,
    announce,
    expert_group,
    fold,
    route,
    routed_groups,
    table_of,
)

Entries = Sequence[GroupRule | Mapping[str, Any]]
"""Type of the argument `groups`; see docs/groups.md."""


@called_as("muon_dist.param_groups(model, lr=0.003)")
def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
    overrides: Sequence[Override] = (),
    splits: Splits = (),
    table: RoutingTable | None = None,
    partitions: int | None = None,
    groups: Entries = (),
    **unknown: NoReturn,
) -> list[dict[str, Any]]:
    """The parameter groups of a model, for `Muon`.

    They are named "muon", "adamw" and "adamw_no_decay" (biases and norms). Each entry of `groups` with options adds
    one or more groups. Empty groups are left out.

    Args:
        model: the model. Frozen parameters are left out; a tied parameter appears once.
        lr, weight_decay: for the Muon group; None: the optimizer's own arguments.
        adamw_lr, adamw_weight_decay: for the AdamW groups; None: as for the Muon group.
        overrides, splits: short forms of entries of `groups`, as dicts or as objects; see `routing.route`.
            `splits="heads"` makes each attention head a matrix of its own; see docs/groups.md.
        table: a routing table of this model, instead of `overrides`, `splits` and `groups`. Without it, the new table
            is printed.
        partitions: number of ranks over which ZeRO stage 1 or 2 will cut each Muon group. The parameters are then
            ordered so that as many slices as possible begin between matrices (`partition_order`; docs/plan.md).
        groups: options by name. Each entry is a dict with `pattern` (a regular expression for the whole name, with or
            without `.weight`) and any of `algorithm`, `lr`, `weight_decay`, `rule`, `rule_options`, `scale` and
            `split` ({"heads": N}, {"sizes": [...]} or "heads"). The first entry that matches a parameter decides;
            options that it leaves out have their normal value. `lr` and `weight_decay` apply to all matches, under
            Muon and AdamW, biases and norms included; `rule`, `scale` and `split` apply only to matches under Muon.
        unknown: no other argument exists; the error for another optimizer's argument says what to write instead.

    Returns:
        Dicts with `params`, `param_names` (FQNs), `name`, `algorithm`, for Muon `cuts`, and the options above.

    Raises:
        ConfigError: an unknown argument, or an entry has an unknown key or a value that cannot be used.
        RoutingError: no parameter goes to Muon, or an entry does not fit its parameters.
        FrameworkError: a framework has already replaced or flattened the parameters.
    """
    if unknown:
        refuse_arguments("param_groups", unknown, arguments_of(param_groups), "Muon")
    check_parameters(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made = routing_for(model, overrides, splits, groups, table)
    table = made if table is not None else announce(made)
    adamw_lr = lr if adamw_lr is None else adamw_lr
    adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    rates = {"muon": (lr, weight_decay), "adamw": (adamw_lr, adamw_weight_decay)}
    return [
        _group(part, parameters, *rates[g.algorithm], partitions)
        for g in routed_groups(table)
        for part in _by_experts(g, parameters)
    ]


def _by_experts(group: RoutedGroup, parameters: Mapping[str, nn.Parameter]) -> list[RoutedGroup]:
    """The group without DeepSpeed's MoE experts, and a group of these: ZeRO shards experts over other ranks."""
    members: dict[str | None, list[Route]] = {}
    for r in group.routes:
        members.setdefault(expert_group(parameters[r.fqn]), []).append(r)
    return [
        replace(group, routes=tuple(routes), name=group.name if ranks is None else ranks)
        for ranks, routes in sorted(members.items(), key=lambda entry: entry[0] or "")
    ]


def _group(
    group: RoutedGroup,
    parameters: Mapping[str, nn.Parameter],
    lr: float | None,
    weight_decay: float | None,
    partitions: int | None,
) -> dict[str, Any]:
    """A group for `Muon`. parameters: by name. lr, weight_decay: defaults for a group without these options."""
    experts = expert_group(parameters[group.routes[0].fqn]) is not None
    ordered = group.algorithm == "muon" and not experts  # `partitions` does not count the ranks of experts
    routes = _in_partition_order(group.routes, partitions) if ordered else group.routes
    made: dict[str, Any] = {
        "params": [parameters[r.fqn] for r in routes],
        "param_names": [r.fqn for r in routes],
        "name": group.name,
        "algorithm": group.algorithm,
    }
    if group.algorithm == "muon":
        made["cuts"] = [_cut(r) for r in routes]
    if experts:
        made["moe"] = True  # DeepSpeed reads it, and expects the name of the expert process group in `name`
    rates = {"lr": lr, "weight_decay": _decay(group, weight_decay)}
    made.update((key, value) for key, value in rates.items() if value is not None)
    return {**made, **copy.deepcopy(dict(group.options))}


def routing_for(
    model: nn.Module,
    overrides: Sequence[Override | Mapping[str, Any]],
    splits: Splits,
    groups: Entries,
    table: RoutingTable | None = None,
    rule: str | None = None,
) -> RoutingTable:
    """The routing table: `table`, or a new one from the other arguments. rule: the optimizer's rule, if known.

    Raises:
        ConfigError, RoutingError: see `param_groups`.
    """
    if table is None:
        return route(model, override_rules(overrides), split_rules(splits), group_rules(groups, rule))
    for name, given in (("groups", groups), ("overrides", overrides), ("splits", splits)):
        if given:
            raise ConfigError(f"table and {name} are both given: pass {name} to route(), which makes the table")
    return table


@called_as("muon_dist.routing_table(model)")
def routing_table(
    model: nn.Module,
    overrides: Sequence[Override | Mapping[str, Any]] = (),
    splits: Splits = (),
    groups: Entries = (),
) -> FoldedTable:
    """A table of each parameter's algorithm and the reason. Equal layers share a row; doubtful rows come first.

        print(muon_dist.routing_table(model))

    Args:
        model: on any device, also the meta device. Its forward is not called.
        overrides, splits, groups: as for `param_groups`.

    Returns:
        `FoldedRow`s with `pattern` (`model.layers.{0-79}.mlp.up_proj.weight`), `shape`, `algorithm`, `role`, `reason`
        and `doubt` (empty, or a sentence with the override that removes the doubt).

    Raises:
        ConfigError: an entry has an unknown key, or a value that cannot be used.
        RoutingError: a pattern is malformed or matches nothing, or a rule does not fit.
    """
    check_model(model, "routing_table")
    return fold(table_of(model, override_rules(overrides), split_rules(splits), group_rules(groups, None)))


def groups_of(params: Any, groups: Entries) -> Any:
    """The parameter groups for `Muon`: those of a model, or `params` unchanged.

    Raises:
        ConfigError: `groups` without a model, whose parameter names its patterns need; or `params` is a set, or
            contains something other than parameters and groups of parameters.
    """
    if isinstance(params, nn.Module):
        return param_groups(params, groups=groups)
    if groups:
        raise ConfigError(
            "groups needs the names of a model's parameters, but params is not a model: write Muon(model, "
            "groups=...), or Muon(muon_dist.param_groups(model, groups=...))"
        )
    if isinstance(params, torch.Tensor):
        return params  # torch's own TypeError says what is needed
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Iterable):
        raise ConfigError(f"params is {_kind(params)}: {_PASS}")
    _check_order("params", params)
    entries = list(params)
    if not entries:
        raise ConfigError(
            f"params is empty (a generator, such as model.parameters(), is empty after its first use): {_PASS}"
        )
    for number, entry in enumerate(entries):
        _check_entry(f"params[{number}]", entry)
    return entries


_PASS = "pass the model, or muon_dist.param_groups(model)"


def _check_entry(where: str, entry: Any) -> None:
    """Raise ConfigError unless `entry` is a parameter, with or without its name, or a group of parameters."""
    if isinstance(entry, Mapping):
        if "params" not in entry:
            raise ConfigError(f"{where} is a group without params: write {{'params': [...], ...}}, or {_PASS}")
        if isinstance(entry["params"], nn.Module):
            raise ConfigError(f"{where}['params'] is a model: write Muon(model), or give the parameters")
        _check_order(f"{where}['params']", entry["params"])
    elif not isinstance(entry[-1] if isinstance(entry, tuple) and entry else entry, torch.Tensor):
        raise ConfigError(f"{where} is {_kind(entry)}, not a parameter and not a group of parameters: {_PASS}")


def _check_order(where: str, params: Any) -> None:
    """Raise ConfigError for a set. Ranks match parameters by their order, and a set of tensors has another on each."""
    if isinstance(params, (set, frozenset)):
        raise ConfigError(f"{where} is a set, whose order differs between ranks and between runs: pass a list")


def _kind(given: Any) -> str:
    return repr(given) if given is None or isinstance(given, (bool, int, float)) else f"a {type(given).__name__}"


def check_model(model: nn.Module, function: str = "param_groups") -> None:
    """Raise ConfigError for anything but a model, such as its parameters: routing needs names and modules.

    function: the name of the function that was called, for the message.
    """
    if not isinstance(model, nn.Module):
        instead = f", not {function}(model.parameters())" if isinstance(model, Iterable) else ""
        raise ConfigError(f"expected a model, got {_kind(model)}: write {function}(model){instead}")


def check_parameters(model: nn.Module) -> None:
    """Check the parameters before they are routed.

    Raises:
        ConfigError: `model` is not a model.
        FrameworkError: a framework has replaced a parameter by something that Muon cannot step.
    """
    check_model(model)
    for check in loaded_checks():
        for fqn, p in model.named_parameters():
            check(fqn, p)


def _decay(group: RoutedGroup, default: float | None) -> float | None:
    """The weight decay to set in a group without one; None to set none (the optimizer's, or a rule without decay)."""
    if not group.decay:
        return 0.0
    rule = RULES.get(group.options.get("rule", "muon"))
    return None if rule is not None and "weight_decay" in rule.refused else default


def _in_partition_order(routes: tuple[Route, ...], partitions: int | None) -> tuple[Route, ...]:
    if partitions is None:
        return routes
    if partitions < 1:
        raise ConfigError(f"partitions is {partitions}: it must be at least 1")
    order = partition_order([cut_parameter(r.fqn, r.shape, **_cut(r)) for r in routes], partitions)
    return tuple(routes[i] for i in order)


def _cut(route: Route) -> dict[str, Any]:
    cut: dict[str, Any] = {"transposed": route.transposed}
    if route.split is not None:
        cut |= route.split.cut()
    return cut
