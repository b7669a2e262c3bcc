"""Holders of a case's model on a rank: one process, DDP, and the parts common to all frameworks."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from muon_dist.adapters import module_state
from muon_dist.checkpoint import Checkpoint, Holding
from muon_dist.fuzz.case import ADAMW, ADAMW_OPTIONS, DDP, FROZEN, MUON, ZERO, Case, Parameter, Setup, second_group
from muon_dist.fuzz.model import Model, Tensors, named, sample
from muon_dist.optim.groups import param_groups
from muon_dist.optim.muon import Muon
from muon_dist.routing import expert_group

SECOND = "second"


def make_optimizer(case: Case, model: Any, parameters: Mapping[str, Any]) -> Muon:
    """The optimizer of a case over the parameters of `model`, which are also given by their FQN in the whole model."""
    own = {"weight_decay": case.weight_decay, "scale": case.scale, "nesterov": case.nesterov}
    first: dict[str, Any] = {
        "rule": case.rule,
        "momentum": case.momentum,
        **{k: v for k, v in own.items() if v is not None},
    }
    if case.rule == "hyperball":
        del first["weight_decay"]
    if case.rule_options:
        first["rule_options"] = dict(case.rule_options)
    iteration: dict[str, Any] = {"ns_steps": case.ns_steps}
    if case.ns_rows:
        iteration = {"ns_schedule": [list(row) for row in case.ns_rows]}
    options: dict[str, dict[str, Any]] = {
        "muon": {**iteration, **first},
        SECOND: {**iteration, "rule": "muon", **second_group(case)},
    }
    options["adamw"] = ADAMW_OPTIONS
    if case.by_pattern:
        groups = _by_pattern(case, model, options)
    else:
        groups = [
            *_groups(case, model, parameters, MUON, 0, name="muon", **options["muon"]),
            *_groups(case, model, parameters, MUON, 1, name=SECOND, **options[SECOND]),
            *_groups(case, model, parameters, ADAMW, 0, name="adamw", **options["adamw"]),
        ]
    return Muon(
        groups,
        lr=case.lr,
        master_weights=case.rounding == "master",
        stochastic_rounding=case.rounding == "stochastic",
        rounding_seed=case.seed,
        momentum_everywhere=case.momentum_everywhere,
        audit={"every": 1, "seed": case.seed} if case.audit else None,
        ns_dtype=torch.float32,
        bucket_mb=case.bucket_mb,
        overlap=case.overlap,
        wire_dtype=getattr(torch, case.wire) if case.wire else None,
        owner_policy=case.owner_policy,
    )


def _groups(
    case: Case, model: Any, parameters: Mapping[str, Any], kind: str, number: int, **options: Any
) -> Iterator[dict[str, Any]]:
    """One group for all parameters except the experts of MoE layers, and one for these, as DeepSpeed requires."""
    own_names = {id(q): name for name, q in model.named_parameters()}
    by_ranks: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
    for p in case.parameters:
        if p.kind == kind and p.group == number:
            for q in (parameters[fqn] for fqn in p.fqns if fqn in parameters):
                by_ranks.setdefault(expert_group(q) or "", []).append((q, p.cut))
    for ranks, chosen in sorted(by_ranks.items()):
        made: dict[str, Any] = {"params": [q for q, _ in chosen], "param_names": [own_names[id(q)] for q, _ in chosen]}
        made |= {"algorithm": kind, **options}
        made |= {"cuts": [cut for _, cut in chosen]} if kind == MUON else {}
        yield made | ({"moe": True, "name": ranks} if ranks else {})


def _by_pattern(case: Case, model: Any, options: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a user writes them: one entry per parameter; options that entries lack are set on the groups."""
    said = ("weight_decay", "scale", "rule", "rule_options")
    trained = [p for p in case.parameters if p.kind != FROZEN]
    entries = []
    for p in trained:
        chosen = options[_options_of(p)]
        entry: dict[str, Any] = {"pattern": "|".join(map(re.escape, p.fqns)), "algorithm": p.kind}
        entry |= {key: chosen[key] for key in said if key in chosen}
        if p.kind == MUON and (p.heads or p.sizes):
            entry["split"] = {"heads": p.heads} if p.heads else {"sizes": list(p.sizes or ())}
        entries.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):  # the routing table of every case
        groups = param_groups(model, groups=entries)
    by_fqn = {fqn: p for p in trained for fqn in p.fqns}
    for group in groups:
        kind = _options_of(by_fqn[group["param_names"][0]])
        group |= {key: value for key, value in options[kind].items() if key not in said}
    return groups


def _options_of(p: Parameter) -> str:
    return SECOND if p.kind == MUON and p.group == 1 else p.kind


