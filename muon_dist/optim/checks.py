"""Checks of a parameter group: every key, value and cut, before it is used."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch

from muon_dist.errors import ConfigError, LayoutError
from muon_dist.layout import cut_parameter
from muon_dist.numerics import compute_dtype, get_schedule
from muon_dist.optim.other_names import RENAMED, UNNEEDED
from muon_dist.optim.rules import Group
from muon_dist.optim.rules.choice import closest
from muon_dist.optim.rules.entries import ALGORITHMS, check_flag, check_not_negative, check_number, refuse_unknown
from muon_dist.optim.rules.scale import update_scale

_OWN = {"params", "param_names", "name", "algorithm", "cuts", "rule", "rule_options", "moe"}
# Keys that torch's schedulers write into groups. They are still there when the optimizer is created again.
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
_OF_ADAMW = 'in the group whose algorithm is "adamw"'
# Keys of other optimizers, and what to write instead.
_FOREIGN = {
    **{name: f'write "{ours}"' + (f": {value}" if value else "") for name, (ours, value) in RENAMED.items()},
    **UNNEEDED,
    "use_muon": 'write "algorithm": "muon" or "adamw" in each group, or param_groups(model)',
    "num_heads": 'write "cuts": [{"heads": N}, ...], one for each parameter; or param_groups(model, splits=[...])',
    "split_sizes": 'write "cuts": [{"sizes": [...]}, ...], one for each parameter; or param_groups(model, splits=...)',
    **{name: f'write "lr" {_OF_ADAMW}' for name in ("adam_lr", "adamw_lr")},
    **{name: f'write "betas" {_OF_ADAMW}' for name in ("adam_betas", "adamw_betas")},
    **{name: f'write "eps" {_OF_ADAMW}' for name in ("adam_eps", "adamw_eps")},
    **{
        name: f'write "weight_decay" {_OF_ADAMW}'
        for name in ("adam_wd", "adamw_wd", "adam_weight_decay", "adamw_weight_decay")
    },
}


def check_keys(group: Mapping[str, Any], defaults: Iterable[str], where: str) -> None:
    """Raise ConfigError for an unknown key of a group; the message names the closest key or the replacement."""
    refuse_unknown(group, {*defaults, *_OWN}, where, _FOREIGN, "is a key of another optimizer", silent=_OF_SCHEDULERS)


def check_group(group: Group, where: str) -> None:
    """Raise ConfigError for an invalid option of a parameter group; the message names key and value."""
    if group["algorithm"] not in ALGORITHMS:
        raise ConfigError(f"{where}: algorithm '{group['algorithm']}' is unknown: use one of {ALGORITHMS}")
    for key in ("lr", "weight_decay"):
        check_not_negative(group, key, where)
    if group["algorithm"] == "adamw":
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"{where}: betas are {betas!r}: give two numbers, such as (0.9, 0.95)")
        if not all(isinstance(b, (numbers.Real, torch.Tensor)) and 0 <= float(b) < 1 for b in betas):
            raise ConfigError(f"{where}: betas are {betas}: both must be in [0, 1)")
        check_not_negative(group, "eps", where)
        for key in ("rule", "rule_options"):
            if key in group:
                raise ConfigError(
                    f"{where}: '{key}' is an option of Muon, but algorithm is 'adamw': remove one of them"
                )
        return
    if not 0 <= check_number(group, "momentum", where) < 1:
        raise ConfigError(f"{where}: momentum is {group['momentum']}: it must be in [0, 1)")
    check_flag(group, "nesterov", where)
    if not isinstance(group["ns_steps"], int) or isinstance(group["ns_steps"], bool):
        raise ConfigError(f"{where}: ns_steps is {group['ns_steps']!r}: it must be a whole number")
    schedule = get_schedule(group["ns_schedule"])
    schedule.coefficients(group["ns_steps"])
    if not isinstance(group["ns_schedule"], str):
        group["ns_schedule"] = schedule.rows  # tuples can be compared: they are part of the key of a cached program
    compute_dtype(group["ns_dtype"], torch.device("cpu"), group["ns_schedule"])
    update_scale(group["scale"], cut_parameter("", (1, 1))[0])


def unplanned(p: torch.Tensor, index: int) -> LayoutError:
    """The error for a tensor of a Muon group that is not part of the plan."""
    return LayoutError(
        f"group {index} has a tensor of shape {tuple(p.shape)} that is not in the plan: parameters must not be "
        "replaced after the first step. To add parameters, call add_param_group"
    )


def check_cuts(cuts: Any, count: int, where: str) -> list[dict[str, Any] | None]:
    """The cuts of a group of `count` parameters.

    Raises:
        ConfigError: a parameter's cut is neither None nor a dict of heads, sizes, transposed and axis.
    """
    if cuts is None:
        return [None] * count
    if isinstance(cuts, Mapping) or not isinstance(cuts, Sequence) or len(cuts) != count:
        raise ConfigError(
            f"{where}: cuts is {cuts!r}: give a list of {count} entries, one per parameter: None or a dict such as "
            '{"heads": 8}'
        )
    known: Set[str] = {"heads", "sizes", "transposed", "axis"}
    for n, cut in enumerate(cuts):
        if cut is None:
            continue
        if not isinstance(cut, Mapping):
            raise ConfigError(f'{where}: cut {n} is {cut!r}: give None or a dict such as {{"heads": 8}}')
        for key in cut:
            if key not in known:
                close = closest(key, known)
                meant = f": did you mean '{close}'?" if close else f": use {', '.join(sorted(known))}"
                raise ConfigError(f"{where}: cut {n} has the unknown key '{key}'{meant}")
    return [None if cut is None else dict(cut) for cut in cuts]


def check_names(group: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if `param_names` and `params` differ in length."""
    names, count = group.get("param_names"), len(group["params"])
    if names is not None and len(names) != count:
        raise ConfigError(
            f"{where}: {len(names)} param_names for {count} params: both lists must have the same length"
        )


Kind = tuple[Any, Any, frozenset[str]]
"""Algorithm, rule, and names of the rule's options of a group. They cannot change: the state belongs to them."""


def kind_of(group: Mapping[str, Any]) -> Kind:
    """The kind of a group, from its current options."""
    return group.get("algorithm"), group.get("rule", "muon"), frozenset(group.get("rule_options") or ())


def check_changed(groups: Sequence[Group], kinds: Sequence[Kind]) -> None:
    """Raise ConfigError, naming the group, if its algorithm, rule or rule options differ from `kinds`.

    Rates and other numbers may change at any time. `kinds`: one per group, recorded when the group was made.
    """
    for index, (group, kind) in enumerate(zip(groups, kinds, strict=True)):
        for key, was, now in zip(("algorithm", "rule", "rule_options"), kind, kind_of(group), strict=True):
            if was != now:
                was, now = (sorted(x) if isinstance(x, frozenset) else x for x in (was, now))
                raise ConfigError(
                    f"group {group.get('name', index)}: {key} was {was!r} when the optimizer was made, and is {now!r} "
                    "now. The optimizer's state belongs to the first value: set it back, or make a new optimizer. lr, "
                    "weight_decay, momentum, scale and the values in rule_options may change at any time"
                )
        check_group(group, f"group {group.get('name', index)}")
