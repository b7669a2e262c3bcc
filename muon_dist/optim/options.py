"""Checks of a parameter group's options, and the record of its parameters before a framework replaces them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.defaults import BUCKET_MB, COST, OWNER_POLICY
from muon_dist.errors import ConfigError, RoutingError
from muon_dist.layout import cut_parameter
from muon_dist.numerics import get_schedule
from muon_dist.optim.binding import Group, ParameterSpec
from muon_dist.optim.checks import check_cuts, check_group, check_names
from muon_dist.optim.frameworks import loaded_checks
from muon_dist.optim.rules import MuonRule
from muon_dist.optim.rules.choice import choose_rule
from muon_dist.optim.rules.entries import check_flag, check_number
from muon_dist.ownership.cost import CostModel
from muon_dist.routing import logical_shape

DEFAULT_GROUP = "default"
ANALYTIC, MEASURED = "analytic", "measured"


@dataclass(frozen=True)
class Options:
    """The arguments of `Muon` that hold for all groups; equal on all ranks.

    Raises:
        ConfigError: an option is invalid; names it and its value.
    """

    owner_policy: str = OWNER_POLICY
    cost: str | CostModel = COST
    bucket_mb: float = BUCKET_MB
    overlap: bool = True
    ns_compile: bool = False
    wire_dtype: torch.dtype | None = None
    master_weights: bool = False
    stochastic_rounding: bool = False
    rounding_seed: int = 0
    momentum_everywhere: bool = False

    def __post_init__(self) -> None:
        for name in ("overlap", "ns_compile", "master_weights", "stochastic_rounding", "momentum_everywhere"):
            check_flag(vars(self), name, "Muon")
        if not isinstance(self.rounding_seed, int):
            raise ConfigError(f"rounding_seed is {self.rounding_seed!r}: it must be a whole number")
        if not check_number(vars(self), "bucket_mb", "Muon") > 0:
            raise ConfigError(f"bucket_mb is {self.bucket_mb}: it must be above 0")
        if self.wire_dtype is not None and not (
            isinstance(self.wire_dtype, torch.dtype) and self.wire_dtype.is_floating_point
        ):
            raise ConfigError(
                f"wire_dtype is {self.wire_dtype!r}: use a floating-point dtype such as torch.bfloat16, or None"
            )
        if not isinstance(self.cost, CostModel) and self.cost not in (ANALYTIC, MEASURED):
            raise ConfigError(f"cost '{self.cost}' is unknown: use {ANALYTIC}, {MEASURED} or a CostModel")
        if self.master_weights and self.stochastic_rounding:
            raise ConfigError(
                "master_weights and stochastic_rounding are both on: use only one (masters need no random rounding)"
            )

    @property
    def bucket_bytes(self) -> int:
        """`bucket_mb` in bytes."""
        return int(self.bucket_mb * 2**20)

    def fields(self) -> Iterable[tuple[str, object]]:
        """(name, value) of each option that decides which messages are sent, apart from the owners."""
        yield "bucket_mb in bytes", self.bucket_bytes
        yield "wire_dtype", str(self.wire_dtype)
        yield "overlap", self.overlap
        yield "master_weights", self.master_weights
        yield "stochastic_rounding and rounding_seed", (self.stochastic_rounding, self.rounding_seed)
        yield "momentum_everywhere", self.momentum_everywhere


def check_process_group(process_group: dist.ProcessGroup | str | None) -> None:
    """Raise ConfigError for a name that is not `DEFAULT_GROUP`."""
    if isinstance(process_group, str) and process_group != DEFAULT_GROUP:
        raise ConfigError(f"process_group '{process_group}' is unknown: pass a ProcessGroup, None or 'default'")


def iterations(group: Group) -> int:
    """Newton-Schulz steps of a Muon group, the schedule's fixed tail included."""
    return len(get_schedule(group["ns_schedule"]).coefficients(group["ns_steps"]))


def read_group(
    group: Group, index: int, cuts: Any, given: Set[str], where: str, default_rule: Mapping[str, Any]
) -> tuple[MuonRule | None, list[ParameterSpec]]:
    """The update rule of a group (None for AdamW's) and its parameters; writes the rule's options into the group.

    Args:
        index: index of the group.
        cuts: the value of `cuts` that the user passed.
        given, where, default_rule: see `choose_rule`.

    Raises:
        ConfigError: an option, a cut or the number of names is invalid.
        RoutingError: see `make_spec`.
    """
    check_names(group, where)
    rule = choose_rule(group, given, where, default_rule)
    check_group(group, where)
    return rule, make_specs(group, index, check_cuts(cuts, len(group["params"]), where))


def make_specs(group: Group, index: int, cuts: Sequence[dict[str, Any] | None]) -> list[ParameterSpec]:
    """The specifications of a group's parameters, with a cut for each. Raises RoutingError, see `make_spec`."""
    names = group.get("param_names") or [f"group{index}.param{i}" for i in range(len(group["params"]))]
    return [make_spec(n, p, group["algorithm"], c) for n, p, c in zip(names, group["params"], cuts, strict=True)]


def make_spec(name: str, p: torch.Tensor, algorithm: str, cut: dict[str, Any] | None) -> ParameterSpec:
    """The specification of parameter `p`. Raises RoutingError for one under Muon with fewer than two axes."""
    for check in loaded_checks():
        check(name, p)
    shape = logical_shape(p)
    if algorithm == "adamw" or (0 in shape and len(shape) >= 2):
        return ParameterSpec(name, shape)
    if not p.is_floating_point():
        raise RoutingError(
            f"{name} is {p.dtype}, but only real floating-point matrices can be orthogonalized: put it into a group "
            "with algorithm 'adamw', as param_groups(model, overrides=[Override(pattern, 'adamw')]) does"
        )
    if len(shape) < 2:
        raise RoutingError(
            f"{name} of shape {shape} is in a Muon group, but only matrices can be orthogonalized: put it into a "
            "group with algorithm 'adamw', or use muon_dist.param_groups(model)"
        )
    return ParameterSpec(name, shape, cut_parameter(name, shape, **(cut or {})))