class Holder:
    """The model and its optimizer on this rank.

    Args:
        case, setup: the case, and the framework that holds the model. weights: first weights by FQN, whole tensors,
            equal on all ranks.
    """

    def __init__(self, case: Case, setup: Setup, weights: Mapping[str, torch.Tensor]) -> None:
        self.case, self.setup = case, setup
        self.model: Any = self.wrap(Model(case, weights))
        module = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        self.parameters = named(module)
        self.optimizer = make_optimizer(case, module, self.parameters)
        names = [fqn for p in case.parameters if _options_of(p) == SECOND for fqn in p.fqns]
        second = {id(self.parameters[fqn]) for fqn in names if fqn in self.parameters}
        # By index, because an engine replaces the tensors in the groups.
        self._second = [any(id(p) in second for p in group["params"]) for group in self.optimizer.param_groups]

    def wrap(self, model: Model) -> Any:
        if self.setup.framework != DDP:
            return model
        return DistributedDataParallel(model, find_unused_parameters=bool(self.case.missing))

    @property
    def data_rank(self) -> int:
        return dist.get_rank() // self.setup.tp

    def step(self, step: int) -> None:
        """All micro-batches of a step, the clip and the optimizer's step, by the framework's own means."""
        self.set_rate(step)
        for micro in range(self.case.accumulation):
            last = micro == self.case.accumulation - 1
            self.backward(self.fed(step, micro), last)
        self.finish()

    def fed(self, step: int, micro: int) -> Tensors:
        """The model's inputs for this rank's micro-batch, by `Parameter.fqn`.

        Experts get the tokens of all ranks that share a layer's experts. DeepSpeed then divides their gradients by the
        number of all data-parallel ranks, FSDP2 by the number of ranks that hold the same experts.
        """
        case, setup = self.case, self.setup
        found = sample(case, step, self.data_rank * case.accumulation + micro)
        count = max(1, setup.ep // setup.tp)
        first = self.data_rank // count * count
        shared = [p.fqn for p in case.parameters if setup.shares(p) and p.fqn in found]
        if shared and count > 1:
            every = [sample(case, step, (first + i) * case.accumulation + micro) for i in range(count)]
            for name in shared:
                total = torch.stack([one[name] for one in every]).sum(0)
                found[name] = total if setup.framework == ZERO else total / count
        return found

    def set_rate(self, step: int) -> None:
        for group, second in zip(self.optimizer.param_groups, self._second, strict=True):
            group["lr"] = self.case.rate(step) * (0.5 if second else 1.0)

    def backward(self, fed: Tensors, last: bool) -> None:
        waits = not last and self.setup.framework == DDP and not self.case.missing
        with self.model.no_sync() if waits else contextlib.nullcontext():
            (self.model(**fed) / self.case.accumulation).backward()

    def finish(self) -> None:
        if self.case.clip is not None:
            self._clip(self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _clip(self, bound: float) -> None:
        # torch.nn.utils.clip_grad_norm_ refuses gradients on several meshes.
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.stack([whole(torch.linalg.vector_norm(g)) for g in gradients]).norm()
        factor = min(1.0, bound / (float(norm) + 1e-6))
        for g in gradients:
            (g.to_local() if isinstance(g, DTensor) else g).mul_(factor)

    def whole(self) -> Tensors:
        """The whole weights by `Parameter.fqn`; a collective."""
        found = self.wholes()
        return {
            p.fqn: torch.stack([found[name] for name in p.fqns]) if p.listed else found[p.fqn]
            for p in self.case.parameters
        }

    def wholes(self) -> Tensors:
        """The weights by the names of the model's parameters."""
        return {name: self._whole(p) for name, p in self.parameters.items()}

    def _whole(self, p: Any) -> torch.Tensor:
        """A whole weight in fp32: its master copy, if it has one."""
        found = whole(p.detach())
        master = self.optimizer.state.get(p, {}).get("master_weight")
        if master is None:
            return found.float().clone()
        master = whole(master)
        if not torch.equal(master.to(found.dtype), found):
            raise AssertionError("a weight differs from its rounded master copy")
        return master.float().clone()

    def check(self) -> None:
        """Raises AssertionError if the audit raised an alarm: every alarm here is false."""
        audit = self.optimizer.audit
        if audit is not None and audit.alarms:
            raise AssertionError(f"the audit has raised an alarm: {audit.alarms[0]}")

    def holding(self, source: Checkpoint | None = None) -> Holding:
        """This rank's part of one of our checkpoints."""
        return module_state.holding(self.model, self.optimizer, dist.get_world_size(), source=source)

    def close(self) -> None:
        """Release the state that the framework keeps outside its objects."""


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
