"""The model of a configuration on the meta device, routed, and what of the rest of the configuration costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from muon_dist.layout import Matrix, cut_parameter
from muon_dist.model import build_model, count_parameters, flops_per_token
from muon_dist.numerics import get_schedule
from muon_dist.routing import GroupRule, Override, RoutedGroup, SplitRule, route, routed_groups


@dataclass(frozen=True)
class PlannedParameter:
    """A trained parameter: name, shape, and its matrices (none under AdamW)."""

    name: str
    shape: tuple[int, ...]
    numel: int
    matrices: tuple[Matrix, ...]


@dataclass(frozen=True)
class Settings:
    """What of the optimizer's and the trainer's settings the plan depends on.

    micro_batch: samples of a rank in one forward pass. low_precision: the model computes in bf16. ordered: under
    ZeRO-1/2 each Muon group is put into the order of `partition_order`, as `MuonFactory` does. momentum_everywhere:
    see `Muon`.
    """

    ns_steps: int = 5
    ns_schedule: str = "keller"
    ns_dtype: torch.dtype | None = None
    wire_dtype: torch.dtype | None = None
    bucket_mb: float = 32.0
    overlap: bool = True
    owner_policy: str = "balanced"
    sequence_length: int = 1024
    micro_batch: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    low_precision: bool = True
    sub_group_size: int = 10**9
    ordered: bool = True
    momentum_everywhere: bool = False

    @property
    def iterations(self) -> int:
        """Newton-Schulz steps, a schedule's fixed tail included."""
        return len(get_schedule(self.ns_schedule).coefficients(self.ns_steps))

    @property
    def tokens(self) -> int:
        """Of one rank in one optimizer step."""
        return self.sequence_length * self.micro_batch * self.accumulation


@dataclass(frozen=True)
class Workload:
    """A model, routed.

    Attributes:
        name: for tables.
        muon, adamw: the parameters of each algorithm, in the order of the groups.
        groups: elements of each of AdamW's parameter groups.
        muon_groups: the number of parameters in each of Muon's parameter groups.
        parameters, active: elements of the model, and those that a token uses.
        flops_per_token: forward and backward, at the sequence length of the settings.
        layers, hidden, vocabulary: for activations.
    """

    name: str
    muon: tuple[PlannedParameter, ...]
    adamw: tuple[PlannedParameter, ...]
    groups: tuple[int, ...]
    muon_groups: tuple[int, ...]
    parameters: int
    active: int
    flops_per_token: float
    layers: int
    hidden: int
    vocabulary: int

    @property
    def by_muon_group(self) -> tuple[tuple[PlannedParameter, ...], ...]:
        """`muon`, group by group."""
        ends = list(accumulate(self.muon_groups))
        return tuple(self.muon[end - count : end] for end, count in zip(ends, self.muon_groups, strict=True))

    @property
    def muon_elements(self) -> int:
        return sum(p.numel for p in self.muon)

    @property
    def adamw_elements(self) -> int:
        return sum(p.numel for p in self.adamw)


def describe_model(
    name: str,
    model: Mapping[str, Any],
    *,
    vocabulary: int,
    sequence_length: int,
    overrides: Sequence[Override] = (),
    splits: Sequence[SplitRule] = (),
    groups: Sequence[GroupRule] = (),
) -> Workload:
    """Build `model` (the block of a configuration) on the meta device and route it; no weight takes memory."""
    built = build_on_meta(model, vocabulary)
    made = routed_groups(route(built, overrides, splits, groups))
    muon, adamw = ([g for g in made if g.algorithm == algorithm] for algorithm in ("muon", "adamw"))
    count = count_parameters(built)
    config: Any = built.config
    return Workload(
        name=name,
        muon=tuple(p for g in muon for p in parameters_of(g)),
        adamw=tuple(p for g in adamw for p in parameters_of(g)),
        groups=tuple(sum(r.elements for r in g.routes) for g in adamw),
        muon_groups=tuple(len(g.routes) for g in muon),
        parameters=count.total,
        active=count.active,
        flops_per_token=float(flops_per_token(built, sequence_length)),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocabulary=vocabulary,
    )


def build_on_meta(model: Mapping[str, Any], vocabulary: int) -> nn.Module:
    """The model of a configuration's block, without memory."""
    with torch.device("meta"):
        return build_model(model, vocab_size=vocabulary, seed=0)


def parameters_of(group: RoutedGroup) -> tuple[PlannedParameter, ...]:
    """The parameters of a group, cut as the optimizer cuts them."""
    found = []
    for r in group.routes:
        cut: dict[str, Any] = {"transposed": r.transposed}
        if r.split is not None:
            cut |= {"heads": r.split.heads, "sizes": r.split.sizes}
        matrices = cut_parameter(r.fqn, r.shape, **cut) if group.algorithm == "muon" else ()
        found.append(PlannedParameter(r.fqn, r.shape, r.elements, matrices))
    return tuple(found)
