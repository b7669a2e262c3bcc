"""Makes the ownership plan on which all ranks agree, and checks its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muon_dist.errors import CheckpointError, ConfigError, LayoutError
from muon_dist.exchange.transport import Transport
from muon_dist.layout import Matrix, replicated_layout
from muon_dist.numerics import compute_dtype
from muon_dist.numerics.compiled import check_compiler
from muon_dist.numerics.products import SYMMETRIC_TILE, products_for
from muon_dist.optim.binding import Binding, Bound, Group, ParameterSpec
from muon_dist.optim.costs import agreed_cost, owners_for
from muon_dist.optim.options import Options
from muon_dist.optim.rules import PARTS
from muon_dist.ownership import OwnershipPlan


def agreed_plan(
    binding: Binding,
    group_of: Mapping[int, int],
    groups: Sequence[Group],
    specs: Sequence[Sequence[ParameterSpec]],
    options: Options,
    transport: Transport,
) -> OwnershipPlan:
    """The plan of a binding, the same on all ranks; a collective.

    Raises:
        LayoutError: the matrices of the layout are not exactly those of the optimizer.
        PlanMismatchError: the ranks computed different plans.
    """
    cost = agreed_cost(options.cost, binding, groups, group_of)

    def made() -> tuple[OwnershipPlan, list[tuple[str, object]]]:
        check_covers(specs if binding.specs is None else binding.specs, binding)
        plan = owners_for(binding, groups, group_of, options, cost)
        if options.ns_compile:
            check_compiler(binding.device)
        # Options first: they also change owners, and the message names only the first difference.
        of_groups = group_fields(groups, group_of, binding.device)
        return plan, [*options.fields(), *of_groups, *cost.fields(), *plan.fields()]

    transport.progress.enter("ownership plan")
    plan, fields = transport.ranks.everywhere(made)
    transport.require_equal("ownership plan", fields)
    return plan


def plain_binding(
    groups: Sequence[Group], specs: Sequence[Sequence[ParameterSpec]], process_group: dist.ProcessGroup | str | None
) -> Bound:
    """The binding of parameters without a framework: every rank holds them whole."""
    check_untouched(groups, specs)
    buffers: list[torch.Tensor] = []
    matrices: list[tuple[Matrix, ...]] = []
    group_of: dict[int, int] = {}
    for index, (group, of_group) in enumerate(zip(groups, specs, strict=True)):
        for p, spec in zip(group["params"], of_group, strict=True):
            if spec.matrices:
                group_of[len(buffers)] = index
                buffers.append(p)
                matrices.append(spec.matrices)
    ranks = default_process_group(process_group)
    world = dist.get_world_size(ranks) if ranks is not None else 1
    device = buffers[0].device if buffers else torch.device("cpu")
    return Binding(replicated_layout(matrices, world), tuple(buffers), ranks, device), group_of


def replaced_groups(known: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """The current group objects, if a framework has replaced some of the `known` ones.

    Raises:
        LayoutError: the number of groups has changed.
    """
    if len(groups) != len(known):
        group = next(g for g in groups if all(g is not k for k in known))
        raise LayoutError(
            f"group '{group.get('name', group.get('algorithm'))}' is not one of the {len(known)} that Muon was made "
            "with: change a group in place instead of replacing it"
        )
    return list(groups)


def check_covers(specs: Sequence[Sequence[ParameterSpec]], binding: Binding) -> None:
    """Raises LayoutError unless the layout has exactly the matrices of the optimizer."""
    expected = {m.name: m for group in specs for s in group for m in s.matrices}
    found = {m.matrix.name: m.matrix for m in binding.layout.matrices}
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing or unknown:
        raise LayoutError(
            f"the {binding.layout.kind} layout has {len(found)} matrices, the optimizer has "
            f"{len(expected)}: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    changed = [name for name, m in expected.items() if found[name] != m]
    if changed:
        name = changed[0]
        raise LayoutError(f"{name} is {expected[name]} in the optimizer, but {found[name]} in the layout")


def check_untouched(groups: Sequence[Group], specs: Sequence[Sequence[ParameterSpec]]) -> None:
    """Raises LayoutError if a framework has replaced parameters of the groups."""
    for group, given in zip(groups, specs, strict=True):
        found = [tuple(p.shape) for p in group["params"]]
        expected = [s.shape for s in given]
        if found != expected:
            what = next((f"{s.name} {s.shape}" for s, f in zip(given, found, strict=False) if s.shape != f), "")
            raise LayoutError(
                f"the parameters of group '{group.get('name', group['algorithm'])}' are not those that Muon was "
                f"given: {len(expected)} of them {('from ' + what) if what else ''} were replaced by "
                f"{len(found)} of shapes {found[:3]}. A framework has repartitioned them: under DeepSpeed call "
                "muon_dist.attach(engine) after deepspeed.initialize. (After gc.freeze() the engine is not found "
                "without this call.)"
            )


def check_saved_groups(
    saved: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    algorithms: Sequence[str],
    specs: Sequence[Sequence[ParameterSpec]],
) -> None:
    """Raises ConfigError or CheckpointError if the saved groups, rules or order of parameters differ."""
    strange = [g for g in saved if "algorithm" not in g]
    if strange:
        keys = ", ".join(sorted(set(strange[0]) - {"params", "param_names"}))
        raise ConfigError(
            f"this is the state of another optimizer, not of muon_dist.Muon: its groups have {keys} and no algorithm. "
            "Momentum of other optimizers cannot be used: start with only the weights"
        )
    found = [g["algorithm"] for g in saved]
    if found != list(algorithms):
        raise ConfigError(f"the saved groups are {found}, this optimizer's are {list(algorithms)}")
    check_rules(saved, groups)
    check_order(saved, specs)


def check_order(saved: Sequence[Mapping[str, Any]], specs: Sequence[Sequence[ParameterSpec]]) -> None:
    """Raises CheckpointError if the saved parameters are in another order: state is matched by position."""
    for group, given in zip(saved, specs, strict=True):
        names, expected = list(group.get("param_names") or ()), [s.name for s in given]
        if names != expected and sorted(names) == sorted(expected):
            first = next(i for i, (a, b) in enumerate(zip(names, expected, strict=True)) if a != b)
            raise CheckpointError(
                f"the saved state has the parameters of group '{group.get('name', '')}' in another order: number "
                f"{first} was {names[first]} and is {expected[first]}. Make the groups as they were made then, with "
                "the same `partitions` (param_groups), or load a checkpoint that stores parameters by name"
            )


def check_rules(saved: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> None:
    """Raises ConfigError if the update rule of a saved group differs. A saved group without a rule is "muon"."""
    for index, (before, group) in enumerate(zip(saved, groups, strict=True)):
        was = before.get("rule", "muon")
        if group["algorithm"] == "muon" and was != group.get("rule", "muon"):
            raise ConfigError(
                f"group '{group.get('name', index)}': the saved state is of rule '{was}', this optimizer has rule "
                f"'{group.get('rule', 'muon')}': make the optimizer with rule='{was}', or start without that state"
            )
        for name, part in PARTS.items():
            has, had = (bool((g.get("rule_options") or {}).get(name)) for g in (group, before))
            if part.owner_memory and has != had and group["algorithm"] == "muon":
                raise ConfigError(
                    f"group '{group.get('name', index)}': the saved state is of {name} {had}, this optimizer's of "
                    f"{has}: write rule_options: {{{name}: {str(had).lower()}}}, or start without that state"
                )


def group_fields(
    groups: Sequence[Group], group_of: Mapping[int, int], device: torch.device
) -> Iterable[tuple[str, object]]:
    """(name, value) of the groups' options that affect the result; equal on all ranks."""
    for index in sorted(set(group_of.values())):
        group = groups[index]
        dtype = compute_dtype(group["ns_dtype"], device, group["ns_schedule"])
        products = products_for(SYMMETRIC_TILE, SYMMETRIC_TILE, dtype, device).name
        yield f"group {index}: Newton-Schulz", (group["ns_steps"], group["ns_schedule"], str(dtype), products)
        options = group.get("rule_options") or {}
        yield f"group {index}: rule", (group.get("rule", "muon"), sorted(options.items()))
        yield f"group {index}: momentum, nesterov, scale", (group["momentum"], group["nesterov"], group["scale"])
        yield f"group {index}: lr, weight_decay", (float(group["lr"]), float(group["weight_decay"]))


def default_process_group(chosen: dist.ProcessGroup | str | None) -> dist.ProcessGroup | None:
    """The chosen process group. The name "default" stands for torch.distributed's default group, if there is one."""
    if not isinstance(chosen, str):
        return chosen
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
