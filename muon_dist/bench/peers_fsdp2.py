"""FSDP2: `fully_shard` of every layer and of the whole model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from muon_dist.bench.cases import Case
from muon_dist.bench.sides import Builder, PlainSide, on_mesh


class ShardedSide(PlainSide):
    """Parameters and gradients that are DTensors, cut along their rows."""

    def replace(self, parameter: Any, gradient: torch.Tensor) -> None:
        parts = torch.chunk(gradient, dist.get_world_size())
        rank = dist.get_rank()
        if rank < len(parts):
            parameter.grad.to_local().copy_(parts[rank])

    def whole(self, name: str) -> torch.Tensor:
        return self.parameters[name].detach().full_tensor()


def make(model: Any, case: Case, build: Builder) -> ShardedSide:
    """A Llama under fully_shard; the optimizer is made afterwards, for its DTensors."""
    shard(model, on_mesh(case.device))
    return ShardedSide(model, model, build(model, case))


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """`model` after `fully_shard` of every layer and of the whole."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)
