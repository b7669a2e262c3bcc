"""The routed model of a configuration on the meta device, and the settings that affect cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from muon_dist.defaults import BUCKET_MB, NS_SCHEDULE, NS_STEPS, OWNER_POLICY, SEQUENCE_LENGTH
from muon_dist.layout import Matrix, cut_parameter
from muon_dist.model import build_model, count_parameters, flops_per_token
from muon_dist.model.parallel import Architecture, architecture
from muon_dist.numerics import ScheduleLike, get_schedule
from muon_dist.optim.rules import RULES, MuonRule
from muon_dist.routing import GroupRule, Override, RoutedGroup, SplitRule, route, routed_groups


@dataclass(frozen=True)
class PlannedParameter:
    """A trained parameter: name, shape, and its matrices (none under AdamW).

    tp, ep: its style in the model's tensor-parallel and expert-parallel plan; None without one. layer: its
    transformer layer; -1 before the first (embeddings), the number of layers after the last (final norm, head).
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    matrices: tuple[Matrix, ...]
    tp: str | None = None
    ep: str | None = None
    layer: int = 0


@dataclass(frozen=True)
class Settings:
    """The settings of optimizer and trainer on which a plan depends.

    micro_batch: samples of a rank in one forward pass. low_precision: the model computes in bf16. ordered: under
    ZeRO-1/2 each Muon group is sorted by `partition_order`, as in `MuonFactory`. momentum_everywhere: see `Muon`.
    rule: of `optimizer.muon`, with its parts; entries of `groups` are planned with this rule.
    """

    ns_steps: int = NS_STEPS
    ns_schedule: ScheduleLike = NS_SCHEDULE
    ns_dtype: torch.dtype | None = None
    wire_dtype: torch.dtype | None = None
    bucket_mb: float = BUCKET_MB
    overlap: bool = True
    owner_policy: str = OWNER_POLICY
    sequence_length: int = SEQUENCE_LENGTH
    micro_batch: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    low_precision: bool = True
    sub_group_size: int = 10**9
    ordered: bool = True
    momentum_everywhere: bool = False
    rule: MuonRule = RULES["muon"]

    @property
    def iterations(self) -> int:
        """Newton-Schulz steps, a schedule's fixed tail included."""
        return len(get_schedule(self.ns_schedule).coefficients(self.ns_steps))

    @property
    def tokens(self) -> int:
        """Tokens of one rank per optimizer step."""
        return self.sequence_length * self.micro_batch * self.accumulation

    @property
    def run(self) -> dict[str, int]:
        """The settings on which activations depend, for the heading of a plan."""
        return {
            "micro_batch": self.micro_batch,
            "sequence_length": self.sequence_length,
            "accumulation": self.accumulation,
            "recomputation": self.checkpointing,
        }


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
    architecture: Architecture

    @cached_property
    def kinds(self) -> tuple[tuple[PlannedParameter, int, bool], ...]:
        """(example, number, whether Muon's) of each set of parameters that every mesh places in the same way, for
        sums."""
        found: dict[tuple[Any, ...], list[PlannedParameter]] = {}
        for p, muon in [*((p, True) for p in self.muon), *((p, False) for p in self.adamw)]:
            found.setdefault((p.shape, p.tp, p.ep, muon), []).append(p)
        return tuple((members[0], len(members), key[-1]) for key, members in found.items())

    @property
    def by_muon_group(self) -> tuple[tuple[PlannedParameter, ...], ...]:
        """`muon`, group by group."""
        ends = list(accumulate(self.muon_groups))
        return tuple(self.muon[end - count : end] for end, count in zip(ends, self.muon_groups, strict=True))

    def largest_stage(self, stages: int) -> Workload:
        """The part of the model on the pipeline stage with the most parameters, with layers divided as in
        transformers: equal numbers, the rest on the last stage; embeddings on the first, the final norm and the head
        on the last."""
        if stages == 1:
            return self
        each = self.layers // stages
        every = (*self.muon, *self.adamw)
        elements = [0] * stages
        for p in every:
            elements[_stage(p, each, stages)] += p.numel
        chosen = max(range(stages), key=lambda i: elements[i])
        muon = [[p for p in g if _stage(p, each, stages) == chosen] for g in self.by_muon_group]
        here = self.layers - each * (stages - 1) if chosen == stages - 1 else each
        share = here / self.layers
        return replace(
            self,
            muon=tuple(p for g in muon for p in g),
            adamw=tuple(p for p in self.adamw if _stage(p, each, stages) == chosen),
            muon_groups=tuple(len(g) for g in muon),
            parameters=elements[chosen],
            active=round(self.active * share),
            flops_per_token=self.flops_per_token * share,
            layers=here,
        )

    @property
    def muon_elements(self) -> int:
        return sum(p.numel for p in self.muon)

    @property
    def adamw_elements(self) -> int:
        return sum(p.numel for p in self.adamw)


def _stage(parameter: PlannedParameter, layers: int, stages: int) -> int:
    """The pipeline stage of a parameter, with `layers` layers per stage and the rest on the last."""
    return min(max(parameter.layer, 0) // layers, stages - 1)


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
    layers = int(config.num_hidden_layers)
    placed = _styles(built, layers)
    muon_parameters, adamw_parameters = (
        tuple(placed(p) for g in chosen for p in parameters_of(g)) for chosen in (muon, adamw)
    )
    return Workload(
        name=name,
        muon=muon_parameters,
        adamw=adamw_parameters,
        groups=tuple(sum(r.elements for r in g.routes) for g in adamw),
        muon_groups=tuple(len(g.routes) for g in muon),
        parameters=count.total,
        active=count.active,
        flops_per_token=float(flops_per_token(built, sequence_length)),
        layers=layers,
        hidden=int(config.hidden_size),
        vocabulary=vocabulary,
        architecture=architecture(built),
    )


def _styles(model: Any, layers: int) -> Callable[[PlannedParameter], PlannedParameter]:
    """The parameter with its layer and its styles in the model's tensor- and expert-parallel plans."""
    tp, ep = dict(model.tp_plan or {}), dict(model.ep_plan or {})
    stage: dict[str, int] = {}
    reached = -1
    for name, _ in model.named_parameters():
        number = re.search(r"\.(\d+)\.", name)
        if number is not None:
            reached = int(number[1])
        stage[name] = reached if number is not None or reached < 0 else layers

    def style(name: str, plan: dict[str, str]) -> str | None:
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        return plan.get(generic, plan.get(generic.rsplit(".", 1)[0]))

    return lambda p: replace(p, tp=style(p.name, tp), ep=style(p.name, ep), layer=stage[p.name])


def build_on_meta(model: Mapping[str, Any], vocabulary: int) -> nn.Module:
    """The model of a configuration's block, without memory."""
    with torch.device("meta"):
        return build_model(model, vocab_size=vocabulary, seed=0)


def parameters_of(group: RoutedGroup) -> tuple[PlannedParameter, ...]:
    """The parameters of a group, split into matrices as in the optimizer."""
    found = []
    for r in group.routes:
        cut: dict[str, Any] = {"transposed": r.transposed}
        if r.split is not None:
            cut |= r.split.cut()
        matrices = cut_parameter(r.fqn, r.shape, **cut) if group.algorithm == "muon" else ()
        found.append(PlannedParameter(r.fqn, r.shape, r.elements, matrices))
    return tuple(found)
