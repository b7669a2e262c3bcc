"""What holds the model of a case on a rank: a process alone, DDP, and what every framework has in common."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from muon_dist.adapters import module_state
from muon_dist.checkpoint import Checkpoint, Holding
from muon_dist.fuzz.case import ADAMW, ADAMW_OPTIONS, DDP, MUON, SECOND_GROUP, Case, Setup
from muon_dist.fuzz.model import Model, Tensors, named, sample
from muon_dist.optim.muon import Muon

SECOND = "second"


def make_optimizer(case: Case, parameters: Mapping[str, Any]) -> Muon:
    """The optimizer of a case over its parameters, by FQN."""
    own = {"weight_decay": case.weight_decay, "scale": case.scale, "nesterov": case.nesterov}
    first = {"rule": case.rule, "momentum": case.momentum, **{k: v for k, v in own.items() if v is not None}}
    if case.rule == "hyperball":
        del first["weight_decay"]
    groups: list[dict[str, Any]] = [
        _group(case, parameters, MUON, 0, name="muon", ns_steps=case.ns_steps, **first),
        _group(case, parameters, MUON, 1, name=SECOND, ns_steps=case.ns_steps, rule="muon", **SECOND_GROUP),
        _group(case, parameters, ADAMW, 0, name="adamw", **ADAMW_OPTIONS),
    ]
    return Muon(
        [g for g in groups if g["params"]],
        lr=case.lr,
        ns_dtype=torch.float32,
        bucket_mb=case.bucket_mb,
        overlap=case.overlap,
        wire_dtype=getattr(torch, case.wire) if case.wire else None,
        owner_policy=case.owner_policy,
    )


def _group(case: Case, parameters: Mapping[str, Any], kind: str, number: int, **options: Any) -> dict[str, Any]:
    chosen = [p for p in case.parameters if p.kind == kind and p.group == number]
    names = [p.fqn for p in chosen]
    cuts = {"cuts": [p.cut for p in chosen]} if kind == MUON else {}
    return {"params": [parameters[n] for n in names], "param_names": names, "algorithm": kind, **cuts, **options}


class Holder:
    """The model and its optimizer on this rank.

    Args:
        case, setup: what is run, and the framework that holds it.
        weights: to begin with, by FQN; whole tensors, the same on all ranks.
    """

    def __init__(self, case: Case, setup: Setup, weights: Mapping[str, torch.Tensor]) -> None:
        self.case, self.setup = case, setup
        self.model: Any = self.wrap(Model(case, weights))
        self.parameters = named(case, self.model)
        self.optimizer = make_optimizer(case, self.parameters)

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
            self.backward(sample(self.case, step, self.data_rank * self.case.accumulation + micro), last)
        self.finish()

    def set_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.case.rate(step) * (0.5 if group["name"] == SECOND else 1.0)

    def backward(self, fed: Tensors, last: bool) -> None:
        waits = not last and self.setup.framework == DDP and not self.case.missing
        with self.model.no_sync() if waits else contextlib.nullcontext():
            (self.model(fed) / self.case.accumulation).backward()

    def finish(self) -> None:
        if self.case.clip is not None:
            self._clip(self.case.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def _clip(self, bound: float) -> None:
        # torch.nn.utils.clip_grad_norm_ takes no gradients of several meshes.
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.stack([whole(torch.linalg.vector_norm(g)) for g in gradients]).norm()
        factor = min(1.0, bound / (float(norm) + 1e-6))
        for g in gradients:
            (g.to_local() if isinstance(g, DTensor) else g).mul_(factor)

    def whole(self) -> Tensors:
        """The weights, whole, by FQN; a collective."""
        return {name: whole(p.detach()).clone() for name, p in self.parameters.items()}

    def holding(self, source: Checkpoint | None = None) -> Holding:
        """What a checkpoint of ours holds of this rank."""
        return module_state.holding(self.model, self.optimizer, dist.get_world_size(), source=source)

    def close(self) -> None:
        """Give back what the framework keeps outside the objects."""


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
