"""Parameter groups from a routing table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from muon_dist.errors import ConfigError
from muon_dist.frameworks import loaded_checks
from muon_dist.layout import cut_parameter
from muon_dist.partition_order import partition_order
from muon_dist.routing import Override, Route, RoutingTable, SplitRule, announce, route


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    adamw_lr: float | None = None,
    adamw_weight_decay: float | None = None,
    overrides: Sequence[Override] = (),
    splits: Sequence[SplitRule] = (),
    table: RoutingTable | None = None,
    partitions: int | None = None,
) -> list[dict[str, Any]]:
    """The groups of `model` for `Muon`: "muon", "adamw" and "adamw_no_decay" (biases and norms), those not empty.

    Args:
        model: frozen parameters are left out, tied ones stand once.
        lr, weight_decay: of the Muon group; None leaves them to the optimizer's arguments.
        adamw_lr, adamw_weight_decay: of the AdamW groups; None means those of the Muon group.
        overrides, splits: see `routing.route`.
        table: a routing table made for this model, in place of `overrides` and `splits`; without one it is printed.
        partitions: ranks over which ZeRO stage 1 or 2 will cut the Muon group: its parameters are put into the order
            in which its slices begin between matrices as far as possible (`partition_order`; docs/plan.md).

    Returns:
        Dicts with `params`, `param_names` (FQNs), `name`, `algorithm`, for Muon `cuts`, and the options given.

    Raises:
        RoutingError: nothing reaches Muon, or a rule does not fit.
        FrameworkError: a framework has already made something else of the parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    check_parameters(model)
    table = table or announce(route(model, overrides, splits))
    adamw_lr = lr if adamw_lr is None else adamw_lr
    adamw_weight_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    adamw = table.select("adamw")
    muon = _in_partition_order(table.select("muon"), partitions)
    kinds = (
        ("muon", "muon", muon, lr, weight_decay),
        ("adamw", "adamw", tuple(r for r in adamw if r.decay), adamw_lr, adamw_weight_decay),
        ("adamw_no_decay", "adamw", tuple(r for r in adamw if not r.decay), adamw_lr, 0.0),
    )
    groups = []
    for name, algorithm, routes, group_lr, group_decay in kinds:
        if not routes:
            continue
        group: dict[str, Any] = {
            "params": [parameters[r.fqn] for r in routes],
            "param_names": [r.fqn for r in routes],
            "name": name,
            "algorithm": algorithm,
        }
        if algorithm == "muon":
            group["cuts"] = [_cut(r) for r in routes]
        if group_lr is not None:
            group["lr"] = group_lr
        if group_decay is not None:
            group["weight_decay"] = group_decay
        groups.append(group)
    return groups


def check_parameters(model: nn.Module) -> None:
    """Raise FrameworkError for a parameter of which a framework has already made something that Muon cannot step."""
    for check in loaded_checks():
        for fqn, p in model.named_parameters():
            check(fqn, p)


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
        cut |= {"heads": route.split.heads, "sizes": route.split.sizes}
    return cut
